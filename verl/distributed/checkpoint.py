"""Sharded asynchronous checkpoints (torch.distributed.checkpoint): atomic, resumable on another number of ranks.

global_step_<N>.tmp/ -> global_step_<N>/     renamed when everything, manifest last, is on disk
  actor/                .metadata, *.distcp  {"model": ..., "optimizer": ...}, no optimizer when saved model-only
  actor/rng_rank_<r>.pt random generator states of each rank
  actor/huggingface/    config, tokenizer, processor; weights after scripts/model_merger.py
  trainer_state.json    global_step and the loop's other state
  manifest.json         file name -> bytes and SHA-256
"""

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.storage import WriteResult

from verl.distributed.cpu_offload import PinnedBuffer
from verl.distributed.optim import LOW_BITS, OLD_STATE, KahanAdamW, convert_compensation, rename_states
from verl.model.lora import has_adapters, is_adapter

MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.json"
NUM_PARALLEL_FILES = 4
"""Files that a rank writes, or hashes, at the same time; both release the GIL."""
STEP_FOLDER = re.compile(r"global_step_(\d+)")


class ParallelWriter(FileSystemWriter):
    """Writes several files of a rank in parallel; torch's own multi-threaded writer loses its threads' exceptions."""

    def __init__(self, folder: Path):
        super().__init__(folder, per_thread_copy_ahead=0)  # the state is in host memory already

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        """As FileSystemWriter; large tensors are spread over the files."""
        items = sorted(plan.items, key=_num_elements, reverse=True)
        num_files = min(NUM_PARALLEL_FILES, len(items))

        def write(number: int) -> list[WriteResult]:
            prefix = replace(plan.storage_data, prefix=f"{plan.storage_data.prefix}{number}_")
            of_file = replace(plan, items=items[number::num_files], storage_data=prefix)
            return super(ParallelWriter, self).write_data(of_file, planner).value()

        done: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        with ThreadPoolExecutor(NUM_PARALLEL_FILES) as pool:
            done.set_result([result for results in pool.map(write, range(num_files)) for result in results])
        return done


def _num_elements(item: WriteItem) -> int:
    return item.tensor_data.chunk.sizes.numel() if item.tensor_data else 0


class ShardWriter:
    """Writes one rank's sharded state dict of model and optimizer in the background; all ranks make the same calls.

    `start` returns after a copy to pinned host memory, so training may go on. The memory is reused by later calls.
    """

    def __init__(self):
        # Its own gloo group: collectives of the thread must not interleave with training, and NCCL needs GPU tensors.
        self.group: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.buffer = PinnedBuffer()
        self.writing: Future | None = None

    def start(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        """Starts writing; without an optimizer, the model only. The previous write must be finished."""
        assert self.writing is None or self.writing.done(), "the previous checkpoint is still being written"
        state = self.buffer.copy_state(_sharded_state_dict(model, optimizer))
        writer = ParallelWriter(folder)
        self.writing = self.thread.submit(dcp.save, state, storage_writer=writer, process_group=self.group)

    def fault(self, blocking: bool = False) -> str | None:
        """None while writing, "" after success, else the error messages by rank."""
        assert self.writing is not None, "start comes first"
        if not blocking and not self.writing.done():
            return None
        error = self.writing.exception()
        if isinstance(error, CheckpointException):
            return "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in sorted(error.failures.items()))
        return str(error or "")


def _sharded_state_dict(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Sharded state dict of the model (of its adapters only, if it has any) and the optimizer."""
    weights = get_model_state_dict(model)
    if has_adapters(model):
        weights = {name: weight for name, weight in weights.items() if is_adapter(name)}
    state: dict[str, Any] = {"model": weights}
    return state if optimizer is None else state | {"optimizer": get_optimizer_state_dict(model, optimizer)}


def load_shards(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Loads model and optimizer from shards written by any number of ranks; collective.

    Raises:
        ValueError: the files do not fit the model or cannot be read.
    """
    state = _sharded_state_dict(model, optimizer)
    states = state["optimizer"]["state"] if isinstance(optimizer, KahanAdamW) else {}
    is_old = bool(states) and any(name.endswith(f".{OLD_STATE}") for name in _stored_names(folder))
    if is_old:
        rename_states(states, LOW_BITS, OLD_STATE)
    try:
        dcp.load(state, checkpoint_id=folder)
    except CheckpointException as error:  # a BaseException: it would pass every handler of the callers
        causes = "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in sorted(error.failures.items()))
        raise ValueError(f"{folder} cannot be loaded: {causes}") from error
    if is_old:
        print(f"Converting the states of adamw_bf16 in {folder}: they are of an older form", flush=True)  # noqa: T201
        rename_states(states, OLD_STATE, LOW_BITS)
        convert_compensation(states, state["model"])
    set_model_state_dict(model, state["model"], options=StateDictOptions(strict=not has_adapters(model)))
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, state["optimizer"])


def _stored_names(folder: Path) -> Iterable[str]:
    """Names of the tensors in a checkpoint's shards; none where there are no shards."""
    return FileSystemReader(folder).read_metadata().state_dict_metadata if (folder / ".metadata").is_file() else ()


def save_rng(folder: Path, rank: int) -> None:
    """Writes the states of this process' random generators (torch, CUDA, numpy, Python)."""
    name, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "python": random.getstate(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / f"rng_rank_{rank}.pt")


def load_rng(folder: Path, rank: int) -> None:
    """Restores the generator states from `save_rng`; does nothing for a rank without a file."""
    file = folder / f"rng_rank_{rank}.pt"
    if not file.is_file():
        return
    state = torch.load(file, weights_only=True)
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")
    _fsync(path)


def begin(root: Path, step: int) -> Path:
    """Creates an empty temporary folder for the checkpoint of `step`, removing one of a killed run."""
    folder = root / f"global_step_{step}.tmp"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def finish(folder: Path, trainer_state: dict[str, Any]) -> Path:
    """Writes state and manifest, syncs all files to disk and renames the folder; returns its final path."""
    _write_json(folder / TRAINER_STATE, trainer_state)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        _fsync(path)
    manifest = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, _digests(files), strict=True)
    }
    _write_json(folder / MANIFEST, manifest)
    final = folder.with_suffix("")
    shutil.rmtree(final, ignore_errors=True)
    folder.rename(final)
    _fsync(final.parent)
    return final


def _digests(files: Sequence[Path]) -> Iterator[str]:
    """SHA-256 of each file, computed in parallel: hashing releases the GIL."""

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(NUM_PARALLEL_FILES) as pool:
        yield from pool.map(digest, files)


def check(folder: Path, with_content: bool = True) -> None:
    """Checks that the checkpoint is complete and, with `with_content`, that its digests match.

    Raises:
        ValueError: with the missing, truncated or altered file.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise ValueError(f"{folder} has no {MANIFEST}: it was not written to its end")
    written = {folder / name: entry for name, entry in json.loads(manifest.read_text()).items()}
    for path, entry in written.items():
        found = path.stat().st_size if path.is_file() else None
        if found != entry["bytes"]:
            raise ValueError(f"{path} should have {entry['bytes']} bytes and has {found}: the checkpoint is damaged")
    if with_content:
        for path, digest in zip(written, _digests(list(written)), strict=True):
            if digest != written[path]["sha256"]:
                raise ValueError(f"{path} has other bytes than were written (SHA-256): the checkpoint is damaged")


def _step_folders(root: Path) -> list[tuple[int, Path]]:
    """Step and folder of each finished checkpoint, oldest first."""
    if not root.is_dir():
        return []
    matches = [(STEP_FOLDER.fullmatch(path.name), path) for path in root.iterdir() if path.is_dir()]
    return sorted((int(match.group(1)), path) for match, path in matches if match)


def find_latest(root: Path, with_content: bool = True) -> Path | None:
    """The newest checkpoint under `root` that passes `check`, or None; skipped ones are printed."""
    for _, folder in reversed(_step_folders(root)):
        try:
            check(folder, with_content)
        except ValueError as error:
            print(f"Skipping checkpoint: {error}", flush=True)  # noqa: T201
            continue
        return folder
    return None


def read_trainer_state(folder: Path) -> dict[str, Any]:
    """The trainer state that `finish` wrote."""
    return json.loads((folder / TRAINER_STATE).read_text())


def prune(root: Path, keep: int, best_step: int | None = None) -> None:
    """Removes all but the newest `keep` checkpoints and the best one; keep <= 0 keeps all finished ones.

    Removes unfinished ones too: call it only while none is being written.
    """
    for path in root.glob("global_step_*.tmp"):
        shutil.rmtree(path)
    folders = _step_folders(root)
    for step, folder in folders[: -keep if keep > 0 else 0]:
        if step != best_step:
            shutil.rmtree(folder)

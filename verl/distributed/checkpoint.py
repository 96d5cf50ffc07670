"""Sharded asynchronous checkpoints (torch.distributed.checkpoint): atomic, resumable on another number of ranks.

global_step_<N>.tmp/ -> global_step_<N>/     renamed when everything, manifest last, is on disk
  actor/                .metadata, *.distcp  {"model": ..., "optimizer": ...}, no optimizer when saved model-only
  actor/rng_rank_<r>.pt random generator states of each rank
  actor/huggingface/    config, tokenizer, processor; weights after scripts/model_merger.py
  trainer_state.json    global_step and the loop's other state
  manifest.json         file name -> bytes and SHA-256
abandoned_<k>/          later steps of a run that went back, and damaged ones: set aside, never removed

Nothing in a checkpoint can run code when it is read back: index, states and generators are unpickled with a short list
of names.
"""

import io
import itertools
import json
import random
import re
import shutil
import socket
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem, WriteItem
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.storage import WriteResult

from verl.distributed.cpu_offload import PinnedBuffer
from verl.distributed.groups import new_cpu_group
from verl.distributed.optim import LOW_BITS, OLD_STATE, KahanAdamW, convert_compensation, rename_states
from verl.model.checkpoint_files import (
    MANIFEST,
    NUM_PARALLEL_FILES,
    IndexReader,
    check_files,
    describe_files,
    read_manifest,
    sync,
    write_json,
)
from verl.model.lora import has_adapters, is_adapter

TRAINER_STATE = "trainer_state.json"
STEP_FOLDER = re.compile(r"global_step_(\d+)")
INDEX = "actor/.metadata"
RNG_FILE = "rng_rank_{}.pt"
NOT_SHARED = "all machines must share the folder trainer.save_checkpoint_path"


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
        try:
            with ThreadPoolExecutor(NUM_PARALLEL_FILES) as pool:
                done.set_result([result for results in pool.map(write, range(num_files)) for result in results])
        except (OSError, RuntimeError) as error:  # torch raises the second on a full disk
            raise OSError(f"on {socket.gethostname()}: {error}") from error
        return done


def _num_elements(item: WriteItem) -> int:
    return item.tensor_data.chunk.sizes.numel() if item.tensor_data else 0


class ShardWriter:
    """Writes one rank's sharded state dict of model and optimizer in the background; all ranks make the same calls.

    `start` returns after a copy to pinned host memory, so training may go on. The memory is reused by later calls.
    """

    def __init__(self):
        # Its own gloo group: collectives of the thread must not interleave with training, and NCCL needs GPU tensors.
        self.group: Any = new_cpu_group() if dist.is_initialized() else None
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
        return "" if error is None else f"{type(error).__name__}: {error}"


class PlainLoadPlanner(DefaultLoadPlanner):
    """Loads what is no tensor, such as an optimizer's settings, as plain values; torch's own runs pickled code."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """As DefaultLoadPlanner, once the value is known to hold no code."""
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


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
    state, reader = _sharded_state_dict(model, optimizer), IndexReader(folder)
    try:
        names = reader.read_metadata().state_dict_metadata  # torch's loader hides why it cannot
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} cannot be loaded: {error}") from error
    states = state["optimizer"]["state"] if isinstance(optimizer, KahanAdamW) else {}
    if optimizer is not None:  # settings that the checkpoint does not know keep their values
        state["optimizer"]["param_groups"] = [
            {key: value for key, value in group.items() if f"optimizer.param_groups.{number}.{key}" in names}
            for number, group in enumerate(state["optimizer"]["param_groups"])
        ]
    is_old = bool(states) and any(name.endswith(f".{OLD_STATE}") for name in names)
    if is_old:
        rename_states(states, LOW_BITS, OLD_STATE)
    try:
        dcp.load(state, storage_reader=reader, planner=PlainLoadPlanner())
    except CheckpointException as error:  # a BaseException: it would pass every handler of the callers
        causes = "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in sorted(error.failures.items()))
        raise ValueError(f"{folder} cannot be loaded: {causes}") from error
    if is_old:
        print(f"Converting the states of adamw_bf16 in {folder}: they are of an older form", flush=True)  # noqa: T201
        rename_states(states, OLD_STATE, LOW_BITS)
        convert_compensation(states, state["model"])
    # Not strict, since only adapters may be there; names that are missing were refused above.
    set_model_state_dict(model, state["model"], options=StateDictOptions(strict=False))
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, state["optimizer"])


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
    torch.save(state, folder / RNG_FILE.format(rank))


def load_rng(folder: Path, rank: int) -> None:
    """Restores the generator states from `save_rng`; does nothing for a rank without a file."""
    file = folder / RNG_FILE.format(rank)
    if not file.is_file():
        return
    state = torch.load(file, weights_only=True)
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy(), *rest))
    random.setstate(state["python"])


def unfinished(root: Path, step: int) -> Path:
    """Folder in which the checkpoint of a step is written."""
    return root / f"global_step_{step}.tmp"


def read_step(folder: Path) -> int:
    """The step in a checkpoint's name."""
    return int(folder.name.removesuffix(".tmp").rpartition("_")[2])


def begin(root: Path, step: int) -> Path:
    """Makes an empty folder for the checkpoint of `step`, removing one of a killed run."""
    folder = unfinished(root, step)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def finish(folder: Path, trainer_state: dict[str, Any], ranks: Sequence[str] = ()) -> Path:
    """Writes state and manifest, syncs all files to disk and renames the folder; returns its final path.

    Args:
        ranks: name of each rank, which must have left its generators' file.

    Raises:
        ValueError: a file is not there, since another machine has written it elsewhere.
    """
    write_json(folder / TRAINER_STATE, trainer_state | ({"num_ranks": len(ranks)} if ranks else {}))
    needed = _indexed_files(folder) | {folder / name for name in _rng_files(len(ranks))}
    if missing := sorted(file for file in needed if not file.is_file()):
        absent = [name for name, file in zip(ranks, _rng_files(len(ranks)), strict=True) if folder / file in missing]
        who = f"{', '.join(absent)} wrote elsewhere: " if absent else ""
        raise ValueError(f"{who}{missing[0]} is not there; {NOT_SHARED}")
    files = sorted({path for path in folder.rglob("*") if path.is_file()} | needed)
    for path in files:
        sync(path)
    write_json(folder / MANIFEST, describe_files(folder, files))
    final = folder.with_suffix("")
    if final.exists():  # came there while the run went on
        set_aside(final.parent, [final])
    folder.rename(final)
    sync(final.parent)
    return final


def _indexed_files(folder: Path) -> set[Path]:
    """Indices, and the shards that they name: a shared disk may list a folder as it was seconds ago."""
    indices = {
        folder / INDEX,
        *folder.glob("*/.metadata"),
        *(f.parent / ".metadata" for f in folder.glob("*/*.distcp")),
    }
    files = set(indices)
    for index in filter(Path.is_file, indices):
        parts = IndexReader(index.parent).read_metadata().storage_data.values()
        files |= {index.parent / part.relative_path for part in parts}
    return files


def _rng_files(num_ranks: int) -> list[str]:
    return [f"actor/{RNG_FILE.format(rank)}" for rank in range(num_ranks)]


def check(folder: Path, with_content: bool = True) -> None:
    """Checks that the checkpoint is complete and, with `with_content`, that its digests match.

    Raises:
        ValueError: with the missing, truncated or altered file.
    """
    check_files(folder, with_content)
    listed = read_manifest(folder)
    if TRAINER_STATE not in listed:
        raise ValueError(f"{folder / MANIFEST} does not list {TRAINER_STATE}: the checkpoint is damaged")
    num_ranks = min(_read_state(folder).get("num_ranks", 0), len(listed))  # older ones do not know
    needed = [INDEX, *_rng_files(num_ranks)]
    if missing := [name for name in needed if name not in listed]:
        raise ValueError(f"{folder / MANIFEST} does not list {missing[0]}: the checkpoint lacks a machine's files")


def is_foreign(folder: Path) -> bool:
    """True for a step folder that this trainer did not write, such as EasyR1's."""
    marks = (folder / MANIFEST, folder / TRAINER_STATE)
    return not any(mark.exists() for mark in marks) and any(folder.iterdir())


def step_folders(root: Path) -> list[tuple[int, Path]]:
    """Step and folder of everything named as a finished checkpoint, oldest first."""
    if not root.is_dir():
        return []
    matches = [(STEP_FOLDER.fullmatch(path.name), path) for path in root.iterdir() if path.is_dir()]
    return sorted((int(match.group(1)), path) for match, path in matches if match)


def _is_whole(folder: Path) -> bool:
    try:
        check(folder, with_content=False)
    except ValueError:
        return False
    return True


def find_latest(root: Path, with_content: bool = True, origin: str | None = None) -> Path | None:
    """The newest checkpoint under `root` that passes `check`, or None; skipped ones are printed.

    Args:
        with_content: checks digests too.
        origin: of the branch that it must belong to, see `read_origin`; None for any.
    """
    for _, folder in reversed(step_folders(root)):
        try:
            if origin is not None and (is_foreign(folder) or read_origin(folder) != origin):
                continue
            check(folder, with_content)
        except ValueError as error:
            print(f"Skipping checkpoint: {error}", flush=True)  # noqa: T201
            continue
        return folder
    return None


def read_trainer_state(folder: Path) -> dict[str, Any]:
    """The trainer state that `finish` wrote."""
    return json.loads((folder / TRAINER_STATE).read_text())


def read_origin(folder: Path) -> str | None:
    """The checkpoint that the run of this one was told to start from, or None.

    Raises:
        ValueError: the state cannot be read.
    """
    return _read_state(folder).get("origin")


def _read_state(folder: Path) -> dict[str, Any]:
    """As read_trainer_state; ValueError whatever is wrong with it."""
    try:
        state = read_trainer_state(folder)
        if not isinstance(state, dict) or not isinstance(state.get("num_ranks", 0), int):
            raise ValueError("it is no trainer's state")
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / TRAINER_STATE} cannot be read: {error}") from error
    return state


def set_aside(root: Path, folders: Iterable[Path], logs: Iterable[Path] = ()) -> Path:
    """Moves checkpoints to a new folder `abandoned_<k>` of `root`, newest first; returns it.

    Args:
        logs: copied there before, so that whoever is cut off or finds the disk full has moved nothing without them.
    """
    number = next(number for number in itertools.count(1) if not (root / f"abandoned_{number}").exists())
    place = root / f"abandoned_{number}"
    place.mkdir()
    for log in logs:
        shutil.copy2(log, place)
    for folder in sorted(folders, key=read_step, reverse=True):
        folder.rename(place / folder.name)
    sync(root)
    return place


def prune(root: Path, keep: int, spared: Collection[int] = (), step: int | None = None) -> None:
    """Removes all whole checkpoints but the newest `keep` and the spared steps; keep <= 0 keeps all.

    Damaged and foreign ones, and those after `step` if given, neither count nor go. Unfinished ones go: call it only
    while none is being written.

    Raises:
        OSError: some could not be removed.
    """
    faults: list[OSError] = []

    def remove(folder: Path) -> None:
        try:
            shutil.rmtree(folder)
        except OSError as error:
            faults.append(error)

    for folder in root.glob("global_step_*.tmp"):
        remove(folder)
    known = [(number, folder) for number, folder in step_folders(root) if step is None or number <= step]
    whole = [(number, folder) for number, folder in known if not folder.is_symlink() and _is_whole(folder)]
    for number, folder in whole[: -keep if keep > 0 else 0]:
        going = unfinished(root, number)
        if number not in spared and not going.exists():
            folder.rename(going)  # in one step: a kill leaves no half of it
            remove(going)
    if faults:
        raise faults[0]

"""Checkpoints: sharded by torch.distributed.checkpoint, complete or absent, resumable on another number of ranks.

global_step_<N>.tmp/ -> global_step_<N>/     renamed when everything, manifest last, is on disk
  actor/                .metadata, *.distcp  {"model": ..., "optimizer": ...}
  actor/huggingface/    config, tokenizer, processor; weights after scripts/model_merger.py
  trainer_state.json    global_step and whatever else the loop must remember
  manifest.json         file name -> bytes
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from verl.lora import has_adapters, is_adapter

MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.json"
STEP_FOLDER = re.compile(r"global_step_(\d+)")


def _shards(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """This rank's part of the model, of a model with adapters these alone, and of the optimizer."""
    weights = get_model_state_dict(model)
    if has_adapters(model):
        weights = {name: weight for name, weight in weights.items() if is_adapter(name)}
    return {"model": weights, "optimizer": get_optimizer_state_dict(model, optimizer)}


def save_shards(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Writes this rank's part of the model and optimizer; all ranks must call it."""
    dcp.save(_shards(model, optimizer), checkpoint_id=folder)


def load_shards(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Reads this rank's part of the model and optimizer, whatever number of ranks wrote them; all must call it."""
    state = _shards(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"], options=StateDictOptions(strict=not has_adapters(model)))
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


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
    """An empty folder in which the checkpoint of `step` is written; leftovers of a killed run are removed."""
    folder = root / f"global_step_{step}.tmp"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def finish(folder: Path, trainer_state: dict[str, Any]) -> Path:
    """The final name of the checkpoint in `folder`, once state and manifest are written and all of it is on disk."""
    _write_json(folder / TRAINER_STATE, trainer_state)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        _fsync(path)
    _write_json(folder / MANIFEST, {str(path.relative_to(folder)): path.stat().st_size for path in files})
    final = folder.with_suffix("")
    shutil.rmtree(final, ignore_errors=True)
    folder.rename(final)
    _fsync(final.parent)
    return final


def check(folder: Path) -> None:
    """Passes if the checkpoint is complete.

    Raises:
        ValueError: naming the missing or short file.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise ValueError(f"{folder} has no {MANIFEST}: it was not written to its end")
    for name, size in json.loads(manifest.read_text()).items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            raise ValueError(f"{path} should have {size} bytes and has {found}: the checkpoint is damaged")


def _step_folders(root: Path) -> list[tuple[int, Path]]:
    """Step and folder of each finished checkpoint, oldest first; other names are not checkpoints."""
    if not root.is_dir():
        return []
    matches = [(STEP_FOLDER.fullmatch(path.name), path) for path in root.iterdir() if path.is_dir()]
    return sorted((int(match.group(1)), path) for match, path in matches if match)


def find_latest(root: Path) -> Path | None:
    """The newest complete checkpoint under `root`, or None; damaged ones are passed over with a printed word."""
    for _, folder in reversed(_step_folders(root)):
        try:
            check(folder)
        except ValueError as error:
            print(f"Skipping checkpoint: {error}", flush=True)  # noqa: T201
            continue
        return folder
    return None


def read_trainer_state(folder: Path) -> dict[str, Any]:
    """What `finish` was given."""
    return json.loads((folder / TRAINER_STATE).read_text())


def prune(root: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints and every unfinished one; keep <= 0 keeps all finished ones."""
    for path in root.glob("global_step_*.tmp"):
        shutil.rmtree(path)
    folders = _step_folders(root)
    for _, folder in folders[: -keep if keep > 0 else 0]:
        shutil.rmtree(folder)

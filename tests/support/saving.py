"""Savers over ranks without weights, and checkpoints as other programs write them."""

import dataclasses
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from verl.config.records import TrainerConfig
from verl.distributed import checkpoint
from verl.trainer.batches import Position
from verl.trainer.saver import CheckpointSaver, TrainState, find_start, restore


def write_index(folder: Path) -> None:
    """The index of no shards."""
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata({}, storage_data={})))


class Ranks:
    """Training ranks that write one small file; `fault` is what the writing comes to, or what it raises.

    Attributes:
        absent: files that are written to another machine's folder.
    """

    rank_names = ("actor rank 0 on left", "actor rank 1 on right")

    def __init__(self):
        self.absent: tuple[str, ...] = ()
        self.fault: Any = ""
        self.restored: list[str] = []

    def save(self, folder: str, model_only: bool) -> None:
        actor = Path(folder) / "actor"
        actor.mkdir()
        (actor / "weights").write_text(folder)
        write_index(actor)
        for rank in range(len(self.rank_names)):
            (actor / checkpoint.RNG_FILE.format(rank)).write_text("state")
        for name in self.absent:
            (actor / name).unlink()

    def save_fault(self) -> list[str | None]:
        if isinstance(self.fault, BaseException):
            raise self.fault
        return [self.fault]

    def restore(self, folder: str, model_only: bool) -> None:
        self.restored.append(folder)


def settings(root: Path, **changes: Any) -> TrainerConfig:
    return dataclasses.replace(TrainerConfig(), save_checkpoint_path=str(root), **changes)


def start(root: Path, **changes: Any) -> CheckpointSaver:
    """The saver of a run that has found its start."""
    chosen = settings(root, **changes)
    saver = CheckpointSaver(root, [Ranks()], chosen)  # type: ignore[list-item]
    folder = find_start(chosen)
    batches: Any = SimpleNamespace(restore=lambda *_: None, position=Position())
    if folder is not None:
        restore(folder, saver, batches, saver.groups[0])
    saver.begin(folder)
    return saver


def save(saver: CheckpointSaver, *steps: int, score: float | None = None) -> None:
    for step in steps:
        saver.save(TrainState(step, Position(), 0.0), {}, score)
        saver.finish_pending()


def kept(root: Path) -> set[int]:
    return {step for step, _ in checkpoint.step_folders(root)}


def write_foreign(folder: Path) -> dict[str, bytes]:
    """As EasyR1 and the release write one."""
    (folder / "actor" / "huggingface").mkdir(parents=True)
    for name in ("actor/model_world_size_1_rank_0.pt", "actor/huggingface/config.json", "dataloader.pt"):
        (folder / name).write_text(name)
    return content(folder)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

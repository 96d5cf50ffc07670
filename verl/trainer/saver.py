"""Asynchronous checkpoint saving: one at a time, atomic, with retention of the newest and the best."""

import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl.config.records import ConfigError, TrainerConfig
from verl.distributed import checkpoint
from verl.distributed.single_controller import WorkerError, WorkerGroup
from verl.trainer.batches import BatchMaker, Position

MAX_POLL_S = 1.0


@dataclass(frozen=True)
class TrainState:
    """A resumed run's start, beside the ranks' own files: the trained steps, the place in the data, the KL weight."""

    step: int
    position: Position
    kl_coef: float

    def to_json(self) -> dict[str, Any]:
        """Its part of trainer_state.json; surplus groups have a file of their own."""
        return {"kl_coef": self.kl_coef, "num_drawn": self.position.num_drawn, "global_step": self.step}


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, with trainer.on_save_error=stop."""


class CheckpointSaver:
    """Saves worker groups and the trainer state.

    Args:
        root: folder of the run's checkpoints.
        groups: their workers have `save(folder, model_only)`, which returns once the state is copied, and
            `save_fault()`, the outcome of the writing.
        settings: save_limit, save_model_only, save_in_background, on_save_error.
    """

    def __init__(self, root: Path, groups: Sequence[WorkerGroup], settings: TrainerConfig):
        self.root, self.groups, self.settings = root, groups, settings
        self.best: dict[str, Any] | None = None
        self.saved_step = 0
        self.num_failed = 0
        self.fault = ""
        self.thread: threading.Thread | None = None

    def save(self, state: TrainState, config: dict[str, Any], score: float | None = None) -> None:
        """Starts the checkpoint of a state; returns once training may modify the weights.

        Args:
            state: of the trainer.
            config: of the run, serialisable as JSON.
            score: of a validation at this step; the highest marks the best checkpoint.

        Raises:
            CheckpointError: this or the previous checkpoint failed, with on_save_error=stop.
        """
        self.finish_pending()
        is_best = score is not None and (self.best is None or score > self.best["score"])
        best = {"step": state.step, "score": score} if is_best else self.best
        content = {"config": config, **state.to_json(), "best": best, "model_only": self.settings.save_model_only}
        try:
            folder = checkpoint.begin(self.root, state.step)
            state.position.write_surplus(folder)
        except OSError as error:
            self._report(state.step, str(error))
            return
        for group in self.groups:
            group.save(str(folder), self.settings.save_model_only)
        self.thread = threading.Thread(target=self._finalize, args=(folder, state.step, content), daemon=True)
        self.thread.start()
        if not self.settings.save_in_background:
            self.finish_pending()

    def finish_pending(self, blocking: bool = True) -> None:
        """Waits for the running checkpoint; if not `blocking`, only checks whether it has failed.

        Raises:
            CheckpointError: it failed, with on_save_error=stop.
        """
        if self.thread is None or not blocking and self.thread.is_alive():
            return
        self.thread.join()
        self.thread = None
        if fault := self.fault:
            self.fault = ""
            self._raise_or_warn(fault)

    def _finalize(self, folder: Path, step: int, state: dict[str, Any]) -> None:
        """Background thread: waits for the shards, then publishes the checkpoint and removes old ones."""
        try:
            fault = self._wait_for_shards()
            if not fault:
                checkpoint.finish(folder, state)
                self.saved_step, self.best = step, state["best"]
                checkpoint.prune(self.root, self.settings.save_limit, self.best["step"] if self.best else None)
        except (OSError, WorkerError) as error:
            fault = str(error)
        if fault:
            shutil.rmtree(folder, ignore_errors=True)
            self.fault = self._describe(step, fault)

    def _wait_for_shards(self) -> str:
        """The first error of any rank, or an empty text."""
        delay_s = 0.02
        for group in self.groups:
            faults: list[str | None] = [None]
            while None in faults:
                time.sleep(delay_s)
                delay_s = min(2 * delay_s, MAX_POLL_S)
                faults = group.save_fault()
            if wrong := next(filter(None, faults), ""):
                return wrong
        return ""

    def _describe(self, step: int, fault: str) -> str:
        free_gb = shutil.disk_usage(self.root).free / 2**30 if self.root.is_dir() else 0.0
        latest = checkpoint.find_latest(self.root, with_content=False)
        kept = f"the newest whole checkpoint is {latest}" if latest else "there is no whole checkpoint yet"
        return f"the checkpoint of step {step} could not be written ({free_gb:.2f} GiB free): {fault}; {kept}"

    def _report(self, step: int, fault: str) -> None:
        self._raise_or_warn(self._describe(step, fault))

    def _raise_or_warn(self, text: str) -> None:
        self.num_failed += 1
        if self.settings.on_save_error == "stop":
            raise CheckpointError(f"{text}; trainer.on_save_error=continue would go on")
        print(f"Warning: {text}; going on, as trainer.on_save_error=continue asks", flush=True)  # noqa: T201


def restore(folder: Path, saver: CheckpointSaver, batches: BatchMaker, actor: WorkerGroup) -> tuple[TrainState, str]:
    """Brings saver, batches and ranks to a checkpoint; returns its state, and a note on what it lacks."""
    content = checkpoint.read_trainer_state(folder)
    saver.saved_step, saver.best = content["global_step"], content.get("best")
    batches.restore(folder, content["num_drawn"])
    is_model_only = content.get("model_only", False)
    actor.restore(str(folder), is_model_only)
    note = "; it holds no optimizer, which starts anew" if is_model_only else ""
    return TrainState(content["global_step"], batches.position, content.get("kl_coef", 0.0)), note


def find_start(settings: TrainerConfig) -> Path | None:
    """The checkpoint to resume from: the configured one, else the newest complete one, else None.

    Raises:
        ConfigError: the given one is damaged or incomplete.
    """
    if settings.load_checkpoint_path:
        folder = Path(settings.load_checkpoint_path)
        try:
            checkpoint.check(folder)
        except ValueError as error:
            raise ConfigError([f"trainer.load_checkpoint_path: {error}"]) from error
        return folder
    return checkpoint.find_latest(Path(settings.save_checkpoint_path)) if settings.find_last_checkpoint else None

"""Asynchronous checkpoint saving: one at a time, atomic, with retention of the newest and the best.

Where a run begins is decided by `find_start`, and `CheckpointSaver.begin` sets aside what its own steps would meet:
the later steps of a branch that it leaves, and damaged checkpoints.
"""

import atexit
import fcntl
import math
import os
import shutil
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from verl.config.records import ConfigError, TrainerConfig
from verl.distributed import checkpoint
from verl.distributed.single_controller import WorkerError, WorkerGroup
from verl.trainer.batches import BatchMaker, Position

MAX_POLL_S = 1.0
LOCK_FILE = "trainer.lock"

_locks: dict[Path, IO[str]] = {}
"""Open lock files of this process by folder; the system releases them when the process ends, however it ends."""
HOLDER = "trainer process"
"""First words of a lock file, for as long as its process has not ended by itself."""


def lock_folder(root: Path) -> None:
    """Reserves a run's folder for this process until its end; says so when the trainer before was killed there.

    Raises:
        ConfigError: another trainer is at work there, which is named, or the folder cannot be written.
    """
    key = f"trainer.save_checkpoint_path = {str(root)!r}"
    if root in _locks:
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        file = (root / LOCK_FILE).open("a+")
    except OSError as error:
        raise ConfigError([f"{key}: cannot be written ({error.strerror}); name another folder"]) from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not shared with forked children
    except OSError as error:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise ConfigError([f"{key}: {holder} trains there; wait for its end, or name another folder"]) from error
    file.seek(0)
    if (before := file.read().strip(",\n")).startswith(HOLDER):
        print(f"Warning: {before}, was killed: it left {root} without an end; what it saved is whole", flush=True)  # noqa: T201
    file.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"{HOLDER} {os.getpid()} of {socket.gethostname()}, since {since},\n")
    file.flush()
    _locks[root] = file
    atexit.register(_mark_end, file, os.getpid())


def _mark_end(file: IO[str], owner: int) -> None:
    """Empties the lock file of a process that ends by itself; a forked child is not its owner."""
    if os.getpid() == owner:
        with suppress(OSError):  # a full disk, or a folder that is gone
            file.truncate(0)


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
        settings: save_limit, save_model_only, save_in_background, on_save_error, load_checkpoint_path.
        identity: fingerprints of the data and models, kept in every checkpoint.
    """

    def __init__(
        self,
        root: Path,
        groups: Sequence[WorkerGroup],
        settings: TrainerConfig,
        identity: dict[str, str | None] | None = None,
    ):
        self.root, self.groups, self.settings, self.identity = root, groups, settings, identity
        self.best: dict[str, Any] | None = None
        self.origin = origin_of(settings)
        self.saved_step = 0
        self.num_failed = 0
        self.fault = ""
        self.death: WorkerError | None = None
        self.thread: threading.Thread | None = None
        self.is_stalled = False

    def begin(self, start: Path | None) -> None:
        """Sets aside, with a copy of the logs, the checkpoints that the run's own would meet or be mixed with.

        Args:
            start: checkpoint that the run goes on from; of its folder, only later ones are in the way.

        Raises:
            CheckpointError: they cannot be moved, for a full disk, say; what has been moved is whole.
        """
        is_own = start is not None and start.resolve().parent == self.root.resolve()
        others = [
            folder
            for step, folder in checkpoint.step_folders(self.root)
            if step > self.saved_step or not is_own and not checkpoint.is_foreign(folder)
        ]
        if others:
            names = ", ".join(folder.name for folder in others)
            try:
                place = checkpoint.set_aside(self.root, others, sorted(self.root.glob("*.jsonl")))
            except OSError as error:
                raise CheckpointError(
                    f"trainer.save_checkpoint_path = {str(self.root)!r}: {names} could not be moved out of the way "
                    f"({error}); make room or move them yourself, and give the same command again"
                ) from error
            print(f"The run goes on after step {self.saved_step}: {names} were moved to {place}", flush=True)  # noqa: T201

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
        best = {"step": state.step, "score": score} if self._is_best(score) else self.best
        content = {"config": config, **state.to_json(), "best": best, "model_only": self.settings.save_model_only}
        content |= {"origin": self.origin, "identity": self.identity}
        try:
            folder = checkpoint.begin(self.root, state.step)
            state.position.write_surplus(folder)
        except (OSError, RuntimeError) as error:  # torch.save raises the second on a full disk
            shutil.rmtree(checkpoint.unfinished(self.root, state.step), ignore_errors=True)
            self._raise_or_warn(self._describe(state.step, str(error)))
            return
        for group in self.groups:
            group.save(str(folder), self.settings.save_model_only)
        self.thread = threading.Thread(target=self._finalize, args=(folder, state.step, content), daemon=True)
        self.thread.start()
        if not self.settings.save_in_background:
            self.finish_pending()

    def _is_best(self, score: float | None) -> bool:
        """True for a score above the best one; NaN and infinity, of a broken reward, are none."""
        if score is None or not math.isfinite(score):
            return False
        return self.best is None or not math.isfinite(self.best["score"]) or score > self.best["score"]

    def finish_pending(self, blocking: bool = True) -> None:
        """Waits for the running checkpoint; if not `blocking`, only checks whether it has failed.

        Raises:
            CheckpointError: it failed, with on_save_error=stop; or it is not written within the watchdog's limit, and
                none can be any more.
            WorkerError: a rank died while it was written, so that none can be saved any more.
        """
        if self.thread is None or not blocking and self.thread.is_alive():
            return
        limit_s = self.settings.watchdog_timeout_s
        self.thread.join(0 if self.is_stalled else limit_s)
        if self.thread.is_alive():
            self.num_failed += not self.is_stalled
            self.is_stalled = True
            raise CheckpointError(
                f"{self.root} has not taken a checkpoint within {limit_s:g} s (trainer.watchdog_timeout_s); see "
                f"whether its disk answers; the same command goes on after step {self.saved_step}"
            )
        self.thread = None
        if death := self.death:
            self.death = None
            self.num_failed += 1
            raise death
        if fault := self.fault:
            self.fault = ""
            self._raise_or_warn(fault)

    def check_saved(self, step: int) -> None:
        """Passes if the last trained step is saved, whatever trainer.on_save_error says.

        Raises:
            CheckpointError: it is not.
        """
        if self.saved_step < step:
            raise CheckpointError(
                f"step {step}, the run's last, could not be saved, and what was trained since step {self.saved_step} "
                f"is lost; make room in {self.root} and give the same command again"
            )

    def _finalize(self, folder: Path, step: int, state: dict[str, Any]) -> None:
        """Background thread: waits for the shards, then publishes the checkpoint and removes old ones."""
        try:
            fault = self._wait_for_shards()
            if not fault:
                checkpoint.finish(folder, state)
                self.saved_step, self.best = step, state["best"]
        except WorkerError as error:
            self.death, fault = error, str(error)
        except Exception as error:  # noqa: BLE001 -- a thread's exceptions are seen by nobody else
            fault = f"{type(error).__name__}: {error}"
        if fault:
            shutil.rmtree(folder, ignore_errors=True)
            self.fault = fault  # should its description fail
            self.fault = self._describe(step, fault)
        else:
            self._prune(step)

    def _prune(self, step: int) -> None:
        """Removes old checkpoints; what cannot be removed is said, for the new one is whole all the same."""
        spared = {self.best["step"]} if self.best else set()
        if start := checkpoint.STEP_FOLDER.fullmatch(self.origin or ""):
            spared.add(int(start.group(1)))
        try:
            checkpoint.prune(self.root, self.settings.save_limit, spared, step)
        except OSError as error:
            print(f"Warning: old checkpoints could not be removed after step {step}: {error}", flush=True)  # noqa: T201

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

    def _raise_or_warn(self, text: str) -> None:
        self.num_failed += 1
        if self.settings.on_save_error == "stop":
            raise CheckpointError(f"{text}; trainer.on_save_error=continue would go on")
        print(f"Warning: {text}; going on, as trainer.on_save_error=continue asks", flush=True)  # noqa: T201


def restore(folder: Path, saver: CheckpointSaver, batches: BatchMaker, actor: WorkerGroup) -> tuple[TrainState, str]:
    """Brings saver, batches and ranks to a checkpoint; returns its state, and a note on what it lacks."""
    content = checkpoint.read_trainer_state(folder)
    saver.saved_step, saver.best = content["global_step"], _known_best(folder, content, saver.identity or {})
    saver.origin = saver.origin or content.get("origin")
    batches.restore(folder, content["num_drawn"])
    is_model_only = content.get("model_only", False)
    actor.restore(str(folder), is_model_only)
    note = "; it holds no optimizer, which starts anew" if is_model_only else ""
    return TrainState(content["global_step"], batches.position, content.get("kl_coef", 0.0)), note


def _known_best(folder: Path, content: dict[str, Any], identity: dict[str, str | None]) -> dict[str, Any] | None:
    """The best checkpoint so far, if it still is there and was measured on the same rows."""
    best, rows = content.get("best"), (content.get("identity") or {}).get("val_data")
    if best is None or rows not in (None, identity.get("val_data")):
        return None
    return best if (folder.parent / f"global_step_{best['step']}").is_dir() else None


def origin_of(settings: TrainerConfig) -> str | None:
    """Name of the checkpoint that trainer.load_checkpoint_path asks to start from: of a folder beside the new ones
    the name alone, so that the run's folder can be moved."""
    if not settings.load_checkpoint_path:
        return None
    start, root = Path(settings.load_checkpoint_path).resolve(), Path(settings.save_checkpoint_path).resolve()
    return start.name if start.parent == root else str(start)


def find_start(settings: TrainerConfig) -> Path | None:
    """The checkpoint to go on from: the newest whole one of this run, else the configured one, else None.

    With load_checkpoint_path, checkpoints of this run are those that began there; with find_last_checkpoint=false
    none is looked for.

    Raises:
        ConfigError: the given one is damaged, incomplete or of another program; or checkpoints of another program
            stand in the way of the run's own.
    """
    root, start = Path(settings.save_checkpoint_path), None
    if settings.find_last_checkpoint:
        start = checkpoint.find_latest(root, origin=origin_of(settings))
    if start is not None and settings.load_checkpoint_path:
        print(  # noqa: T201
            f"This run began at {settings.load_checkpoint_path} and goes on from {start}; "
            "trainer.find_last_checkpoint=false begins there again",
            flush=True,
        )
    elif settings.load_checkpoint_path:
        start = Path(settings.load_checkpoint_path)
        _check_given(start)
    first = checkpoint.read_trainer_state(start)["global_step"] if start is not None else 0
    foreign = [
        folder for step, folder in checkpoint.step_folders(root) if step > first and checkpoint.is_foreign(folder)
    ]
    if foreign:
        advice = f"{_merge_advice(foreign[-1])}; else name another folder, or move it away"
        raise ConfigError([f"trainer.save_checkpoint_path = {str(root)!r}: {advice}"])
    return start


def _check_given(folder: Path) -> None:
    try:
        if folder.is_dir() and checkpoint.is_foreign(folder):
            raise ValueError(_merge_advice(folder))
        checkpoint.check(folder)
    except ValueError as error:
        raise ConfigError([f"trainer.load_checkpoint_path: {error}"]) from error


def _merge_advice(folder: Path) -> str:
    """Way on from a checkpoint of EasyR1 or of SpatialThinker's release."""
    return (
        f"{folder} was not written by this trainer, and a run cannot go on from it; to start from its weights, "
        f"run python scripts/model_merger.py --local_dir {folder / 'actor'} and set worker.actor.model.model_path="
        f"{folder / 'actor' / 'huggingface'}"
    )

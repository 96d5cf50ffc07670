"""Recorder: hands a run's rollouts to a process of lowest priority, which reads and writes them beside training.

A fault of the disk or of that process is said once and counted; it never ends the run. Files appear whole or not at
all, and what is recorded are the numbers of the update itself.
"""

import json
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from verl.model.videos import Video
from verl.trainer.recording.answered import Answered
from verl.trainer.recording.background import Background
from verl.trainer.recording.files import drop_after, step_file, write_whole
from verl.trainer.recording.pictures import choose_frames, store_frame, store_picture
from verl.trainer.recording.selection import Rule, choose_groups
from verl.trainer.recording.table import write_step

VERSION = 1
FOLDER = "rollouts"
MAX_WAITING = 3
"""Steps that may wait to be written; a further one is not recorded, since memory holds all its pictures."""
CLOSE_S = 120.0
"""Limit of the wait for the last steps at the end of a run."""
CHUNK = 256
"""Responses that are read at a time."""

Describe = Callable[[Sequence[tuple[str, Any, str]]], list[dict[str, Any]]]
"""(response, ground truth, problem) of each response -> failure, answer, boxes, iou_mean, signs; picklable."""
Labels = Callable[[str], tuple[str | None, str | None]]
"""Row id -> (source, category)."""


@dataclass
class _Step:
    """A step on its way to its file."""

    kind: str
    number: int
    batches: list[Answered]
    faults: list[str] = field(default_factory=list)


class Recorder:
    """A recorder of one run.

    Args:
        run: folder of the run; None records nothing.
        rule: trainer.rollouts_to_keep.
        with_tokens: trainer.rollouts_tokens.
        describe: reads responses, in the background process; None reads none.
        labels: by kind of rollouts, train and val.
        max_response_length: R, the length limit in tokens.
        reward: name, for about.json.
        prepare: called once in the background process, to load what `describe` needs.
    """

    def __init__(
        self,
        run: Path | None = None,
        rule: Rule = "none",
        with_tokens: bool = False,
        describe: Describe | None = None,
        labels: Mapping[str, Labels] | None = None,
        max_response_length: int = 0,
        reward: str = "",
        prepare: Callable[[], Any] = list,
    ):
        self.is_on = run is not None and rule != "none"
        self.folder = (run or Path()) / FOLDER
        self.rule, self.with_tokens, self.describe = rule, with_tokens, describe
        self.labels, self.max_response_length = labels or {}, max_response_length
        self.about: dict[str, Any] = {"version": VERSION, "reward": reward, "rule": rule, "parts": []}
        self.background = Background(prepare)
        self.pictures: dict[tuple[str, str], list[str]] = {}  # names by kind and row id
        self.jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self.thread: threading.Thread | None = None
        self.step: _Step | None = None
        self.num_sent = self.num_written = self.num_failed = self.num_dropped = 0
        self.said: set[str] = set()
        self.read_last: list[Mapping[str, Any]] = []
        """Descriptions of the training step that was read last."""

    def begin(self, step: int | None) -> None:
        """Starts recording; what is there of steps after this one is void, None leaves all as it is."""
        if self.is_on and self.thread is None:
            self.background.start()
            self.jobs.put(partial(self._begin, step))
            self.thread = threading.Thread(target=self._work, daemon=True, name="recorder")
            self.thread.start()

    def read(self, kind: str, step: int, batches: Sequence[Answered]) -> None:
        """Takes a step's responses and begins to read them; `write` follows when all its numbers are there."""
        self.step = None
        if not self.is_on:
            return
        self.begin(None)
        if (waiting := self.num_sent - self.num_written) >= MAX_WAITING:
            self.num_dropped += 1
            self._say(
                "slow",
                f"the rollouts of {kind} step {step} were not recorded: those of {waiting} steps still wait for "
                f"{self.folder}; a faster disk, a free processor or trainer.rollouts_to_keep=odd helps",
            )
            return
        self.step = _Step(kind, step, list(batches))
        self.jobs.put(partial(self._describe, self.step))

    def write(self) -> None:
        """Writes the step that was read last, whose tensors must not change any more."""
        if self.step is not None:
            self.num_sent += 1
            self.jobs.put(partial(self._write, self.step))
            self.step = None

    def append(self, path: Path, line: str) -> None:
        """Appends a line to a file of the recording, after what has been handed over so far."""
        if self.is_on:
            self.begin(None)
            self.jobs.put(partial(self._append, path, line))

    def metrics(self) -> dict[str, float]:
        """Steps that could not be recorded so far, or not in full."""
        if not self.is_on:
            return {}
        return {"recording/failed_steps": self.num_failed, "recording/dropped_steps": self.num_dropped}

    def close(self) -> None:
        """Waits for the last steps, within a limit, and ends thread and process."""
        if self.thread is not None:
            self.jobs.put(None)
            self.thread.join(CLOSE_S)
            if self.thread.is_alive():
                self._say("end", f"{self.folder} has not taken the last rollouts within {CLOSE_S:g} s; they are lost")
            self.thread = None
        self.background.close()

    def _work(self) -> None:
        """The thread: one job after the other."""
        while (job := self.jobs.get()) is not None:
            job()
            del job  # its tensors and pictures

    def _begin(self, step: int | None) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if step is not None:
                drop_after(self.folder, step)
            self._write_about()
        except OSError as error:
            self._say("folder", f"{self.folder} cannot be written: {error}; training goes on")

    def _write_about(self) -> None:
        text = json.dumps(self.about) + "\n"
        write_whole(self.folder / "about.json", lambda place: place.write_text(text))

    def _append(self, path: Path, line: str) -> None:
        try:
            with path.open("a") as file:
                file.write(line)
        except OSError as error:
            self._say("append", f"{path} cannot be written: {error}; training goes on")

    def _describe(self, step: _Step) -> None:
        """Reads the responses of a step; without it its file says less."""
        if self.describe is None:
            return
        try:
            for batch in step.batches:
                items = batch.items()
                chunks = [items[start : start + CHUNK] for start in range(0, len(items), CHUNK)]
                batch.descriptions = [each for chunk in chunks for each in self.background(self.describe, chunk)]
            if step.kind == "train":
                self.read_last = [each for batch in step.batches for each in batch.descriptions]
        except Exception as error:  # noqa: BLE001  a thread's exceptions are seen by nobody else
            step.faults.append(f"{type(error).__name__}: {error}")

    def _write(self, step: _Step) -> None:
        try:
            batches = []
            for answered in step.batches:
                batch = answered.to_batch(self.max_response_length, self.with_tokens)
                batch.groups |= self._label(step.kind, answered, self._choose(answered))
                batches.append(batch)
            path = step_file(self.folder, step.kind, step.number)
            parts = self.background(write_step, path, step.kind, step.number, batches)
            if new := [name for name in parts if name not in self.about["parts"]]:
                self.about["parts"] += new
                self._write_about()
        except Exception as error:  # noqa: BLE001  a thread's exceptions are seen by nobody else
            step.faults.append(f"{type(error).__name__}: {error}")
        self.num_written += 1
        if step.faults:
            self.num_failed += 1
            self._say(
                "fault",
                f"the rollouts of {step.kind} step {step.number} were not recorded in full ({'; '.join(step.faults)})"
                "; training goes on, and recording/failed_steps counts such steps",
            )

    def _choose(self, answered: Answered) -> list[str]:
        """Reason to keep each group; empty for those that are not."""
        return choose_groups(
            self.rule,
            [str(uid) for uid in answered.column("uid")],
            answered.scores["overall"],
            answered.advantages(),
            answered.has_failed(),
            answered.is_truncated(self.max_response_length),
        )

    def _label(self, kind: str, answered: Answered, kept: list[str]) -> dict[str, list[Any]]:
        """Columns of the groups: why they are kept, their pictures' names, source and category."""
        uids, labels = [str(uid) for uid in answered.column("uid")], self.labels.get(kind)
        found = [labels(uid) if labels else (None, None) for uid in uids]
        rows = zip(uids, answered.column("images"), answered.videos(), kept, strict=True)
        pictures = [self._store(kind, uid, images, videos) if why else [] for uid, images, videos, why in rows]
        sources, categories = [source for source, _ in found], [category for _, category in found]
        return {"kept": kept, "images": pictures, "source": sources, "category": categories, "uid": uids}

    def _store(self, kind: str, uid: str, images: Sequence[bytes], videos: Sequence[Video]) -> list[str]:
        """Names of a row's images and of some frames of its videos, which are stored when the row is first met."""
        if (kind, uid) not in self.pictures:
            folder = self.folder / "images"
            names = [self.background(store_picture, folder, image) for image in images]
            frames = (frame for video in videos for frame in choose_frames(video))
            names += [self.background(store_frame, folder, frame) for frame in frames]
            self.pictures[kind, uid] = names
        return self.pictures[kind, uid]

    def _say(self, kind: str, text: str) -> None:
        """Prints a warning, the first of its kind."""
        if kind not in self.said:
            self.said.add(kind)
            with suppress(OSError):  # of a closed pipe
                print(f"Warning: {text}", flush=True)  # noqa: T201

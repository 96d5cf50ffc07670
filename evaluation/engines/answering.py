"""From an engine's answers to lines of the journal, kept through signals, full disks and closed pipes."""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from evaluation.benchmarks.samples import Sample
from evaluation.engines.local import Answer, Backend
from evaluation.engines.stopping import Stopped, StopSignal
from evaluation.journal import AnswerJournal, Record

BYTES_PER_ANSWER = 1 << 16
"""Room on the disk for an answer under way: one of 2,048 tokens and its prompt take a fourth of it."""


class Reserve:
    """Room on the journal's disk that answers under way get once the disk is full."""

    def __init__(self, folder: Path, num_answers: int) -> None:
        """Take the room. Errors: ValueError for a folder that cannot be written or has no room."""
        self._file: IO[Any] | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
            os.posix_fallocate(self._file.fileno(), 0, num_answers * BYTES_PER_ANSWER)
        except OSError as error:
            self.give_up()
            raise ValueError(f"--output_dir {folder} cannot be written: {error.strerror}; choose another") from error

    @property
    def is_given_up(self) -> bool:
        """True once the disk was full."""
        return self._file is None

    def give_up(self) -> None:
        """Free the room; the file has no name and goes with its descriptor."""
        if self._file is not None:
            self._file.close()
            self._file = None


def journal_answers(
    samples: Sequence[Sample],
    backend: Backend,
    journal: AnswerJournal,
    grade: Callable[[Sample, Answer], Record],
    reserve: Reserve,
    stop: StopSignal,
) -> None:
    """Request the answers and write each to the journal at once.

    After a signal and on a full disk nothing more is requested, and what is under way is waited for and written.
    Errors: Stopped; OSError for a journal that cannot be written.
    """
    from tqdm import tqdm

    fault: OSError | None = None
    unwritten: list[Record] = []

    def waiting() -> Iterator[Sample]:
        for sample in samples:
            if stop.signum is not None or fault is not None:
                return
            yield sample

    def write(record: Record) -> None:
        nonlocal fault
        try:
            journal.add(record)
        except OSError as error:
            fault = fault or error
            if reserve.is_given_up:
                unwritten.append(record)
                return
            reserve.give_up()
            write(record)

    bar = tqdm(total=len(samples), desc=journal.settings["dataset"], unit="item")
    try:
        with stop.asking(backend.stop):
            for sample, answer in backend.answer(waiting()):
                write(grade(sample, answer))
                try:
                    bar.update()
                except OSError:  # a closed pipe: the answers are worth more than the bar
                    bar.disable = True
    except Exception:
        if stop.signum is None:
            raise
        # The signal has reached the engine's processes, too.
    with suppress(OSError):
        bar.close()
    for record in unwritten:  # there may be room by now
        journal.add(record)
    if fault is not None:
        raise fault
    if stop.signum is not None and not all(sample.id in journal.records for sample in samples):
        raise Stopped

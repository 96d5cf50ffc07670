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

RESERVE_BYTES = 2 << 20
"""Room on the disk for answers under way: for 32 of them 64 KiB each, of which 2,048 tokens and a prompt take 16."""


class Reserve:
    """Room on a folder's disk that answers under way get once the disk is full."""

    def __init__(self, folder: Path) -> None:
        """Take the room. Errors: ValueError for a folder that cannot be written or has no room."""
        self._file: IO[Any] | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
            os.posix_fallocate(self._file.fileno(), 0, RESERVE_BYTES)
        except OSError as error:
            self.give_up()
            raise ValueError(f"--output_dir {folder} cannot be written: {error.strerror}; choose another") from error

    def give_up(self) -> bool:
        """Free the room, since the file has no name and goes with its descriptor; True where there was any."""
        if self._file is None:
            return False
        self._file.close()
        self._file = None
        return True


def journal_answers(
    samples: Sequence[Sample],
    backend: Backend,
    journal: AnswerJournal,
    grade: Callable[[Sample, Answer], Record],
    stop: StopSignal,
) -> None:
    """Request the answers and write each to the journal at once.

    After a signal and on a full disk nothing more is requested, and what is under way is waited for and written.
    Errors: Stopped, which names the engine's fault after a signal; ValueError for a journal that cannot be written.
    """
    from tqdm import tqdm

    reserve = Reserve(journal.path.parent)
    end_early: Callable[[], None] = getattr(backend, "stop", lambda: None)
    fault: OSError | None = None
    ended_by: Exception | None = None
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
            end_early()
            if reserve.give_up():
                write(record)
            else:
                unwritten.append(record)

    bar = tqdm(total=len(samples), desc=journal.settings["dataset"], unit="item")
    try:
        with stop.asking(end_early):
            for sample, answer in backend.answer(waiting()):
                write(grade(sample, answer))
                try:
                    bar.update()
                except OSError:  # a closed pipe: the answers are worth more than the bar
                    bar.disable = True
    except Exception as error:
        if stop.signum is None:
            raise
        ended_by = error  # by the signal, most of the time: it has reached the engine's processes, too
    finally:
        reserve.give_up()
        with suppress(OSError):
            bar.close()
    if fault is not None:
        with suppress(OSError):  # there may be room by now
            while unwritten:
                journal.add(unwritten[-1])
                unwritten.pop()
        lost = f"{len(unwritten)} answers are lost; " if unwritten else ""
        raise ValueError(f"{journal.path} cannot be written: {fault.strerror}; {lost}make room") from fault
    if stop.signum is not None and not all(sample.id in journal.records for sample in samples):
        raise Stopped(f" ({type(ended_by).__name__}: {ended_by})" if ended_by else "") from ended_by

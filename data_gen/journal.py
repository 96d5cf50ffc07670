"""The truth about a run: a journal of outcomes; CSV, parquet and reports are made from it.

Every line behind the settings is one outcome of one image (or record); its newest line counts.

Answers that are paid for must find room: a run over a model keeps a reserve on the disk. When the disk is full, the
reserve is given up for the answers in flight, `is_full` is set, and the run sends no further requests.
"""

import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from spatialthinker.storage.files import DISK_IS_FULL
from spatialthinker.storage.journal import Journal, JournalFault, Line, is_journal, parse_line, read_lines

ACCEPTED, QUARANTINED, FAILED = "accepted", "quarantined", "error"
"""accepted: a row; quarantined: no row, with a reason, and not asked again; error: asked again by the next run."""

RESERVE_BYTES = 1 << 16
"""Room on the disk for each answer under way; a line has 5 to 15 kB."""

DISK_WAIT_S = 600.0
"""Wait for disk space where other programs have used up the reserve; answers stay in memory meanwhile."""

_DISK_RETRY_S = 5.0
_SYNC_S = 1.0


@dataclass(frozen=True)
class Entry:
    """Index entry of a journal line."""

    status: str
    asked: tuple[str, str] | None
    """Category and level that were asked for."""
    got: tuple[str, str] | None
    """Category and level of the accepted row."""


class SceneJournal(Journal):
    """One run's outcomes by the lines' `key`, which names an image or a record; opening it locks it."""

    def __init__(self, path: Path, settings: Line, is_overwritten: bool = False, reserve_bytes: int = 0) -> None:
        """Open or go on with a journal.

        Raises JournalFault where it is something else, belongs to other settings, is in use, or finds no room for
        the reserve.
        """
        super().__init__(path)
        self.entries: dict[str, Entry] = {}
        self.cost_usd = 0.0
        self.is_full = False
        if path.is_file() and not is_journal(path):
            raise JournalFault(f"{path} is there and no journal of this program; name another output")
        self.open()
        self._synced = time.monotonic()
        try:
            self._reserve = self._take_reserve(reserve_bytes)
            differences, lines = self.begin(settings, is_overwritten)
            if differences:
                raise JournalFault(
                    f"{path} was written with other settings ({'; '.join(differences)}); name another --out, or pass "
                    "--overwrite to start over and lose it"
                )
            for line in lines:
                self._note(check_outcome(path, line))
        except BaseException:
            os.close(self._fd)
            raise

    def _take_reserve(self, num_bytes: int) -> Any:
        if not num_bytes:
            return None
        reserve = tempfile.TemporaryFile(dir=self.path.parent)  # noqa: SIM115 -- nameless: it goes with the process
        try:
            os.posix_fallocate(reserve.fileno(), 0, num_bytes)
        except OSError as error:
            reserve.close()
            raise JournalFault(
                f"{self.path.parent} has no room for {num_bytes / 1e6:.0f} MB of answers: {error.strerror}"
            ) from error
        return reserve

    def _note(self, line: Line) -> None:
        record = line.get("record")
        got = (record["category"], record["level"]) if record and line["status"] == ACCEPTED else None
        asked = tuple(line["asked"]) if line.get("asked") else None
        self.entries[line["key"]] = Entry(line["status"], asked, got)
        self.cost_usd += line.get("cost_usd", 0.0)

    def is_settled(self, key: str) -> bool:
        """True for an image or record with a final outcome."""
        entry = self.entries.get(key)
        return entry is not None and entry.status != FAILED

    def add(self, line: Line) -> None:
        """Append one outcome."""
        self.append(line)
        self._note(line)

    def outcomes(self) -> Counter[str]:
        """Number of images by status."""
        return Counter(entry.status for entry in self.entries.values())

    def close(self) -> None:
        """Hand the lines to the disk and let others open the journal."""
        if self._reserve is not None:
            self._reserve.close()
        super().close()

    def __enter__(self) -> "SceneJournal":
        return self

    def append(self, line: Line) -> None:
        """Append one line, if need be in the room of the reserve. Raises JournalFault where no room is to be had."""
        deadline = time.monotonic() + DISK_WAIT_S
        while True:
            try:
                super().append(line)
                break
            except OSError as error:
                if error.errno not in DISK_IS_FULL:
                    raise
                if self._reserve is not None:
                    self._reserve.close()
                    self._reserve, self.is_full = None, True
                elif not self.is_full or time.monotonic() > deadline:
                    raise JournalFault(f"{self.path} cannot be written: {error.strerror}") from error
                else:
                    print(f"the disk of {self.path} is full: waiting for room", file=sys.stderr)  # noqa: T201
                    time.sleep(_DISK_RETRY_S)
        if time.monotonic() - self._synced > _SYNC_S:
            os.fsync(self._fd)
            self._synced = time.monotonic()

    def check_room(self) -> None:
        """Raise JournalFault once the reserve had to be given up: nothing more may be asked."""
        if self.is_full:
            raise JournalFault(
                f"the disk of {self.path} is full; every answer so far is saved. Make room, then give the same "
                "command again"
            )


class _Record(Struct):
    category: str
    level: str


class _Outcome(Struct):
    """Keys of a line that this file reads."""

    key: str
    status: str
    index: int = 0
    cost_usd: float = 0.0
    asked: tuple[str, str] | None = None
    record: _Record | None = None


def check_outcome(path: Path, line: Line) -> Line:
    """The line of a journal; JournalFault where it is no outcome."""
    try:
        msgspec.convert(line, _Outcome)
    except msgspec.ValidationError as error:
        raise JournalFault(f"{path}: {str(line)[:80]} is no outcome ({error}); remove that line") from None
    return line


def newest_lines(path: Path) -> Iterator[Line]:
    """The newest line of each key in the order of the source; one line is held at a time."""
    place_of: dict[str, tuple[int, int]] = {}
    offset = 0
    with path.open("rb") as file:
        for line, raw in zip(read_lines(path), file, strict=False):
            if "key" in line:
                place_of[check_outcome(path, line)["key"]] = (line.get("index", 0), offset)
            offset += len(raw)
        for _, offset in sorted(place_of.values()):
            file.seek(offset)
            yield parse_line(file.readline())[0]

"""Journals: append-only files of JSON lines, the settings first and then a line an item.

A line is appended by one write and is complete or, after a kill, cut off at the end of the file, where the next run
removes it. `begin` returns in what the settings differ; what to do about it is the program's business.
"""

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Line = dict[str, Any]
_HEAD = b'{"settings": '


class JournalFault(ValueError):
    """A journal that cannot be used as asked; the message names the file and the way out."""


class Journal:
    """The file of a journal."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self) -> None:
        """Open the file for appending; where there is none, an empty one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)

    def begin(self, settings: Line, is_overwritten: bool = False) -> tuple[list[str], Iterator[Line]]:
        """Remove a cut-off line or everything, and write the settings into a file without any.

        Returns the differences to the settings that are there, and the lines behind them.
        """
        os.ftruncate(self._fd, 0 if is_overwritten else sum(map(len, whole_lines(self.path))))
        lines = read_lines(self.path)
        if (header := next(lines, None)) is None:
            self.append(header := {"settings": settings})
        return name_differences(header["settings"], settings), lines

    def append(self, line: Line) -> None:
        """Append one line, which survives a kill of this process from here on. Nothing of it stays after OSError."""
        data = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        end = os.fstat(self._fd).st_size
        if os.write(self._fd, data) < len(data):
            os.ftruncate(self._fd, end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        """Hand the lines to the disk."""
        os.fsync(self._fd)
        os.close(self._fd)

    def __exit__(self, *_: object) -> None:
        self.close()


def is_journal(path: Path) -> bool:
    """True for a journal file; an empty one, or one cut off in its first line, is one too."""
    with path.open("rb") as file:
        return _HEAD.startswith(file.read(len(_HEAD)))


def name_differences(found: Line, wanted: Line) -> list[str]:
    """Each setting that differs, with both values."""
    differing = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    return [f"{key}: {found.get(key)!r} there, {wanted.get(key)!r} now" for key in differing]


def whole_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file up to its last line end: what follows was cut off."""
    with path.open("rb") as file:
        yield from (raw for raw in file if raw.endswith(b"\n"))


def read_lines(path: Path) -> Iterator[Line]:
    """The complete lines of a journal, settings first. Raises JournalFault for one that is no JSON."""
    for number, raw in enumerate(whole_lines(path), 1):
        try:
            yield json.loads(raw)
        except json.JSONDecodeError as error:
            raise JournalFault(f"{path}, line {number}: {error}") from None

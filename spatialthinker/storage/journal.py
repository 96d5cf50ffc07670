"""Journals: append-only files of JSON lines, the settings first and then a line an item.

A line is appended by one write and is complete or, after a kill, cut off at the end of the file, where the next run
removes it. Its last key is a checksum of what stands before; journals from before there were checksums are read too.
An open journal is locked: two processes never write the same one. `begin` returns in what the settings differ; what
to do about it is the program's business.
"""

import errno
import fcntl
import json
import os
import re
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Line = dict[str, Any]
_HEAD = b'{"settings": '
_CHECKSUM = re.compile(rb', "crc32": "([0-9a-f]{8})"\}')
_CHECKSUM_BYTES = len(', "crc32": "00000000"}')


class JournalFault(ValueError):
    """A journal that cannot be used as asked; the message names the file and the way out."""


class Journal:
    """The file of a journal."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self) -> None:
        """Open the file for appending and lock it; where there is none, an empty one.

        Raises JournalFault where another process has it open, and for a pipe or a device.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = True
        except OSError as error:
            is_ours = error.errno != errno.EWOULDBLOCK  # else it is a file system without locks
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            os.close(self._fd)
            raise JournalFault(f"{self.path} is no regular file; name another output")
        # Another process may have renamed the file between its opening and its lock.
        is_ours = is_ours and self.path.exists() and os.path.samestat(os.fstat(self._fd), self.path.stat())
        if not is_ours:
            os.close(self._fd)
            raise JournalFault(f"{self.path} is being written by another process; let it end, or name another output")

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
        # A surrogate without its other half becomes its JSON escape.
        body = json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace")[:-1]
        data = body + f', "crc32": "{zlib.crc32(body):08x}"}}\n'.encode()
        end = os.fstat(self._fd).st_size
        if os.write(self._fd, data) < len(data):
            os.ftruncate(self._fd, end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        """Hand the lines to the disk, and let others open the journal."""
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


def parse_line(raw: bytes) -> tuple[Line, bool]:
    """A line without its checksum, and whether it had one. Raises ValueError for a damaged one."""
    raw = raw.rstrip(b"\n")
    match = _CHECKSUM.fullmatch(raw[-_CHECKSUM_BYTES:])
    if match is not None:
        raw = raw[:-_CHECKSUM_BYTES]
        if zlib.crc32(raw) != int(match[1], 16):
            raise ValueError("it does not match its checksum")
        raw += b"}"
    try:
        line = json.loads(raw)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(line, dict):
        raise ValueError("it is no JSON object")
    return line, match is not None


def read_lines(path: Path) -> Iterator[Line]:
    """The complete lines of a journal, settings first, without their checksums. Raises JournalFault for a damaged one.

    Behind the first line with a checksum every line must have one.
    """
    has_checksums = False
    for number, raw in enumerate(whole_lines(path), 1):
        try:
            line, has_checksum = parse_line(raw)
            has_checksums |= has_checksum
            if not has_checksum and (has_checksums or (number == 1 and line.keys() != {"settings"})):
                raise ValueError("its checksum is damaged")
            if number == 1 and not isinstance(line.get("settings"), dict):
                raise ValueError("it holds no settings")
        except ValueError as error:
            way_out = "name another output" if number == 1 else "remove that line, and its item is asked again"
            raise JournalFault(f"{path}, line {number}: not a line of a journal ({error}); {way_out}") from None
        yield line

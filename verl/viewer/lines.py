"""Files of one JSON object per line that a run still appends to."""

import json
from pathlib import Path
from stat import S_ISREG
from typing import Any

MAX_LINE_BYTES = 2**26
"""A longer line is no line of a log."""


class LineFile:
    """The objects of a file, read on from where the last reading ended.

    A file that was written anew, as a resumed run does, is read from its start. What is not an object is left out and
    named in `problems`; a last line without its end is read once it has one.
    """

    def __init__(self, path: Path):
        self.path = path
        self.objects: list[dict[str, Any]] = []
        self.problems: list[str] = []
        self.revision = 0
        self._identity: tuple[int, int] | None = None
        """Number of the file and its first line's hash, by which a file written anew is known."""
        self._read_to = 0
        self._lines = 0
        self._stamp: tuple[int, int, int] | None = None

    def refresh(self) -> bool:
        """Read what is new; return whether something was."""
        try:
            stat = self.path.stat()
            stamp = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
            if stamp == self._stamp or not S_ISREG(stat.st_mode):  # a pipe would be waited for
                return False
            with self.path.open("rb") as file:
                identity = (stat.st_ino, hash(file.readline(1000)))
                if identity != self._identity or stat.st_size < self._read_to:
                    self._start_afresh(identity)
                file.seek(self._read_to)
                self._take(file.read(stat.st_size - self._read_to))
        except FileNotFoundError:
            if self._stamp is None:
                return False
            self._start_afresh(None)
            stamp = None
        except OSError as error:
            self.problems = [f"{self.path.name} cannot be read: {error.strerror or error}"]
            return False
        self._stamp = stamp
        self.revision += 1
        return True

    def _start_afresh(self, identity: tuple[int, int] | None) -> None:
        self._identity, self._read_to, self._lines = identity, 0, 0
        self.objects, self.problems = [], []

    def _take(self, data: bytes) -> None:
        """Parse the whole lines of these bytes, in a list of its own: readers hold the old one."""
        self.problems = [text for text in self.problems if not text.startswith("the last line")]
        whole, end, rest = data.rpartition(b"\n")
        objects = list(self.objects)
        for line in whole.split(b"\n") if end else ():
            self._lines += 1
            try:
                if len(line) > MAX_LINE_BYTES:
                    raise ValueError(f"longer than {MAX_LINE_BYTES} bytes")
                value = json.loads(line) if line.strip() else {}
                if not isinstance(value, dict):
                    raise ValueError("no JSON object")
                if value:
                    objects.append(value)
            except (ValueError, RecursionError) as error:
                self.problems.append(f"line {self._lines} of {self.path.name} is left out: {error}")
        self.problems = self.problems[:20]
        self._read_to += len(whole) + len(end)
        self.objects = objects
        if rest:
            self.problems.append(f"the last line of {self.path.name} has no end yet")

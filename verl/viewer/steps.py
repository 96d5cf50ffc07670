"""The files of recorded steps: found, their light columns read at once and their heavy ones on demand."""

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from threading import Lock

import pyarrow as pa
import pyarrow.parquet as pq

from verl.viewer.columns import conform, is_light
from verl.viewer.records import FindImage, list_steps, read_records

RECORDED = re.compile(r"(train|val)_step_(\d+)\.parquet")
VALIDATED = re.compile(r"validation_step_(\d+)\.jsonl")
MAX_HELD_BYTES = 2**29
"""Heavy columns that are kept in memory, the least used leave first."""

SHARED = ("problem", "ground_truth")
SEARCHED = ("response", *SHARED)
"""Columns that a search by text goes through; samples of a group share the last two."""

Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class StepFile:
    """The file of one step; `stamp` changes when it is written anew."""

    path: Path
    kind: str
    step: int
    stamp: Stamp


def find_step_files(folder: Path) -> list[StepFile]:
    """Return the recorded steps of a run and, where none was recorded, its validations, in the order of steps."""
    found: dict[tuple[int, str], StepFile] = {}
    for path in _list(folder / "rollouts"):
        if match := RECORDED.fullmatch(path.name):
            _add(found, path, match[1], int(match[2]))
    for path in _list(folder):
        if (match := VALIDATED.fullmatch(path.name)) and (int(match[1]), "val") not in found:
            _add(found, path, "val", int(match[1]))
    return [found[key] for key in sorted(found)]


def find_generations(folder: Path, known: Iterable[StepFile]) -> list[StepFile]:
    """Return the steps of generations.jsonl of which no other file is known."""
    path, steps = folder / "generations.jsonl", {file.step for file in known if file.kind == "val"}
    found: dict[tuple[int, str], StepFile] = {}
    if path.is_file():
        for step in list_steps(path):
            if step not in steps:
                _add(found, path, "val", step)
    return list(found.values())


def _list(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:  # none yet, or no longer
        return []


def _add(found: dict[tuple[int, str], StepFile], path: Path, kind: str, step: int) -> None:
    try:
        stat = path.stat()
    except OSError:  # renamed or removed in this moment
        return
    if S_ISREG(stat.st_mode):  # a pipe would be waited for
        found[step, kind] = StepFile(path, kind, step, (stat.st_ino, stat.st_mtime_ns, stat.st_size))


class StepReader:
    """Reads columns of step files and keeps the newest used ones."""

    def __init__(self, find_image: FindImage, max_held_bytes: int = MAX_HELD_BYTES):
        self._find_image = find_image
        self._max_held_bytes = max_held_bytes
        self._held: OrderedDict[tuple[StepFile, tuple[str, ...]], pa.Table] = OrderedDict()
        self._num_bytes = 0
        self._lock = Lock()

    def read_light(self, file: StepFile) -> tuple[pa.Table, list[str]]:
        """Return the light columns of a file and what was left out of it.

        Raises ValueError (as Arrow's errors are) or OSError for a file that cannot be read.
        """
        if file.path.suffix == ".jsonl":
            table, problems = read_records(file.path, file.step, self._find_image)
        else:
            with pq.ParquetFile(file.path) as parquet:
                names = [name for name in parquet.schema_arrow.names if is_light(name)]
                table, problems = parquet.read(columns=names, use_threads=False), []
        names = [name for name in table.column_names if is_light(name)]
        return conform(table, names), problems

    def read(self, file: StepFile, names: Sequence[str]) -> pa.Table:
        """Return columns of all rows of a file. Errors: as read_light."""
        return self._hold((file, tuple(names)), lambda: self._read(file, names))

    def read_texts(self, file: StepFile) -> pa.Table:
        """Return SEARCHED of all rows of a file, those that samples of a group share as dictionaries."""
        return self._hold((file, ("texts",)), lambda: self._read_texts(file))

    def read_ahead(self, files: Sequence[StepFile]) -> None:
        """Read the texts of the newest files that fit into half of what is kept, for the first search."""
        for file in reversed(files):
            if self._num_bytes > self._max_held_bytes // 2:
                return
            with suppress(OSError, ValueError, pa.ArrowException):  # the search itself leaves it out
                self.read_texts(file)

    def _hold(self, key: tuple[StepFile, tuple[str, ...]], read: Callable[[], pa.Table]) -> pa.Table:
        with self._lock:
            if (table := self._held.get(key)) is not None:
                self._held.move_to_end(key)
                return table
        table = read()
        with self._lock:
            if key not in self._held and table.nbytes <= self._max_held_bytes:
                self._held[key] = table
                self._num_bytes += table.nbytes
            while self._num_bytes > self._max_held_bytes:
                self._num_bytes -= self._held.popitem(last=False)[1].nbytes
        return table

    def _read(self, file: StepFile, names: Sequence[str]) -> pa.Table:
        if file.path.suffix == ".jsonl":
            return conform(read_records(file.path, file.step, self._find_image)[0], names)
        with pq.ParquetFile(file.path) as parquet:
            known = [name for name in names if name in parquet.schema_arrow.names]
            return conform(parquet.read(columns=known, use_threads=False), names)

    def _read_texts(self, file: StepFile) -> pa.Table:
        if file.path.suffix == ".jsonl":
            table = self._read(file, SEARCHED)
        else:
            known = [name for name in SEARCHED if name in pq.read_schema(file.path).names]
            with pq.ParquetFile(file.path, read_dictionary=[name for name in SHARED if name in known]) as parquet:
                table = parquet.read(columns=known, use_threads=False)
        for name in SHARED:
            if name in table.column_names and not pa.types.is_dictionary(table[name].type):
                table = table.set_column(table.column_names.index(name), name, table[name].dictionary_encode())
        return table

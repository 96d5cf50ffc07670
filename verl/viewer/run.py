"""A run as the viewer sees it: logs, light columns of all rollouts, and what could not be read."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa

from verl.viewer.columns import NUMBERS, PART, TEXTS, conform
from verl.viewer.lines import LineFile
from verl.viewer.pictures import Pictures
from verl.viewer.steps import StepFile, StepReader, find_generations, find_step_files

REFRESH_S = 1.0
"""The folder is looked at again after this long at the earliest."""
NEWEST_VERSION = 1
"""Version of the files that this reads, as rollouts/about.json states it."""
FAILURE_MARK = "format_failure/"
"""Begins the parts of the reward that mark why a format failed, 1 or 0."""
MARKS = ("experiment_log.jsonl", "experiment_config.json", "generations.jsonl", "rollouts")
"""A folder with one of these is that of a run."""


@dataclass(frozen=True)
class Snapshot:
    """All rollouts of a run at one moment, ordered by step, kind, group and sample. R rollouts, G groups."""

    files: list[StepFile] = field(default_factory=list)
    file: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Of each rollout the index in `files`. [R]"""
    row: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Of each rollout its row in the file. [R]"""
    numbers: dict[str, np.ndarray] = field(default_factory=dict)
    """float64, NaN where there is none. [R] each; `spread` is highest less lowest score of the group."""
    codes: dict[str, np.ndarray] = field(default_factory=dict)
    """Index in `values` of each light text, -1 for none. [R] each"""
    values: dict[str, list[str]] = field(default_factory=dict)
    starts: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """First rollout of each group. [G]"""
    group: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Of each rollout the index of its group in `starts`. [R]"""

    def __len__(self) -> int:
        return len(self.file)

    @property
    def parts(self) -> list[str]:
        """Return the names of the reward's parts, without marks of failures, which `failure` has in one word."""
        parts = [name.removeprefix(PART) for name in self.numbers if name.startswith(PART)]
        return [name for name in parts if not name.startswith(FAILURE_MARK)]

    def members(self, group: int) -> range:
        """Return the rollouts of a group."""
        end = self.starts[group + 1] if group + 1 < len(self.starts) else len(self)
        return range(int(self.starts[group]), int(end))

    def text(self, name: str, rollout: int) -> str | None:
        """Return a light text of a rollout."""
        code = self.codes[name][rollout]
        return None if code < 0 else self.values[name][code]


def build_snapshot(files: list[StepFile], tables: list[pa.Table]) -> Snapshot:
    """Return the snapshot of the light columns of these files."""
    if not sum(map(len, tables)):
        return Snapshot()
    names = dict.fromkeys([*TEXTS, *NUMBERS])
    parts = sorted({name for table in tables for name in table.column_names} - names.keys(), key=_place_of_part)
    # Joined first, so that thousands of steps cost no work in Python each; what a step lacks is null.
    table = conform(pa.concat_tables(tables, promote_options="default"), [*names, *parts])
    numbers = {name: table[name].to_numpy().astype(np.float64) for name in (*NUMBERS, *parts)}
    codes, values = {}, {}
    for name in TEXTS:
        coded = table[name].combine_chunks().dictionary_encode()
        coded = coded.combine_chunks() if isinstance(coded, pa.ChunkedArray) else coded
        codes[name] = coded.indices.fill_null(-1).to_numpy()
        values[name] = coded.dictionary.to_pylist()
    file = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    row = np.concatenate([np.arange(len(table)) for table in tables])
    numbers["step"] = np.array([one.step for one in files], dtype=np.float64)[file]
    order = np.lexsort((numbers["sample"], numbers["group"], file))
    file, row = file[order], row[order]
    numbers = {name: array[order] for name, array in numbers.items()}
    codes = {name: array[order] for name, array in codes.items()}
    is_first = np.ones(len(file), dtype=bool)
    group = numbers["group"]
    is_first[1:] = (file[1:] != file[:-1]) | ~((group[1:] == group[:-1]) | np.isnan(group[1:]) & np.isnan(group[:-1]))
    starts, group_of = np.flatnonzero(is_first), np.cumsum(is_first) - 1
    score = numbers["score"]
    spread = np.fmax.reduceat(score, starts) - np.fmin.reduceat(score, starts)
    numbers["spread"] = spread[group_of]
    return Snapshot(files, file, row, numbers, codes, values, starts, group_of)


def _place_of_part(name: str) -> tuple[int, str]:
    """Return the place of a reward's part: in the order of its gates, others behind."""
    order = ("format", "count", "accuracy", "spatial_score")
    part = name.removeprefix(PART)
    return (order.index(part) if part in order else len(order), part)


class Run:
    """The folder of a run, looked at again where something asks for it.

    Raises FileNotFoundError or ValueError for a folder that is none of a run.
    """

    def __init__(self, path: Path):
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: no such folder")
        self.folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        if not any((self.folder / mark).exists() for mark in MARKS) and not find_step_files(self.folder):
            raise ValueError(f"{path} is no folder of a run: it holds none of {', '.join(MARKS)}")
        self.name = path.resolve().name
        self.log = LineFile(self.folder / "experiment_log.jsonl")
        self.checks = LineFile(self.folder / "rollouts" / "checks.jsonl")
        self.pictures = Pictures(self.folder)
        self.reader = StepReader(self.pictures.find)
        self.snapshot = Snapshot()
        self.revision = 0
        self._tables: dict[StepFile, tuple[pa.Table, list[str]]] = {}
        self._unreadable: dict[StepFile, str] = {}
        self._generations: tuple[tuple[int, int] | None, list[StepFile]] = (None, [])
        self._looked_at = 0.0
        self._lock = Lock()

    def refresh(self, is_forced: bool = False) -> None:
        """Read what is new in the folder, at most once in REFRESH_S."""
        with self._lock:
            if not is_forced and time.monotonic() - self._looked_at < REFRESH_S:
                return
            changes = [self.log.refresh(), self.checks.refresh(), self._refresh_steps()]
            self.revision += any(changes)
            self._looked_at = time.monotonic()

    def _refresh_steps(self) -> bool:
        files = find_step_files(self.folder)
        files += self._find_generations(files)
        files.sort(key=lambda file: (file.step, file.kind))
        known = self._tables.keys() | self._unreadable.keys()
        there = set(files)
        if there == known:
            return False
        self._tables = {file: table for file, table in self._tables.items() if file in there}
        self._unreadable = {file: text for file, text in self._unreadable.items() if file in there}
        for file in files:
            if file not in known:
                self._read_step(file)
        read = [file for file in files if file in self._tables]
        self.snapshot = build_snapshot(read, [self._tables[file][0] for file in read])
        return True

    def _read_step(self, file: StepFile) -> None:
        try:
            self._tables[file] = self.reader.read_light(file)
        except (OSError, ValueError, pa.ArrowException) as error:
            reason = str(error).partition("\n")[0]
            self._unreadable[file] = f"{file.path.name} cannot be read and is left out: {reason}"

    def _find_generations(self, files: list[StepFile]) -> list[StepFile]:
        """Return the steps of generations.jsonl, which is read again when it has changed."""
        try:
            stat = (self.folder / "generations.jsonl").stat()
        except OSError:
            return []
        steps = {file.step for file in files if file.kind == "val"}
        if self._generations[0] != (stat.st_mtime_ns, stat.st_size):
            self._generations = ((stat.st_mtime_ns, stat.st_size), find_generations(self.folder, []))
        return [file for file in self._generations[1] if file.step not in steps]

    @property
    def about(self) -> dict[str, Any]:
        """Content of rollouts/about.json; empty where it is missing or cannot be read."""
        try:
            value = json.loads((self.folder / "rollouts" / "about.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}

    @property
    def problems(self) -> list[str]:
        """Sentences on what could not be read or is missing."""
        found = [*self._unreadable.values()]
        found += [problem for _, problems in self._tables.values() for problem in problems]
        found += [*self.log.problems, *self.checks.problems, *self.pictures.problems]
        if not self.folder.is_dir():
            found.append(f"{self.folder} is gone: it was moved or removed, or its disk is away")
        elif not (self.folder / "rollouts").is_dir():
            found.append("the run recorded no rollouts: only its validation samples are shown")
        version = self.about.get("version", NEWEST_VERSION)
        if not isinstance(version, int) or version > NEWEST_VERSION:
            found.append(f"its files are of version {version}, this viewer reads up to {NEWEST_VERSION}")
        return found[:50]

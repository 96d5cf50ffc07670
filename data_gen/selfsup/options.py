"""Options of preprocess_data --provider=selfsup."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_gen.arguments import read_bool, read_choice, read_count, read_share
from data_gen.selfsup.tasks import ANNOTATED, TASKS, WITH_DEPTH

VERSION = "selfsup-1"
MIXED = "mixed"


@dataclass(frozen=True)
class SelfsupOptions:
    """Arguments of preprocess_data that concern this provider; see there."""

    source: str
    out: Path
    must_exist: bool
    data_cap: int | None
    tasks: tuple[str, ...]
    difficulty: float | None
    """None for a new one in each row."""
    rows_per_image: int
    annotations: Path | None
    depth: Path | None
    depth_scale: float | None
    processes: int
    seed: int
    is_overwritten: bool

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> "SelfsupOptions":
        """The checked arguments of preprocess_data by their names there. Raises ValueError for the first wrong one."""
        difficulty, scale = given["difficulty"], given["depth_scale"]
        options = cls(
            source=str(given["source"]),
            out=Path(given["out"] or given["resume_file"]),
            must_exist=read_bool("resume", given["resume"]),
            data_cap=read_count("data_cap", given["data_cap"]),
            tasks=read_tasks(given["tasks"]),
            difficulty=None if difficulty == MIXED else read_share("difficulty", difficulty, 0, 1),
            rows_per_image=read_count("rows_per_image", given["rows_per_image"]) or 1,
            annotations=Path(given["annotations"]) if given["annotations"] else None,
            depth=Path(given["depth"]) if given["depth"] else None,
            depth_scale=None if scale is None else read_share("depth_scale", scale, 0, 1e6),
            processes=read_count("processes", given["processes"]) or len(os.sched_getaffinity(0)),
            seed=read_count("seed", given["seed"], 0) or 0,
            is_overwritten=read_bool("overwrite", given["overwrite"]),
        )
        options._check_tasks(given["tasks"])
        return options

    def _check_tasks(self, named: Any) -> None:
        if not named or not Path(self.source).is_dir():
            return  # rows of a source may hold objects and depth themselves
        for tasks, has_files, flag in (
            (ANNOTATED, self.annotations, "annotations"),
            (WITH_DEPTH, self.depth, "depth"),
        ):
            if not has_files and (lacking := [name for name in self.tasks if name in tasks]):
                raise ValueError(f"--tasks {lacking[0]} on a folder of pictures needs --{flag}")

    @property
    def shards(self) -> Path:
        """The folder of the rows' parquet files."""
        return self.out.with_suffix("")

    def settings(self) -> dict[str, Any]:
        """Settings that must agree for two runs to share a journal: not number of pictures or processes."""
        return {
            "source": str(self.shards),
            "pictures": self.source,
            "provider": "selfsup",
            "version": VERSION,
            "seed": self.seed,
            "tasks": list(self.tasks),
            "difficulty": MIXED if self.difficulty is None else self.difficulty,
            "rows_per_image": self.rows_per_image,
            "annotations": str(self.annotations or ""),
            "depth": str(self.depth or ""),
            "depth_scale": self.depth_scale,
        }


def read_tasks(value: Any) -> tuple[str, ...]:
    """Names of tasks from a list or a text with commas; all by default. Raises ValueError for an unknown one."""
    if value is None:
        return tuple(TASKS)
    names = value if isinstance(value, list | tuple) else str(value).split(",")
    chosen = dict.fromkeys(read_choice("tasks", str(name).strip(), TASKS) for name in names)
    return tuple(chosen)

"""Files of recorded rollouts: their names, writing them whole or not at all, and dropping those of later steps."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

KINDS = {"train": "train_step", "val": "val_step"}
UNFINISHED = ".tmp"
_STEP_FILE = re.compile(r"(?:train|val)_step_(\d+)\.parquet")


def step_file(folder: Path, kind: str, step: int) -> Path:
    """The file of a step's rollouts; kind "train" or "val"."""
    return folder / f"{KINDS[kind]}_{step:06d}.parquet"


def write_whole(path: Path, write: Callable[[Path], Any], is_synced: bool = True) -> None:
    """Writes a file under another name and renames it, so that a kill leaves all of it or nothing.

    Args:
        write: writes the content to the path that it is given.
        is_synced: waits until the disk has it, so that it also survives a machine that loses power.
    """
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        write(unfinished)
        if is_synced:
            with unfinished.open("rb+") as file:
                os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)  # what fits on a full disk is needed elsewhere
        raise


def drop_after(folder: Path, step: int) -> None:
    """Removes rollouts of later steps, what a kill has left unfinished, and later lines of the files of lines."""
    for path in [*folder.glob(f"*{UNFINISHED}"), *folder.glob(f"images/*/*{UNFINISHED}")]:
        path.unlink(missing_ok=True)
    for path in folder.glob("*.parquet"):
        match = _STEP_FILE.fullmatch(path.name)
        if match and int(match[1]) > step:
            path.unlink(missing_ok=True)
    for path in folder.glob("*.jsonl"):
        lines = [line for line in path.read_text().splitlines(keepends=True) if _is_kept(line, step)]
        text = "".join(lines)
        write_whole(path, lambda place, text=text: place.write_text(text))


def _is_kept(line: str, step: int) -> bool:
    """True for a complete line of a step up to this one."""
    try:
        return line.endswith("\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False

"""What every command shares: strictly read arguments, and outputs that are never overwritten unasked."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_TRUE, _FALSE = ("true", "yes", "1", "on"), ("false", "no", "0", "off")


def read_bool(name: str, value: Any) -> bool:
    """A boolean from what the command line gave: "false" is false. Raises ValueError for anything else."""
    text = str(value).strip().lower()
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ValueError(f"--{name} {value!r} is no boolean; write True or False")


def read_count(name: str, value: Any, least: int = 1) -> int | None:
    """A whole number from `least` up, or None. Raises ValueError for anything else."""
    if value is None or str(value).lower() == "none":
        return None
    if isinstance(value, bool) or not str(value).isdecimal() or int(value) < least:
        raise ValueError(f"--{name} {value!r}: need a whole number from {least} up")
    return int(value)


def read_share(name: str, value: Any, low: float, high: float) -> float:
    """A number between two limits. Raises ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"--{name} {value!r}: need a number from {low} to {high}")
    return float(value)


def read_choice(name: str, value: Any, known: Mapping[str, Any] | tuple[str, ...]) -> str:
    """One of the known names. Raises ValueError with the nearest for anything else."""
    import difflib

    if value in known:
        return str(value)
    nearest = difflib.get_close_matches(str(value), list(known), 1, 0)
    raise ValueError(f"--{name} {value!r}: need one of {', '.join(known)}; nearest is {nearest[0]}")


def claim_output(path: Path, is_overwritten: bool) -> Path:
    """The path of an output; ValueError where it exists and may not be overwritten, or cannot be written."""
    if path.exists() and not is_overwritten:
        raise ValueError(f"{path} exists; name another output, or pass --overwrite=True to replace it")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path.parent} cannot be written")
    return path


def check_repo(repo: str | None) -> str:
    """The name of a repository to upload to; ValueError where it is none."""
    if not isinstance(repo, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ValueError(f"--upload_to_hf=True needs --target_repo=OWNER/NAME, got {repo!r}")
    return repo

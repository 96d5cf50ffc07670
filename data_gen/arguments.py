"""Arguments of the command line, read strictly: "false" is false, and an unknown flag is an error before any work."""

import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from spatialthinker.network import check_cluster_address

VG150 = "JosephZ/vg150_train_sgg_prompt"
"""The source of the released pipeline."""

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
    if value in known:
        return str(value)
    nearest = difflib.get_close_matches(str(value), list(known), 1, 0)
    raise ValueError(f"--{name} {value!r}: need one of {', '.join(known)}; nearest is {nearest[0]}")


def check_repo(repo: str | None) -> str:
    """The name of a repository to upload to; ValueError where it is none."""
    if not isinstance(repo, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ValueError(f"--upload_to_hf=True needs --target_repo=OWNER/NAME, got {repo!r}")
    return repo


def check_flags(argv: list[str], command: Callable[..., Any], further: Callable[..., Any] | None = None) -> None:
    """Raise ValueError for a flag that the command does not have: fire would say so only after the command ran.

    `further` is a second function whose arguments the command takes too.
    """
    known = {name for function in (command, further) if function for name in inspect.signature(function).parameters}
    known = known - {"self", "arguments"} | {"help"}
    for token in argv[1:]:
        name = token[2:].split("=")[0].replace("-", "_")
        if token == "--":
            return
        if token.startswith("--") and name not in known and name.removeprefix("no") not in known:
            nearest = difflib.get_close_matches(name, known, 1, 0)[0]
            raise ValueError(f"{argv[0]} has no argument --{name}; nearest is --{nearest}")


def fill_defaults(command: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a command by name, those not given at their defaults. Raises ValueError for others."""
    parameters = inspect.signature(command).parameters
    if unknown := [name for name in arguments if name not in parameters]:
        raise ValueError(f"--{unknown[0]} is no argument of {command.__name__}; see {command.__name__} --help")
    return {name: p.default for name, p in parameters.items() if name != "self"} | dict(arguments)


def read_budget(value: Any) -> float | None:
    """--max_cost_usd in dollars, or None. Raises ValueError for anything else."""
    return None if value is None else read_share("max_cost_usd", value, 0, 1e9)


def read_address(value: Any) -> str:
    """--ray_address, or "local" for a cluster of one's own. Raises ValueError where nothing answers there."""
    if value is None or str(value).lower() in ("", "none", "local"):
        return "local"
    check_cluster_address(str(value))
    return str(value)

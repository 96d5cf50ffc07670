"""Rules for the tree as a whole: light imports, names, sizes, nothing of one machine."""

import importlib.metadata
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import spatialthinker

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "ray", "vllm", "transformers", "datasets", "spacy")
PACKAGES = {"verl", "spatialthinker", "data_gen", "evaluation", "scripts", "configs", "tests"}
REQUIRED = PACKAGES | {"pyproject.toml", "setup.py", "README.md", "LICENSE", "requirements", ".ci", ".python-version"}
ALLOWED = REQUIRED | {"docs", "CONTRIBUTING.md", "CHANGELOG.md", ".gitignore", ".pre-commit-config.yaml"}
OF_THE_TREE = {"configs", "docs", "layering", "lock", "programs", "recipes", "scripts"}
"""Names of unit tests that concern the whole tree."""
MAX_TREE_BYTES = 20 * 1024**2
# Written in pieces, so that this file does not name them.
HOSTS = [
    "py" + "pi.",
    "pythonhosted" + ".",
    "npm" + "js.",
    "artifact" + "ory",
    "download.py" + "torch",
    "/sim" + "ple/",
]
MACHINE_PATH = re.compile(r"(?<![\w.$}/~-])/(work|root|home|Users|mnt)/")


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    return [path for name in listing.decode().split("\0") if name and (path := ROOT / name).is_file()]


def test_import_of_spatialthinker_loads_nothing_else():
    program = "import sys; before = set(sys.modules); import spatialthinker; print(*set(sys.modules) - before)"
    printed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True, text=True)
    assert printed.stdout.split() == ["spatialthinker"]


def test_no_module_of_spatialthinker_imports_heavy_packages():
    modules = [module.name for module in pkgutil.walk_packages(spatialthinker.__path__, "spatialthinker.")]
    program = f"import sys, {', '.join(['spatialthinker', *modules])}; print(*sys.modules)"
    printed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True, text=True)
    assert not set(HEAVY) & set(printed.stdout.split())


def test_top_level_is_as_agreed(tracked: list[Path]):
    names = {path.relative_to(ROOT).parts[0] for path in tracked}
    assert REQUIRED <= names <= ALLOWED, (sorted(REQUIRED - names), sorted(names - ALLOWED))


def test_tree_is_small(tracked: list[Path]):
    assert sum(path.stat().st_size for path in tracked) < MAX_TREE_BYTES


def test_no_file_names_a_registry_or_a_path_of_one_machine(tracked: list[Path]):
    found = []
    for path in tracked:
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            has_host = any(host in line for host in HOSTS) and "://" in line
            if has_host or MACHINE_PATH.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found


def test_the_search_for_machine_paths_finds_them():
    assert MACHINE_PATH.search("cd /" + "work/project")
    assert MACHINE_PATH.search('path = "/' + 'root/x"')
    assert not MACHINE_PATH.search("see the/work/of others, ~/home/ or a://host/home/x")


def test_modules_are_named_by_their_subject(tracked: list[Path]):
    vague = {"utils", "util", "common", "helpers", "misc", "base", "manager", "managers"}
    assert not [path.name for path in tracked if path.suffix == ".py" and vague & {path.stem, path.parent.name}]


def test_files_that_run_as_scripts_hide_no_installed_package(tracked: list[Path]):
    """The folder of a script heads sys.path, so a file `datasets.py` there would be imported as `datasets`."""
    installed = set(importlib.metadata.packages_distributions()) | set(sys.stdlib_module_names)
    folders = [ROOT / name for name in ("scripts", "evaluation", "data_gen")]
    stems = {path.stem for path in tracked if path.suffix == ".py" and path.parent in folders} - {"__init__"}
    assert not stems & installed


def test_unit_tests_are_named_after_what_they_test(tracked: list[Path]):
    """A test is test_NAME or test_NAME_ASPECT; NAME is a module, a room or a script, with its room in front or not."""
    names = set(OF_THE_TREE)
    for parts in (path.relative_to(ROOT).with_suffix("").parts for path in tracked if path.suffix in (".py", ".sh")):
        if parts[0] in PACKAGES - {"configs", "tests"}:
            names |= {parts[-1], f"{parts[0]}_{parts[-1]}", f"{parts[-2]}_{parts[-1]}"}
            names |= {parts[-2], f"{parts[0]}_{parts[-2]}"}
    tests = [path for path in tracked if path.parent == ROOT / "tests" / "unit" and path.name.startswith("test_")]
    stems = [path.stem.removeprefix("test_") for path in tests]
    assert not [stem for stem in stems if not any(f"{stem}_".startswith(f"{name}_") for name in names)]


@pytest.mark.parametrize("folder", ["e2e", "gpu"])
def test_long_tests_carry_their_marker(tracked: list[Path], folder: str):
    tests = [path for path in tracked if path.parent == ROOT / "tests" / folder and path.name.startswith("test_")]
    assert not [path.name for path in tests if f"pytest.mark.{folder}" not in path.read_text()]

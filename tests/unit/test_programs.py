"""The programs of the checkout: their packages are the checkout's, wherever they are started from."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("verl", "evaluation", "data_gen", "spatialthinker")
FOLDERS = ("scripts", "evaluation", "data_gen")
PROGRAMS = sorted(
    path for folder in FOLDERS for path in (ROOT / folder).glob("*.py") if "\nif __name__ ==" in path.read_text()
)
SHOW_PACKAGES = f"""
import runpy, sys
sys.path[0] = sys.argv[1].rpartition("/")[0]
runpy.run_path(sys.argv[1])
import {", ".join(PACKAGES)}
print(*({", ".join(f"{name}.__path__[0]" for name in PACKAGES)}), sep="\\n")
"""


def run(command: list[str | Path], folder: Path, python_path: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(python_path)}
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def strangers(tmp_path: Path) -> Path:
    """A folder of packages that have the project's names and cannot be imported."""
    folder = tmp_path / "strangers"
    for name in PACKAGES:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("raise ImportError('the package of another project')\n")
    return folder


def test_programs_are_found():
    assert {path.name for path in PROGRAMS} >= {"sft.py", "evals.py", "compare.py", "generate_data.py", "report.py"}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.name)
def test_a_program_imports_the_packages_of_its_checkout(program: Path, strangers: Path, tmp_path: Path):
    if program.name == "quickstart.py":
        pytest.skip("imports no package; runs its stages in the checkout's root")
    result = run(["-c", SHOW_PACKAGES, program], tmp_path, strangers)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [str(ROOT / name) for name in PACKAGES]


def test_commands_run_from_another_folder(strangers: Path, tmp_path: Path):
    listing = run([ROOT / "evaluation" / "evals.py", "--list"], tmp_path, strangers)
    assert listing.returncode == 0 and "stvqa" in listing.stdout, listing.stderr
    command = ["preprocess_data", "--provider=template", "--source=synthetic:4", "--out=out.csv"]
    generated = run([ROOT / "data_gen" / "generate_data.py", *command], tmp_path, strangers)
    assert generated.returncode == 0 and (tmp_path / "out.csv").is_file(), generated.stderr

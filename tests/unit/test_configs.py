"""Every shipped configuration loads, and holds only what it changes; the paper's run holds the defaults."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.support.bare_checkout import bare_checkout
from verl.config.loading import config_to_dict, load_config
from verl.config.records import Config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(ROOT.glob("configs/*.yaml"))
PAPERS_RUN = ROOT / "configs" / "spatialthinker_3b.yaml"


def read_leaves(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in section.items():
        leaves |= read_leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return leaves


def read_yaml(path: Path) -> dict[str, Any]:
    content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    assert isinstance(content, dict)
    return read_leaves({str(key): value for key, value in content.items()})


def test_there_are_configs():
    assert "toy_cpu.yaml" in [path.name for path in CONFIGS]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_loads(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(bare_checkout(tmp_path))
    # What lies below runs/ is made by a command, so it is not there yet.
    kinds = ("_files", "model_path")
    made = [key for key, value in read_yaml(path).items() if "runs/" in str(value) and key.endswith(kinds)]
    stand_ins = {key: "configs/toy_model" if key.endswith("model_path") else tmp_path for key in made}
    load_config([f"config={path}", *(f"{key}={value}" for key, value in stand_ins.items())])


def test_the_papers_run_is_the_defaults_spelled_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    assert load_config([f"config={PAPERS_RUN}"]) == load_config([])
    assert len(read_yaml(PAPERS_RUN)) > 25


@pytest.mark.parametrize("path", [path for path in CONFIGS if path != PAPERS_RUN], ids=lambda path: path.name)
def test_config_holds_only_what_differs(path: Path):
    defaults = read_leaves(config_to_dict(Config()))
    same = {key for key, value in read_yaml(path).items() if key in defaults and defaults[key] == value}
    assert not same, f"{path.name} repeats defaults: {sorted(same)}"

"""TRL's step on the toy model and a CPU, beside a step of ours that was written before."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from verl.bench.peers import ROWS

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.nightly,
    pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed"),
]
ROOT = Path(__file__).parents[2]
OURS = {
    "table": {name: {"seconds": 2.0} for name in ROWS},
    "config": {
        "data": {"rollout_batch_size": 4, "max_prompt_length": 128, "max_response_length": 8},
        "worker": {"rollout": {"n": 8}, "actor": {"global_batch_size": 2}},
    },
}


def test_trl_trains_on_the_load_of_a_benchmark(tmp_path: Path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")  # rows and models go to runs/ of the working folder
    (tmp_path / "ours.json").write_text(json.dumps(OURS))
    command = [sys.executable, str(ROOT / "scripts" / "bench_peers.py"), "--config", "configs/bench_toy_cpu.yaml"]
    command += ["--image", "112x112", "--prompts", "4", "--ours", "ours.json", "--dump", "theirs.json"]
    command += ["worker.actor.global_batch_size=2", "data.max_response_length=8"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "theirs.json").read_text())
    assert len(result["steps"]) == 2 and result["prompts"] == 4
    assert result["counts"] == {"tokens of a prompt": 128, "shortest response": 8, "longest response": 8, "passes": 0}
    seconds = result["seconds"]
    assert all(seconds[name] > 0 for name in ("rollout", "images", "old", "reference", "update", "whole step"))
    for step in result["steps"]:
        assert step["whole step"] == pytest.approx(sum(step[name] for name in ROWS[:-1]))
    assert "4 prompts x 8 responses, 2 optimizer steps" in done.stdout and "Warning" not in done.stdout
    last = done.stdout.splitlines()[-1].split()
    assert last[:2] == ["whole", "step"] and float(last[-1]) == pytest.approx(seconds["whole step"] / 2.0, abs=0.006)

"""The benchmark runs the real trainer on the toy model, whole or its rollout alone."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from verl.bench.inputs import draw_lengths, lognormal
from verl.bench.kernels import by_kind

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]
ROLLOUT = ("rollout", "weight sync + wake", "sleep", "rest", "whole step")
PASSES = ("images", "old", "reference", "update")


@pytest.mark.parametrize(
    ("what", "phases"),
    [pytest.param("rollout", ROLLOUT, marks=pytest.mark.nightly), ("step", (*ROLLOUT, *PASSES))],
)
def test_every_phase_of_a_step_has_its_row(tmp_path, what, phases):
    dump = tmp_path / "dump.json"
    command = [sys.executable, "-m", "verl.bench", what, "--config", "configs/bench_toy_cpu.yaml"]
    command += ["--image", "112x112", "--ratio_groups", "2", "--dump", str(dump)]
    is_saving = what == "step"
    command += [] if is_saving else ["--lengths", "lognormal:20:0.6"]
    mean = 64.0 if is_saving else draw_lengths(lognormal("lognormal:20:0.6"), (8, 8), 64, 0).mean()
    checkpoints = tmp_path / "checkpoints"
    command += [f"trainer.save_checkpoint_path={checkpoints}", f"trainer.save_freq={int(is_saving)}"]
    command += ["trainer.save_in_background=false"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(dump.read_text())
    table = result["table"]
    assert set(table) == set(phases)
    assert all(name in done.stdout for name in phases)
    parts = sum(row["seconds"] for name, row in table.items() if name != "whole step")
    assert parts == pytest.approx(table["whole step"]["seconds"], abs=0.01)
    assert table["rollout"]["tokens_per_s"] * table["rollout"]["seconds"] == pytest.approx(8 * 8 * mean, rel=0.01)
    start = r"^Started in \d+ s: data \d+, Ray \d+, ranks and engines \d+ \(imports \d+, engine \d+\), probe \d+$"
    assert re.search(start, done.stdout, re.M)
    assert ("ratio" in result) == (what == "step")
    num_steps = len(result["steps"])
    assert done.stdout.count(" save_checkpoint: ") == (num_steps if is_saving else 0)
    assert (checkpoints / f"global_step_{num_steps}" / "manifest.json").is_file() is is_saving
    if what == "step":
        assert all(table[name]["seconds"] > 0 for name in PASSES)
        assert result["steps"][-1]["actor/grad_norm"] > 0


@pytest.mark.nightly  # two benchmarks like the one above
def test_an_ablation_has_a_row_for_each_choice_that_it_undoes(tmp_path):
    name, dump = "prompts and images repeated", tmp_path / "rows.json"
    command = [sys.executable, "-m", "verl.bench", "ablation", "--config", "configs/bench_toy_cpu.yaml"]
    command += ["--image", "112x112", "--undo", name, "--dump", str(dump), "trainer.max_steps=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(dump.read_text())
    assert list(rows) == ["as configured", name]
    shared = [row["config"]["worker"]["actor"]["shared_prompt"] for row in rows.values()]
    assert shared == [True, False]
    whole = [row["table"]["whole step"]["seconds"] for row in rows.values()]
    printed = done.stdout.splitlines()[-2:]
    assert [line.split()[-2] for line in printed] == ["1.00", f"{whole[1] / whole[0]:.2f}"]
    assert printed[1].startswith(name)


@pytest.mark.nightly
@pytest.mark.parametrize("what", ["step", "rollout"])
def test_drawn_lengths_are_compared_with_equal_ones_in_one_run(tmp_path, what):
    dump = tmp_path / "dump.json"
    command = [
        sys.executable,
        "-m",
        "verl.bench",
        what,
        "--config",
        "configs/bench_toy_cpu.yaml",
        "--image",
        "112x112",
    ]
    command += ["--lengths", "lognormal:20:0.6", "--in_turns", "lengths", "--ratio_groups", "0", "--dump", str(dump)]
    done = subprocess.run([*command, "trainer.max_steps=3"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(dump.read_text())
    if what == "step":
        longest = [step["response_length/max"] for step in result["steps"]]
        assert longest[1] == round(draw_lengths(lognormal("lognormal:20:0.6"), (8, 8), 64, 0).mean()) < longest[0]
        assert longest[2] == longest[0]
    passes = ["old", "reference", "update"] if what == "step" else []
    assert list(result["in_turns"]) == ["rollout", *passes, "whole step"]
    whole = [step["timing_s/step" if what == "step" else "timing_s/gen"] for step in result["steps"]]
    assert result["in_turns"]["whole step"]["with"] == pytest.approx(whole[2])
    assert result["table"]["whole step"]["seconds"] == pytest.approx(whole[1], abs=0.001)  # of the equal ones
    assert "3 steps, medians of those of even numbers" in done.stdout
    assert re.search(r"^whole step +\d+\.\d\d +\d+\.\d\d +-?\d+\.\d\d%$", done.stdout, re.M)


def test_passes_with_shared_prompts_alone_take_no_others(tmp_path):
    dump = tmp_path / "dump.json"
    command = [sys.executable, "-m", "verl.bench", "passes", "--config", "configs/bench_toy_cpu.yaml", "--shared_only"]
    command += ["--image", "112x112", "--ratio_groups", "2", "--dump", str(dump), "--shape", "128:16:4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(dump.read_text())["rows"]
    assert set(row["shared"]) == {"old", "ref", "update"} and "repeated" not in row
    assert done.stdout.splitlines()[-1].split()[-2:] == ["-", "-"]


def test_passes_alone_have_a_row_for_each_shape(tmp_path):
    """No engine is loaded; a longer prompt is one with more to share."""
    dump = tmp_path / "dump.json"
    command = [sys.executable, "-m", "verl.bench", "passes", "--config", "configs/bench_toy_cpu.yaml"]
    command += ["--image", "112x112", "--ratio_groups", "2", "--dump", str(dump), "--kernels"]
    command += ["--shape", "128:16:4", "--shape", "640:16:4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    short, long = json.loads(dump.read_text())["rows"]
    assert (short["shape"], short["groups"]) == ({"prompt": 128, "response": 16, "n": 4}, 2)
    assert (long["shape"]["prompt"], long["groups"]) == (640, 1)
    for row in (short, long):
        assert set(row["shared"]) == set(row["repeated"]) == {"old", "ref", "update"}
        assert all(seconds > 0 for kind in ("shared", "repeated") for seconds in row[kind].values())
        assert by_kind(row["first_kernels"]["update"])["products"] > 0
        update = by_kind(row["kernels"]["update"])
        assert 0 < update["products"] < update["wall"] and update["attention"] > 0 and update["optimizer"] > 0
        assert sum(update.values()) == pytest.approx(2 * update["wall"], rel=0.01)  # on a CPU one after the other
    assert "RolloutWorker" not in done.stdout + done.stderr

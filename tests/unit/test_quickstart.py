"""The quickstart's driver with stand-in programs: order, resuming, what a killed run leaves behind, the summary."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from toy.before_after import bootstrap_interval, compare_metric, format_table, summarize_validation
from toy.process_tree import MemorySampler, find_owned, is_alive, kill_owned, owned_environment, read_tree_bytes

ROOT = Path(__file__).resolve().parents[2]
SUMMARY_KEYS = {
    "reward_before",
    "reward_after",
    "accuracy_before",
    "accuracy_after",
    "steps",
    "seconds",
    "peak_memory_gb",
    "checkpoint",
    "merged_model",
    "report",
}

# Plays all five programs. The trainer takes two "steps" with a checkpoint each and goes on from the newest; with the
# file `hang` in its run folder it starts a daemon in a session of its own and sleeps after the first one.
STAND_IN = """#!{python}
import json, os, subprocess, sys, time
from pathlib import Path

words = sys.argv[1:]
with open(os.environ["CALLS"], "a") as calls:
    calls.write(" ".join(words) + "\\n")


def option(name):
    return Path(words[words.index(name) + 1])


def write_validation(folder, step, reward):
    rows = [
        dict(uid=str(i), problem=f"question {{i}}", response="", ground_truth="",
             score=dict(overall=reward + i % 2 / 10, accuracy=i % 2, format=1, count=1, spatial_score=0.5))
        for i in range(40)
    ]
    (folder / f"validation_step_{{step}}.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))


def train():
    settings = dict(word.split("=", 1) for word in words[2:])
    folder = Path(settings["trainer.save_checkpoint_path"])
    folder.mkdir(exist_ok=True)
    if "trainer.max_steps" in settings:
        sys.exit(int(settings["trainer.max_steps"]))
    if not (folder / "validation_step_0.jsonl").exists():
        write_validation(folder, 0, 0.3)
    done = len(list(folder.glob("global_step_*/manifest.json")))
    for step in range(done + 1, 3):
        print(f"step {{step}}   0%|  |\\rstep {{step}} 100%|##|", flush=True)
        actor = folder / f"global_step_{{step}}" / "actor" / "huggingface"
        actor.mkdir(parents=True)
        (folder / f"global_step_{{step}}" / "manifest.json").write_text("{{}}")
        if (folder.parent / "hang").exists():
            subprocess.Popen(["sleep", "300"], start_new_session=True)
            (folder.parent / "hangs").touch()
            time.sleep(300)
    (folder / "global_step_10").mkdir(exist_ok=True)  # half-written: no manifest
    write_validation(folder, 2, 0.5)


program = words[1] if words[0] == "-m" else words[0]
if program == "spatialthinker.synthetic":
    option("--out").mkdir()
elif program == "verl.trainer.main":
    train()
elif program == "scripts/model_merger.py":
    (option("--local_dir") / "huggingface" / "model.safetensors").touch()
elif program == "evaluation/evals.py":
    option("--output_dir").mkdir(exist_ok=True)
    (option("--output_dir") / "stvqa.summary.json").touch()
elif program == "scripts/report.py":
    option("--out").mkdir(exist_ok=True)
    (option("--out") / "index.html").touch()
else:
    sys.exit(f"unknown program {{program}}")
"""


class Quickstart:
    def __init__(self, folder: Path) -> None:
        self.run_dir = folder / "run"
        self.calls = folder / "calls"
        self.python = folder / "python"
        self.python.write_text(STAND_IN.format(python=sys.executable))
        self.python.chmod(0o755)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "scripts/quickstart.py", "--run_dir", str(self.run_dir), "--python"]
        return subprocess.Popen(
            [*command, str(self.python), *arguments],
            cwd=ROOT,
            env=os.environ | {"CALLS": str(self.calls)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str, code: int = 0) -> str:
        process = self.start(*arguments)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == code, output
        return output

    def programs(self) -> list[str]:
        return [line.removeprefix("-m ").split()[0] for line in self.calls.read_text().splitlines()]

    def summary(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "summary.json").read_text())

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + 30
        while not (self.run_dir / name).exists():
            assert time.monotonic() < deadline, f"{name} did not appear"
            time.sleep(0.02)


@pytest.fixture
def quickstart(tmp_path: Path) -> Quickstart:
    return Quickstart(tmp_path)


ALL_PROGRAMS = [
    "spatialthinker.synthetic",
    "verl.trainer.main",
    "scripts/model_merger.py",
    "evaluation/evals.py",
    "scripts/report.py",
]


def test_stages_run_in_order_once(quickstart: Quickstart):
    output = quickstart.run("worker.actor.optim.lr=0.1")
    assert quickstart.programs() == ALL_PROGRAMS
    assert "worker.actor.optim.lr=0.1" in quickstart.calls.read_text().splitlines()[1]
    summary = quickstart.summary()
    assert summary.keys() >= SUMMARY_KEYS
    assert summary["steps"] == 2 and summary["checkpoint"].endswith("checkpoints/global_step_2")
    assert summary["reward_before"] == pytest.approx(0.35) and summary["reward_after"] == pytest.approx(0.55)
    assert summary["accuracy_before"] == summary["accuracy_after"] == 0.5
    assert summary["peak_memory_gb"] > 0
    assert "+0.200 [+0.200, +0.200]" in output

    again = quickstart.run("worker.actor.optim.lr=0.1")
    assert quickstart.programs() == ALL_PROGRAMS
    assert again.count("done before") == 5
    assert quickstart.summary() == summary


def test_log_keeps_the_last_state_of_progress_bars(quickstart: Quickstart):
    quickstart.run()
    assert (quickstart.run_dir / "train.log").read_text() == "step 1 100%|##|\nstep 2 100%|##|\n"


def test_fresh_starts_over(quickstart: Quickstart):
    quickstart.run()
    (quickstart.run_dir / "checkpoints" / "old").touch()
    quickstart.run("--fresh")
    assert quickstart.programs() == ALL_PROGRAMS * 2
    assert not (quickstart.run_dir / "checkpoints" / "old").exists()


def test_other_settings_train_again_and_say_so(quickstart: Quickstart):
    quickstart.run()
    output = quickstart.run("trainer.seed=5")
    assert quickstart.programs() == [*ALL_PROGRAMS, *ALL_PROGRAMS[1:]]
    assert "checkpoints of other settings" in output


def test_killed_run_leaves_nothing_and_goes_on(quickstart: Quickstart):
    quickstart.run_dir.mkdir()
    (quickstart.run_dir / "hang").touch()
    process = quickstart.start()
    quickstart.wait_for("hangs")
    owner = str(quickstart.run_dir.resolve())
    left = find_owned(owner)
    assert {member.name() for member in left} >= {"sleep"}
    process.send_signal(signal.SIGKILL)
    process.wait()

    (quickstart.run_dir / "hang").unlink()
    output = quickstart.run()
    assert "had left behind" in output
    assert not any(map(is_alive, left))
    assert quickstart.programs() == ["spatialthinker.synthetic", "verl.trainer.main", *ALL_PROGRAMS[1:]]
    assert (quickstart.run_dir / "train.log").read_text().count("step 1") == 1
    assert quickstart.summary()["steps"] == 2


def test_second_quickstart_in_the_same_folder_is_refused(quickstart: Quickstart):
    quickstart.run_dir.mkdir()
    (quickstart.run_dir / "hang").touch()
    process = quickstart.start()
    quickstart.wait_for("hangs")
    assert f"is in use by process {process.pid}" in quickstart.run(code=2)
    assert process.poll() is None
    process.terminate()
    process.wait()
    assert not find_owned(str(quickstart.run_dir.resolve()))


def test_failed_stage_stops_with_its_exit_code(quickstart: Quickstart):
    output = quickstart.run("trainer.max_steps=2", code=2)
    assert "train: failed with exit code 2" in output and "train.log" in output
    assert quickstart.programs() == ALL_PROGRAMS[:2]
    assert not (quickstart.run_dir / "summary.json").exists()


def test_what_is_no_override_is_refused(quickstart: Quickstart):
    assert "--frsh" in quickstart.run("--frsh", code=2)
    assert "neither an option nor a trainer override" in quickstart.run("fresh", code=2)


def test_owned_processes_are_told_apart(tmp_path: Path):
    mine = subprocess.Popen(["sleep", "60"], env=os.environ | owned_environment("mine" + str(tmp_path)))
    other = subprocess.Popen(["sleep", "60"], env=os.environ | owned_environment("other" + str(tmp_path)))
    assert kill_owned("mine" + str(tmp_path)) == 1
    assert mine.wait(timeout=5) == -signal.SIGKILL
    assert other.poll() is None
    assert kill_owned("other" + str(tmp_path)) == 1
    other.wait()


def test_memory_of_forks_counts_shared_pages_once():
    """A child that only reads what its parent holds adds next to nothing; one that writes adds what it wrote."""
    program = """
import os, sys, time
block = bytearray(os.urandom(1 << 20)) * 200
if os.fork() == 0:
    if sys.argv[1] == "writes":
        for position in range(0, len(block), 4096):
            block[position] = 1
    print("ready", flush=True)
    time.sleep(60)
    os._exit(0)
time.sleep(60)
"""
    megabytes = {}
    for kind in ("reads", "writes"):
        process = subprocess.Popen([sys.executable, "-c", program, kind], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        root = psutil.Process(process.pid)
        megabytes[kind] = read_tree_bytes(root) / 1024**2
        for member in (*root.children(), root):
            member.kill()
        process.wait()
    assert 200 < megabytes["reads"] < 240
    assert 400 < megabytes["writes"] < 440


def test_sampler_keeps_the_peak():
    peaks: list[int] = []
    sampler = MemorySampler(interval_s=0.1, on_sample=peaks.append)
    sampler.start()
    while not peaks:
        time.sleep(0.01)
    block = bytearray(os.urandom(1 << 20)) * 100
    while peaks[-1] < peaks[0] + 90 * 1024**2:
        time.sleep(0.01)
    del block
    sampler.stop()
    assert sampler.peak_bytes == peaks[-1] == max(peaks)


def test_interval_covers_the_mean_as_the_normal_one_does():
    values = np.random.default_rng(1).normal(0.5, 0.2, size=400)
    low, high = bootstrap_interval(values)
    half_width = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half_width, abs=2e-3)
    assert high == pytest.approx(values.mean() + half_width, abs=2e-3)


def test_gain_is_paired():
    before = np.random.default_rng(2).uniform(size=100)
    row = compare_metric(before, before + 0.1)
    assert row["gain_interval"] == [0.1, 0.1]
    assert row["after_interval"][0] < row["after"] - 0.02


def write_validation(folder: Path, step: int, problems: list[str]) -> None:
    rows = [{"problem": problem, "score": {"overall": 0.5, "accuracy": 1.0}} for problem in problems]
    (folder / f"validation_step_{step}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_validations_must_be_of_the_same_questions(tmp_path: Path):
    write_validation(tmp_path, 0, ["a", "b"])
    write_validation(tmp_path, 9, ["a", "c"])
    with pytest.raises(ValueError, match="not of the same questions"):
        summarize_validation(tmp_path)


def test_missing_validation_names_the_knob(tmp_path: Path):
    write_validation(tmp_path, 9, ["a"])
    with pytest.raises(ValueError, match="val_before_train"):
        summarize_validation(tmp_path)


def test_last_validation_is_the_highest_step(tmp_path: Path):
    write_validation(tmp_path, 0, ["a", "b"])
    write_validation(tmp_path, 9, ["c", "d"])
    write_validation(tmp_path, 10, ["a", "b"])
    summary = summarize_validation(tmp_path)
    assert summary["held_out_samples"] == 2
    costs = {
        "steps": 10,
        "seconds": 60.0,
        "peak_memory_gb": 5.0,
        "checkpoint": "c",
        "merged_model": "m",
        "report": "r",
    }
    assert "peak memory 5.00 GiB" in format_table(summary | costs)

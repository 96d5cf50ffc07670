import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress

import psutil
import pyarrow.parquet as pq
import pytest

from tests.support.training import (
    ROOT,
    descendants,
    find_worker,
    finish,
    kill,
    learned,
    make_data,
    metrics,
    start,
    wait_for,
    wait_for_ends,
)

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return folder


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "unbroken"
    finish(start(data, run, "trainer.max_steps=3"), run)
    return run


def test_a_killed_run_goes_on_and_repeats_the_unbroken_one(data, unbroken, tmp_path):
    """kill -9 in the middle of a step; the same command reaches the same metrics, sampled rollouts included."""
    run = tmp_path / "killed"
    process = start(data, run, "trainer.max_steps=3")
    wait_for(lambda: (run / "global_step_1" / "manifest.json").exists(), process, "first checkpoint")
    kill(process)
    (run / "global_step_7.tmp").mkdir()  # what a kill during a save leaves behind
    output = finish(start(data, run, "trainer.max_steps=3"), run)
    assert "Resumed step" in output and "Attention: scaled dot-product attention" in output
    expected, actual = metrics(unbroken), metrics(run)
    assert sorted(actual) == sorted(expected) == [1, 2, 3]
    for step in (1, 2, 3):
        assert learned(actual[step]) == learned(expected[step])
    assert not list(run.glob("*.tmp"))


def test_the_recorded_rollouts_have_the_numbers_of_the_log(unbroken):
    """Entropies of the log are those of each mini-batch's own policy, which moves after the first."""
    for step, logged in metrics(unbroken).items():
        rows = pq.read_table(unbroken / "rollouts" / f"train_step_{step:06d}.parquet").to_pylist()
        tokens = [row["response_tokens"] for row in rows]
        total = sum(row["entropy_mean"] * count for row, count in zip(rows, tokens, strict=True))
        assert total / sum(tokens) == pytest.approx(logged["actor/entropy_loss"], rel=0.05)
        assert sum(row["score"] for row in rows) / len(rows) == pytest.approx(logged["reward/overall"], rel=1e-5)
        assert logged["recording/failed_steps"] == logged["recording/dropped_steps"] == 0


def test_the_merged_model_is_the_trained_actor(unbroken, tmp_path):
    actor = unbroken / "global_step_3" / "actor"
    subprocess.run([sys.executable, "scripts/model_merger.py", "--local_dir", str(actor)], cwd=ROOT, check=True)
    import torch
    import torch.distributed.checkpoint as dcp
    from transformers import AutoModelForImageTextToText

    merged = AutoModelForImageTextToText.from_pretrained(actor / "huggingface", dtype=torch.float32)
    start_model = AutoModelForImageTextToText.from_pretrained(ROOT / "configs" / "toy_model", dtype=torch.float32)
    state = {"model": {name: torch.empty_like(value) for name, value in merged.state_dict().items()}}
    dcp.load(state, checkpoint_id=actor)
    for name, value in merged.state_dict().items():
        assert torch.equal(value, state["model"][name]), name
    assert any(not torch.equal(a, b) for a, b in zip(merged.parameters(), start_model.parameters(), strict=True))


def test_validation_sees_the_last_update(data, unbroken, tmp_path):
    """The validation after a run's last step is what its checkpoint measures in a run of its own."""
    run = tmp_path / "again"
    shutil.copytree(unbroken, run)
    measured = {key: value for key, value in metrics(unbroken)[3].items() if key.startswith("val/")}
    finish(start(data, run, "trainer.max_steps=3", "trainer.val_only=true"), run)
    assert {key: value for key, value in metrics(run)[3].items() if key.startswith("val/")} == measured
    assert "val/reward_score" in measured


@pytest.mark.nightly
def test_without_a_learning_rate_nothing_rises(data, tmp_path):
    """Validation before and after is the same to the last digit when lr is 0: a rise comes from the updates."""
    run = tmp_path / "still"
    chosen = ["trainer.max_steps=2", "trainer.val_before_train=true", "worker.actor.optim.lr=0"]
    finish(start(data, run, *chosen), run)
    rows = metrics(run)
    before = {key: value for key, value in rows[0].items() if key.startswith("val/")}
    after = {key: value for key, value in rows[2].items() if key.startswith("val/")}
    assert before == after and "val/reward_score" in before
    samples = [json.loads(line) for line in (run / "validation_step_2.jsonl").read_text().splitlines()]
    assert len(samples) == 16


@pytest.mark.parametrize(("name", "rank"), [pytest.param("rollout", 0, marks=pytest.mark.nightly), ("actor", 1)])
def test_a_dead_worker_ends_the_run_with_its_name(data, tmp_path, name, rank):
    run = tmp_path / "dead"
    process = start(data, run, "trainer.max_steps=50")
    wait_for(lambda: (run / "global_step_1" / "manifest.json").exists(), process, "first checkpoint")
    find_worker(process, name, rank).kill()
    output = finish(process, run, timeout_s=60, code=2)
    message = output.rpartition("\nError: ")[2]
    assert f"{name} rank {rank}" in message and "died" in message
    assert not list(run.glob("*.tmp"))


@pytest.mark.parametrize(
    "script",
    ["", "scripts/spatialthinker_3b_grpo.sh"],
    ids=["program", "script"],
)
@pytest.mark.nightly
def test_sigterm_to_all_processes_saves_the_last_update(data, tmp_path, script):
    """SLURM and systemd send TERM to all of a job, srun forwards it, and KILL ends what is left after a grace."""
    run = tmp_path / "stopped"
    process = start(data, run, "trainer.max_steps=50", "trainer.save_freq=-1", script=script)
    log = run / "experiment_log.jsonl"
    wait_for(lambda: log.is_file() and log.read_text().count("\n") >= 2, process, "second step")
    for _ in range(2):
        for each in [psutil.Process(process.pid), *descendants(process)]:
            with suppress(psutil.NoSuchProcess):
                each.terminate()
    left = descendants(process)
    output = finish(process, run, timeout_s=90, code=128 + signal.SIGTERM)
    wait_for_ends(left)
    steps = sorted(metrics(run))
    assert (run / f"global_step_{steps[-1]}" / "manifest.json").exists(), output
    assert "Traceback" not in output
    if script:
        last = f"trainer.max_steps={steps[-1] + 1}"
        finish(start(data, run, last, "trainer.save_freq=-1", script=script), run)
        assert sorted(metrics(run)) == [*steps, steps[-1] + 1]


STALLING_REWARD = """
import time
calls = 0
def main(items):
    global calls
    calls += 1
    while calls > 3:
        time.sleep(1)
    return [{"overall": float(len(item["response"]) % 7)} for item in items]
"""


@pytest.mark.nightly
@pytest.mark.parametrize("hang", ["reward", "engine", "rank", "save"])
def test_two_ctrl_c_end_a_run_that_hangs(data, tmp_path, hang):
    """Hanging parts cannot save; the second signal says what is lost, and leaves no process."""
    run = tmp_path / "hanging"
    (tmp_path / "reward.py").write_text(STALLING_REWARD)
    chosen = [f"worker.reward.reward_function={tmp_path / 'reward.py'}:main"] if hang == "reward" else []
    process = start(data, run, "trainer.max_steps=50", "trainer.save_freq=-1", *chosen)
    log = run / "experiment_log.jsonl"
    wait_for(lambda: log.is_file() and log.read_text().count("\n") >= 2, process, "second step")
    output = run.with_suffix(".log")
    if hang != "reward":
        find_worker(process, "rollout" if hang == "engine" else "actor", 0).suspend()
    if hang == "save":
        process.send_signal(signal.SIGINT)
        wait_for(lambda: "Stopping: " in output.read_text(), process, "answer to the signal")
    started = descendants(process)
    for _ in range(2):
        os.kill(process.pid, signal.SIGINT)
        wait_for(lambda: "Stopping: " in output.read_text() or process.poll() is not None, process, "an answer")
    assert process.wait(30) == -signal.SIGINT
    wait_for_ends(started)
    assert "are not saved and lost; the same command begins again" in output.read_text()

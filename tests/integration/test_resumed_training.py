"""A run that ended anywhere goes on as if it had not; real loop, ranks, updates and checkpoints, recorded rollouts."""

import os
import random
import resource
import shutil
import signal
import time

import psutil
import pytest
from datasets import Dataset

from tests.support.forked_run import fork, kill, kill_at, make_config, make_inputs, run
from tests.support.training import learned, metrics
from verl.distributed import checkpoint
from verl.distributed.single_controller import WorkerError

pytestmark = pytest.mark.integration

KILLS = {
    "while sampling at the epoch's end": ("generate", 3),  # a validation samples too
    "in the middle of an epoch's update": ("update_actor", 2),
    "while a checkpoint is written": ("save_fault", 2),
}
EVERY_STEP = [1, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def unbroken(inputs):
    folders = {}

    def find(ranks: int):
        if ranks not in folders:
            folders[ranks] = inputs / f"unbroken_{ranks}"
            assert run(make_config(inputs, folders[ranks], *shared_by(ranks))) == 0
        return steps(folders[ranks])

    return find


def shared_by(ranks: int, batch_of: int | None = None) -> list[str]:
    """Overrides of a run on so many ranks, with the mini-batch that `batch_of` ranks (the same by default) need."""
    large = ["worker.actor.global_batch_size=4"]
    return [f"trainer.n_gpus_per_node={ranks}", *(large if (batch_of or ranks) == 4 else [])]


def steps(folder):
    return {step: learned(row) for step, row in metrics(folder).items()}


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.nightly), 2])
def test_a_killed_run_repeats_the_unbroken_one(inputs, unbroken, tmp_path, ranks):
    """kill -9 at three points, one after the other: afterwards every step's metrics are the same bit for bit."""
    config = make_config(inputs, tmp_path / "run", f"trainer.n_gpus_per_node={ranks}")
    for point in KILLS.values():
        assert run(config, kill_at(*point)) == -signal.SIGKILL
    assert run(config) == 0
    assert sorted(steps(tmp_path / "run")) == EVERY_STEP
    assert steps(tmp_path / "run") == unbroken(ranks)


@pytest.mark.nightly
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_killed_at_random_moments_repeats_the_unbroken_one(inputs, unbroken, tmp_path, ranks):
    config = make_config(inputs, tmp_path / "run", f"trainer.n_gpus_per_node={ranks}")
    moments = random.Random(ranks)
    codes = []
    while codes.count(-signal.SIGKILL) < 12:  # a run that reaches its end in time starts over
        process = fork(config)
        time.sleep(moments.uniform(0.3, 2.5))
        codes.append(kill(process))
        if codes[-1] == 0:
            assert steps(tmp_path / "run") == unbroken(ranks)
            shutil.rmtree(tmp_path / "run")
    assert run(config) == 0
    assert steps(tmp_path / "run") == unbroken(ranks)


OTHER_RANKS = [(2, 1), pytest.param(4, 2, marks=pytest.mark.nightly), pytest.param(4, 1, marks=pytest.mark.nightly)]


@pytest.mark.parametrize(("before", "after"), OTHER_RANKS)
def test_a_run_goes_on_with_fewer_ranks(inputs, unbroken, tmp_path, before, after):
    config = make_config(inputs, tmp_path / "run", *shared_by(before))
    assert run(config, kill_at("update_actor", 4)) == -signal.SIGKILL
    assert run(make_config(inputs, tmp_path / "run", *shared_by(after, before))) == 0
    actual, expected = steps(tmp_path / "run"), unbroken(before)
    for step in EVERY_STEP:
        assert actual[step] == pytest.approx(expected[step], rel=1e-5, abs=1e-5), step
    assert actual[4] != expected[4]  # sums in another order


@pytest.mark.parametrize("signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.nightly)])
def test_an_interrupted_run_saves_and_goes_on(inputs, unbroken, tmp_path, signum):
    config = make_config(inputs, tmp_path / "run", "trainer.n_gpus_per_node=1", "trainer.save_freq=-1")

    def interrupt(method: str, times: int) -> None:
        if (method, times) == ("compute_ref_log_probs" if signum == signal.SIGINT else "update_actor", 3):
            os.kill(os.getpid(), signum)

    assert run(config, interrupt) == 128 + signum
    saved = 2 if signum == signal.SIGINT else 3  # an update that has begun is finished first
    assert checkpoint.find_latest(tmp_path / "run").name == f"global_step_{saved}"
    assert run(config) == 0
    assert steps(tmp_path / "run") == unbroken(1)


@pytest.mark.nightly
def test_a_reward_that_raises_leaves_all_that_was_trained(inputs, unbroken, tmp_path):
    config = make_config(inputs, tmp_path / "run", "trainer.n_gpus_per_node=1", "trainer.save_freq=-1")
    assert run(config, fails_at=4) == 2  # in step 3: a validation is scored too
    assert (tmp_path / "run.log").read_text().count("ZeroDivisionError: no score today") == 1
    assert run(config) == 0
    assert steps(tmp_path / "run") == unbroken(1)


def fill_disk(at: int, until: int):
    """From one save to another no rank can write a file of more than 100 kB, as if the disk was full."""

    def on_call(method: str, times: int) -> None:
        if method == "save" and times in (at, until):
            limit = 100_000 if times == at else resource.RLIM_INFINITY
            for rank in psutil.Process().children():
                resource.prlimit(rank.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    return on_call


def test_a_full_disk_leaves_the_checkpoint_before_and_the_run_goes_on(inputs, unbroken, tmp_path):
    config = make_config(inputs, tmp_path / "run", "trainer.on_save_error=continue")
    assert run(config, fill_disk(2, 4)) == 0
    output = (tmp_path / "run.log").read_text()
    assert "Warning: the checkpoint of step 2 could not be written (" in output and "GiB free)" in output
    assert f"the newest whole checkpoint is {tmp_path / 'run' / 'global_step_1'}; going on" in output
    rows = steps(tmp_path / "run")
    assert rows[5].pop("checkpoint/failed_saves") == 2
    assert rows[5] == {key: value for key, value in unbroken(2)[5].items() if key != "checkpoint/failed_saves"}
    assert checkpoint.find_latest(tmp_path / "run").name == "global_step_5"
    assert not list((tmp_path / "run").glob("*.tmp"))


@pytest.mark.nightly
def test_a_full_disk_stops_the_run_and_the_checkpoint_before_is_whole(inputs, unbroken, tmp_path):
    config = make_config(inputs, tmp_path / "run", "trainer.n_gpus_per_node=1")
    assert run(config, fill_disk(2, 9)) == 2
    message = (tmp_path / "run.log").read_text()
    assert "could not be written" in message and "trainer.on_save_error=continue" in message
    assert checkpoint.find_latest(tmp_path / "run").name == "global_step_1"
    assert run(config) == 0
    assert steps(tmp_path / "run") == unbroken(1)


@pytest.mark.nightly
def test_weights_alone_are_smaller_and_train_on_with_a_new_optimizer(inputs, unbroken, tmp_path):
    chosen = ["trainer.n_gpus_per_node=1", "trainer.save_model_only=true"]
    assert run(make_config(inputs, tmp_path / "run", *chosen, "trainer.max_steps=2")) == 0
    unbroken(1)
    whole, alone = (size(folder / "global_step_2") for folder in (inputs / "unbroken_1", tmp_path / "run"))
    assert alone < 0.5 * whole
    assert run(make_config(inputs, tmp_path / "run", *chosen)) == 0
    assert "it holds no optimizer, which starts anew" in (tmp_path / "run.log").read_text()
    assert sorted(steps(tmp_path / "run")) == EVERY_STEP


def size(folder) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.distcp"))


def test_the_best_checkpoint_stays_and_old_ones_go(inputs, unbroken):
    unbroken(1)
    folder = inputs / "unbroken_1"
    scores = {step: row["val/reward_score"] for step, row in metrics(folder).items() if "val/reward_score" in row}
    best = max(scores, key=lambda step: scores[step])
    kept = {int(path.name.split("_")[-1]) for path in folder.glob("global_step_*")}
    assert kept == {best, 4, 5}
    assert checkpoint.read_trainer_state(folder / "global_step_5")["best"] == {"step": best, "score": scores[best]}


@pytest.mark.nightly
def test_a_damaged_checkpoint_is_named_or_passed_over(inputs, unbroken, tmp_path):
    unbroken(1)
    shutil.copytree(inputs / "unbroken_1", tmp_path / "run")
    shard = next((tmp_path / "run" / "global_step_5" / "actor").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    config = make_config(inputs, tmp_path / "run", "trainer.n_gpus_per_node=1")
    assert run(config) == 0
    assert f"Skipping checkpoint: {shard} should have" in (tmp_path / "run.log").read_text()
    assert steps(tmp_path / "run") == unbroken(1)


@pytest.mark.parametrize("again", [6, pytest.param(9, marks=pytest.mark.nightly)])
def test_a_last_checkpoint_that_failed_is_tried_once_more_and_then_an_error(inputs, unbroken, tmp_path, again):
    config = make_config(inputs, tmp_path / "run", "trainer.n_gpus_per_node=1", "trainer.on_save_error=continue")
    code = run(config, fill_disk(5, again))
    output = (tmp_path / "run.log").read_text()
    assert "Warning: the checkpoint of step 5 could not be written" in output
    assert code == (0 if again == 6 else 2)
    assert ("step 5, the run's last, could not be saved" in output) is (again != 6)
    assert run(config) == 0
    assert checkpoint.find_latest(tmp_path / "run").name == "global_step_5"


@pytest.mark.parametrize(("role", "saved"), [("rollout", "global_step_2"), ("actor", None)])
def test_an_engines_death_saves_and_a_ranks_does_not(inputs, unbroken, tmp_path, role, saved):
    config = make_config(inputs, tmp_path / "run", "trainer.n_gpus_per_node=1", "trainer.save_freq=-1")

    def die(method: str, times: int) -> None:
        if (method, times) == ("load_groups", 3):
            raise WorkerError(f"{role} rank 0 of 1: its process died", role)

    assert run(config, die) == 2
    assert f"{role} rank 0 of 1: its process died" in (tmp_path / "run.log").read_text()
    latest = checkpoint.find_latest(tmp_path / "run")
    assert (latest and latest.name) == saved
    assert run(config) == 0
    assert steps(tmp_path / "run") == unbroken(1)


def test_a_run_that_goes_back_learns_from_there_and_keeps_what_it_left(inputs, unbroken, tmp_path):
    chosen = ["trainer.n_gpus_per_node=1", "trainer.save_limit=-1"]
    assert run(make_config(inputs, tmp_path / "run", *chosen)) == 0
    before = steps(tmp_path / "run")
    start = tmp_path / "run" / "global_step_2"
    back = [*chosen, f"trainer.load_checkpoint_path={start}", "worker.actor.optim.lr=5e-4", "trainer.save_limit=1"]
    config = make_config(inputs, tmp_path / "run", *back)
    assert run(config, kill_at("update_actor", 2)) == -signal.SIGKILL
    assert "worker.actor.optim.lr changes from 0.001 to 0.0005" in (tmp_path / "run.log").read_text()
    assert run(config) == 0
    after = steps(tmp_path / "run")
    assert [after[step] == before[step] for step in EVERY_STEP] == [True, True, False, False, False]
    assert after[3]["actor/lr"] == pytest.approx(0.5 * before[3]["actor/lr"])
    kept = {path.name for path in (tmp_path / "run").glob("global_step_*")}
    assert {"global_step_2", "global_step_5"} <= kept
    aside = tmp_path / "run" / "abandoned_1"
    assert {path.name for path in aside.glob("global_step_*")} == {f"global_step_{step}" for step in (3, 4, 5)}
    assert steps(aside) == before and not (tmp_path / "run" / "abandoned_2").exists()


def test_what_no_longer_fits_is_refused_before_a_step_is_trained(inputs, tmp_path):
    lora = ["worker.actor.model.lora.rank=4", "worker.actor.model.lora.alpha=64"]
    chosen = ["trainer.n_gpus_per_node=1", "trainer.max_steps=2", *lora]
    assert run(make_config(inputs, tmp_path / "run", *chosen)) == 0
    before = (tmp_path / "run" / "experiment_log.jsonl").read_text()
    short = tmp_path / "short"
    short.mkdir()
    rows = Dataset.from_parquet(str(inputs / "train-0.parquet"))
    rows.select([0, *range(2, len(rows))]).to_parquet(short / "train-0.parquet")
    shutil.copytree(inputs / "model", tmp_path / "other")
    (weights,) = (tmp_path / "other").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    for override, words in (
        ("worker.actor.model.lora.alpha=8", "set worker.actor.model.lora.alpha=64"),
        ("worker.actor.optim.weight_decay=0.5", "set worker.actor.optim.weight_decay="),
        ("data.rollout_batch_size=2", "set data.rollout_batch_size=4"),
        (f"data.train_files={short}@train", "the training rows differ"),
        (f"worker.actor.model.model_path={tmp_path / 'other'}", "the base model differ"),
    ):
        assert run(make_config(inputs, tmp_path / "run", *chosen, "trainer.max_steps=5", override)) == 2
        assert words in (tmp_path / "run.log").read_text()
    assert (tmp_path / "run" / "experiment_log.jsonl").read_text() == before
    assert checkpoint.find_latest(tmp_path / "run").name == "global_step_2"


def test_validation_alone_at_an_older_step_voids_nothing(inputs, tmp_path):
    chosen = ["trainer.n_gpus_per_node=1", "trainer.save_limit=-1", "trainer.max_steps=3"]
    assert run(make_config(inputs, tmp_path / "run", *chosen)) == 0
    before = metrics(tmp_path / "run")
    start = tmp_path / "run" / "global_step_1"
    only = ["trainer.val_only=true", f"trainer.load_checkpoint_path={start}"]
    assert run(make_config(inputs, tmp_path / "run", *chosen, *only)) == 0
    after = metrics(tmp_path / "run")
    assert {step: after[step] for step in (2, 3)} == {step: before[step] for step in (2, 3)}
    assert {path.name for path in (tmp_path / "run").glob("global_step_*")} == {f"global_step_{s}" for s in (1, 2, 3)}

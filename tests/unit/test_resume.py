"""A run that ended anywhere goes on as if it had not; real loop, ranks, updates and checkpoints, recorded rollouts."""

import signal

import pytest

from tests.e2e.training import learned, metrics
from tests.forked_run import make_config, make_inputs, run

KILLS = {
    "while sampling at the epoch's end": ("generate", 3),
    "in the middle of an epoch's update": ("update_actor", 2),
    "while a checkpoint is written": ("save_fault", 2),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def unbroken(inputs):
    runs = {}

    def find(ranks: int):
        if ranks not in runs:
            runs[ranks] = inputs / f"unbroken_{ranks}"
            assert run(make_config(inputs, runs[ranks], f"trainer.n_gpus_per_node={ranks}")) == 0
        return {step: learned(row) for step, row in metrics(runs[ranks]).items()}

    return find


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_run_repeats_the_unbroken_one(inputs, unbroken, tmp_path, ranks):
    """kill -9 at three points, one after the other: afterwards every step's metrics are the same bit for bit."""
    config = make_config(inputs, tmp_path / "run", f"trainer.n_gpus_per_node={ranks}")
    for kill_at in KILLS.values():
        assert run(config, kill_at) == -signal.SIGKILL
    assert run(config) == 0
    actual = {step: learned(row) for step, row in metrics(tmp_path / "run").items()}
    assert sorted(actual) == [1, 2, 3, 4, 5]
    assert actual == unbroken(ranks)

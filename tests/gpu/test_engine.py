"""On a GPU: the engine and the trainer that share it see the same policy, and give its memory back to each other."""

from pathlib import Path

import pytest

from tests.e2e.training import finish, make_data, metrics, start
from tests.engines import check_cycles, workers
from tests.gpu import BF16, LEARNING, ON_GPU, SHORT, check_rise

pytestmark = pytest.mark.gpu
NUM_CYCLES = 20


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "rows"
    make_data(folder, num_train=512, num_val=64)
    return folder


@pytest.mark.parametrize("engine", [["enforce_eager=true"], ["enforce_eager=false", "shared_prompt=true"]], ids=str)
def test_log_probs_agree_after_every_sync_and_memory_does_not_grow(data, engine):
    with workers(data, *ON_GPU, *BF16, *SHORT, *[f"worker.rollout.{choice}" for choice in engine]) as parts:
        check_cycles(*parts, NUM_CYCLES)


def test_ten_steps_learn(data, tmp_path):
    run = tmp_path / "run"
    finish(start(data, run, *ON_GPU, *LEARNING), run, timeout_s=400)
    check_rise(metrics(run))

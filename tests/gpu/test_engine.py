"""On a GPU: the engine and the trainer that share it see the same policy, and give its memory back to each other."""

from pathlib import Path

import pytest

from tests.support.cpu_offload import ALWAYS, RELEASED
from tests.support.engines import check_cycles, workers
from tests.support.gpus import BF16, LEARNING, ON_GPU, SHORT, check_rise
from tests.support.training import finish, make_data, metrics, start

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "rows"
    make_data(folder, num_train=512, num_val=64)
    return folder


@pytest.mark.parametrize(
    ("choices", "num_cycles"),
    [
        ([], 20),
        (["worker.rollout.enforce_eager=true", "worker.rollout.shared_prompt=false"], 4),
        (["worker.rollout.enforce_eager=true", *RELEASED], 4),
        (["worker.rollout.enforce_eager=true", *ALWAYS], 4),
    ],
    ids=["as configured", "prompts repeated", "waiting in host memory", "always in host memory"],
)
def test_log_probs_agree_after_every_sync_and_memory_does_not_grow(data, choices, num_cycles):
    with workers(data, *ON_GPU, *BF16, *SHORT, *choices) as parts:
        check_cycles(*parts, num_cycles)


def test_ten_steps_learn(data, tmp_path):
    run = tmp_path / "run"
    finish(start(data, run, *ON_GPU, *LEARNING), run, timeout_s=400)
    check_rise(metrics(run))

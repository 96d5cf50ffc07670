"""An engine of two processes beside two training ranks, on a CPU."""

import pytest

from tests.support.engines import check_cycles, workers
from tests.support.training import make_data

pytestmark = [pytest.mark.e2e, pytest.mark.nightly]


def test_all_its_processes_take_new_weights_and_sample_alike(tmp_path):
    make_data(tmp_path / "rows")
    chosen = ["trainer.device=cpu", "data.max_response_length=48", "worker.rollout.tensor_parallel_size=2"]
    with workers(tmp_path / "rows", *chosen) as parts:
        check_cycles(*parts, num_cycles=3)

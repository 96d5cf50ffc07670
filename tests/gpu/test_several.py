"""On several GPUs of one machine: what one of them computes, beside engines of one GPU each and of all together."""

import sys
import time
from pathlib import Path

import pytest

from tests.support.engines import check_cycles, workers
from tests.support.gpus import BF16, LEARNING, NUM_GPUS, ON_GPU, SHORT, check_rise, counts
from tests.support.training import find_worker, finish, make_data, metrics, start, wait_for
from tests.support.updates import check_checkpoints, check_passes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(NUM_GPUS < 2, reason=f"needs 2 GPUs on this machine; {NUM_GPUS} visible"),
]
NUM_CYCLES = 5


def on(num_gpus: int) -> list[str]:
    return [*ON_GPU, f"trainer.n_gpus_per_node={num_gpus}"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "rows"
    make_data(folder, num_train=512, num_val=64)
    return folder


@pytest.mark.parametrize("num_ranks", counts(2, 4))
def test_log_probs_and_gradients_are_those_of_one_gpu(tmp_path, num_ranks):
    check_passes(tmp_path, num_ranks, "cuda")


@pytest.mark.parametrize("num_ranks", counts(2, 4))
def test_checkpoints_are_the_same_for_any_number_of_gpus(tmp_path, num_ranks):
    fewer = [n for n in (2, 1) if n < num_ranks]
    check_checkpoints(tmp_path, (num_ranks, *fewer, num_ranks), "cuda")


@pytest.mark.parametrize("gpus_per_engine", [1, 2])
@pytest.mark.parametrize("num_ranks", counts(2, 4))
def test_engines_beside_the_ranks_agree_with_them_after_every_sync(data, num_ranks, gpus_per_engine):
    shape = f"worker.rollout.tensor_parallel_size={gpus_per_engine}"
    with workers(data, *on(num_ranks), *BF16, *SHORT, shape) as parts:
        assert len(parts[1]) == num_ranks // gpus_per_engine
        check_cycles(*parts, NUM_CYCLES)


@pytest.mark.parametrize("num_gpus", counts(2, 4))
def test_several_gpus_learn_what_one_does(data, tmp_path, num_gpus):
    """Samples differ, since every engine draws its own; the curve may not lie more than a third of its rise below."""
    levels = {}
    for number in (1, num_gpus):
        run = tmp_path / f"run_{number}"
        finish(start(data, run, *on(number), *LEARNING), run, timeout_s=300)
        levels[number] = check_rise(metrics(run))
        steps = [row["timing_s/step"] for _, row in sorted(metrics(run).items())]
        print(f"{number} GPUs: seconds a step {steps}", file=sys.stderr)
    first, last = levels[1]
    assert levels[num_gpus][1] > last - (last - first) / 3


def test_a_killed_rank_is_named_and_the_run_goes_on(data, tmp_path):
    run = tmp_path / "run"
    eager = "worker.rollout.enforce_eager=true"  # graphs would only take their time, twice
    process = start(data, run, *on(2), eager, "trainer.max_steps=200")
    wait_for(lambda: (run / "global_step_2" / "manifest.json").exists(), process, "checkpoint")
    find_worker(process, "actor", 1).kill()
    killed = time.monotonic()
    message = finish(process, run, timeout_s=60, code=2).rpartition("\nError: ")[2]
    print(f"ended {time.monotonic() - killed:.1f} s after the kill: {message[:200]}", file=sys.stderr)
    assert "actor rank 1 of 2" in message and "died" in message
    done = max(metrics(run))
    output = finish(start(data, run, *on(2), eager, f"trainer.max_steps={done + 2}"), run, timeout_s=240)
    assert "Resumed step" in output
    assert sorted(metrics(run)) == list(range(1, done + 3))

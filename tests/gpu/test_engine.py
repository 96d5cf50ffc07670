"""On a GPU: the engine and the trainer that share it see the same policy, and give its memory back to each other."""

from pathlib import Path

import pytest
import ray
import torch

from tests.support.cpu_offload import ALWAYS, RELEASED
from tests.support.engines import check_cycles, used_gib, workers
from tests.support.gpus import BF16, LEARNING, ON_GPU, SHORT, check_rise
from tests.support.training import ROOT, finish, make_data, metrics, start
from verl.config.loading import load_config
from verl.trainer.main import start_ray
from verl.trainer.worker_groups import find_place, place_ranks

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


def test_ranks_use_no_gpu_until_they_load(data):
    """Memory that they took while the engine measures its own would be missing in its cache."""
    files = [f"data.train_files={data}@train", f"data.val_files={data}@val"]
    config = load_config([f"config={ROOT / 'configs' / 'toy_cpu.yaml'}", *files, *ON_GPU, *BF16])
    start_ray(config, "cuda")
    try:
        actor = place_ranks(config, "cuda", 10, find_place(config, "cuda"))
        before = used_gib()
        actor.read()
        assert max(used_gib()) - max(before) < 0.1
        actor.load(*actor.run_on(0, "open_store"))
        assert max(used_gib()) - max(before) > 0.1
        segments = actor.actors[0].__ray_call__.remote(lambda _: torch.cuda.memory_snapshot())
        assert all(segment["is_expandable"] for segment in ray.get(segments))
    finally:
        ray.shutdown()


def test_a_share_that_fits_the_empty_gpu_alone_is_named(data, tmp_path):
    """The engine's context takes less than 0.9 GiB, and the rank's with its buffers more than what that leaves."""
    free, total = torch.cuda.mem_get_info()
    share = int(10_000 * (free - 0.9 * 2**30) / total) / 10_000
    chosen = [f"worker.rollout.gpu_memory_utilization={share}", "worker.rollout.enforce_eager=true"]
    run = tmp_path / "run"
    output = finish(start(data, run, *ON_GPU, *LEARNING, *chosen), run, code=2)
    assert f"worker.rollout.gpu_memory_utilization = {share:g}: the engine's share is" in output


def test_ten_steps_learn(data, tmp_path):
    run = tmp_path / "run"
    finish(start(data, run, *ON_GPU, *LEARNING), run, timeout_s=400)
    check_rise(metrics(run))

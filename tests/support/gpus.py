"""Overrides, limits and marks of the tests on GPUs."""

import sys
from collections.abc import Mapping

import pytest
import torch

NUM_GPUS = torch.cuda.device_count()
ON_GPU = [
    "trainer.device=cuda",
    "trainer.n_gpus_per_node=1",
    "worker.rollout.dtype=bf16",
    "worker.rollout.gpu_memory_utilization=0.3",
    "worker.reward.score_function=r1v_scene",
]
BF16 = ["worker.actor.fsdp.torch_dtype=bf16", "worker.actor.fsdp.mp_param_dtype=bf16"]
SHORT = ["data.max_response_length=48"]
LEARNING = [
    "data.rollout_batch_size=128",
    "data.max_response_length=128",
    "worker.rollout.n=8",
    "worker.actor.global_batch_size=32",
    "trainer.max_steps=10",
    "trainer.save_freq=-1",
]
NUM_AVERAGED = 3
SMALLEST_RISE = 0.03


def check_rise(rows: Mapping[int, Mapping[str, float]]) -> tuple[float, float]:
    """Mean rewards of the first and of the last steps, which must be higher."""
    rewards = [row["reward/overall"] for _, row in sorted(rows.items())]
    print("rewards", rewards, file=sys.stderr)
    first, last = (sum(part) / NUM_AVERAGED for part in (rewards[:NUM_AVERAGED], rewards[-NUM_AVERAGED:]))
    assert last > first + SMALLEST_RISE
    return first, last


def counts(*numbers: int) -> list:
    """Numbers of ranks; those for which there are too few GPUs are skipped."""
    lacks = "needs {} GPUs on this machine; {} visible"
    return [pytest.param(n, marks=pytest.mark.skipif(n > NUM_GPUS, reason=lacks.format(n, NUM_GPUS))) for n in numbers]


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())

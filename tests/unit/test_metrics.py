"""Metrics of a step, by hand-worked numbers."""

import pytest
import torch

from verl.protocol import DataProto
from verl.trainer.metrics import (
    compute_data_metrics,
    compute_memory_metrics,
    compute_timing_metrics,
    reduce_metrics,
)


def groups() -> DataProto:
    """Two prompts of 3 and 4 tokens, with responses of 1 and 3, then of 2 and 0 tokens; P = 4, R = 3."""
    return DataProto.from_dict(
        {
            "prompt_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]),
            "response_mask": torch.tensor([[[1, 0, 0], [1, 1, 1]], [[1, 1, 0], [0, 0, 0]]]),
            "scores": torch.tensor([[0.0, 1.0], [0.5, 0.5]]),
            "rewards": torch.tensor([[-0.5, 1.0], [0.5, 0.0]]),
            "advantages": torch.tensor([[-1.0, 1.0], [0.25, 9.0]]),
            "returns": torch.tensor([[-1.0, 1.0], [0.25, 9.0]]),
        }
    )


def test_data_metrics():
    metrics = compute_data_metrics(groups(), max_prompt_length=4, max_response_length=3)
    expected = {
        "critic/score/mean": 0.5,
        "critic/score/max": 1.0,
        "critic/rewards/min": -0.5,
        "critic/rewards/mean": 0.25,
        # (-1 x 1 + 1 x 3 + 0.25 x 2) / 6 tokens; the response without tokens has no say.
        "critic/advantages/mean": 2.5 / 6,
        "critic/advantages/max": 1.0,
        "critic/returns/mean": 2.5 / 6,
        "response_length/mean": 1.5,
        "response_length/max": 3,
        "response_length/min": 0,
        "response_length/clip_ratio": 0.25,
        "prompt_length/mean": 3.5,
        "prompt_length/clip_ratio": 0.5,
        "perf/num_response_tokens": 6,
        "perf/total_num_tokens": 6 + 2 * 7,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


def test_a_critic_is_measured_by_the_returns_that_it_explains():
    data = groups()
    # Response tokens in order: returns 1 2 3 4 5 6, values off by 1 -1 1 -1 1 -1; variances 3.5 and 1.2.
    data.batch["returns"] = torch.tensor([[[1.0, 9, 9], [2, 3, 4]], [[5, 6, 9], [9, 9, 9]]])
    data.batch["values"] = torch.tensor([[[0.0, 9, 9], [3, 2, 5]], [[4, 7, 9], [9, 9, 9]]])
    data.batch["advantages"] = data.batch["returns"] - data.batch["values"]
    metrics = compute_data_metrics(data, 4, 3)
    assert metrics["critic/vf_explained_var"] == pytest.approx(1 - 1.2 / 3.5, abs=1e-5)
    assert metrics["critic/values/max"] == 7 and metrics["critic/returns/mean"] == 3.5
    assert metrics["critic/advantages/mean"] == 0


def test_data_metrics_without_any_response_token_are_zero_and_not_nan():
    data = groups()
    data.batch["response_mask"] = torch.zeros_like(data.batch["response_mask"])
    metrics = compute_data_metrics(data, 4, 3)
    assert metrics["critic/advantages/mean"] == metrics["response_length/max"] == 0
    assert all(value == value for value in metrics.values())


def test_the_padded_width_changes_nothing():
    wide = groups()
    wide.batch["response_mask"] = torch.nn.functional.pad(wide.batch["response_mask"], (0, 5))
    wide.batch["prompt_mask"] = torch.nn.functional.pad(wide.batch["prompt_mask"], (5, 0))
    assert compute_data_metrics(wide, 4, 3) == compute_data_metrics(groups(), 4, 3)


def test_timing_metrics():
    data = {"perf/num_response_tokens": 6, "perf/total_num_tokens": 20}
    metrics = compute_timing_metrics({"step": 4.0, "gen": 3.0, "update_actor": 0.5, "load": 0.25}, data, num_ranks=2)
    assert metrics == {
        "timing_s/step": 4.0,
        "timing_s/gen": 3.0,
        "timing_s/update_actor": 0.5,
        "timing_s/load": 0.25,
        "timing_per_token_ms/gen": 500.0,
        "timing_per_token_ms/update_actor": 25.0,
        "perf/time_per_step": 4.0,
        "perf/throughput": 2.5,
    }


def test_worker_metrics_are_weighted_means_and_memory_is_a_maximum():
    ranks = [
        {"actor/pg_loss": (6.0, 3), "perf/max_memory_reserved_gb": (5.0, 1.0), "actor/grad_norm": (0.0, 0)},
        {"actor/pg_loss": (2.0, 1), "perf/max_memory_reserved_gb": (7.0, 1.0), "only/here": (1.0, 2)},
    ]
    assert reduce_metrics(ranks) == {"actor/pg_loss": 2.0, "perf/max_memory_reserved_gb": 7.0, "only/here": 0.5}


def test_splitting_tokens_over_ranks_does_not_change_a_mean():
    values = torch.arange(10.0)
    whole = [{"x": (values.sum().item(), 10)}]
    split = [{"x": (part.sum().item(), len(part))} for part in values.split([1, 2, 7])]
    assert reduce_metrics(whole) == reduce_metrics(split)


def test_memory_is_that_of_this_machine_and_process():
    metrics = compute_memory_metrics()
    assert 0 < metrics["perf/driver_memory_gb"] < metrics["perf/cpu_memory_used_gb"] * 2

"""Validation results: mean rewards and one record per sample."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from verl.protocol import DataProto
from verl.reward import PendingRewards


@dataclass
class Validation:
    """Mean rewards by metric name, and one record per sample."""

    metrics: dict[str, float]
    records: list[dict[str, Any]]


def collect_scores(answered: Sequence[tuple[DataProto, PendingRewards]]) -> Validation:
    """Waits for the scores of batches of prompts with responses, and aggregates them."""
    totals: dict[str, list[float]] = {}
    records = []
    for groups, pending in answered:
        scores = pending.result()
        for key, values in scores.items():
            totals.setdefault(key, []).extend(values.flatten().tolist())
        records += _records(groups, pending.texts, scores)
    metrics = {f"val/{key}_reward": sum(values) / len(records) for key, values in totals.items()}
    metrics["val/reward_score"] = metrics["val/overall_reward"]
    return Validation(metrics, records)


def _records(groups: DataProto, texts: list[str], scores: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    num_samples = scores["overall"].shape[1]
    flat = {key: values.flatten().tolist() for key, values in scores.items()}
    lengths = groups.batch["response_mask"].sum(-1).flatten().tolist()
    return [
        {key: str(groups.non_tensor_batch[key][i // num_samples]) for key in ("uid", "problem", "ground_truth")}
        | {"sample": i % num_samples, "response": text, "response_length": lengths[i]}
        | {"score": {key: values[i] for key, values in flat.items()}}
        for i, text in enumerate(texts)
    ]

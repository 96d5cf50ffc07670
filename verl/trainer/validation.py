"""Validation results: mean rewards and one record per sample."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from verl.config.records import Config
from verl.data.dataset import RLHFDataset, collate_prompts
from verl.protocol import DataProto
from verl.reward import PendingRewards, RewardManager
from verl.trainer.batches import Generate, train_sampling
from verl.trainer.recording.answered import Answered


@dataclass
class Validation:
    """Mean rewards by metric name, one record per sample, and the batches that were answered."""

    metrics: dict[str, float]
    records: list[dict[str, Any]]
    answered: list[Answered]


def validate(
    config: Config,
    val_set: RLHFDataset,
    pad_token_id: int,
    generate: Generate,
    reward: RewardManager,
    step: int = 0,
) -> Validation:
    """Scores of the policy on the validation prompts, in batches of data.val_batch_size."""
    rollout, size = config.worker.rollout, config.data.val_batch_size
    sampling = train_sampling(rollout) | {"n": 1} | rollout.val_override_config
    size = len(val_set) if size < 0 else size
    answered = []
    for start in range(0, len(val_set), size):
        rows = val_set.readable(range(start, min(start + size, len(val_set))))
        groups = generate(collate_prompts([val_set[row] for row in rows], pad_token_id), sampling, 0)
        answered.append((groups, reward.submit(groups, step)))
    return collect_scores(answered)


def collect_scores(answered: Sequence[tuple[DataProto, PendingRewards]]) -> Validation:
    """Waits for the scores of batches of prompts with responses, and aggregates them."""
    totals: dict[str, list[float]] = {}
    records, batches, by_source = [], [], {}
    for groups, pending in answered:
        scores = pending.result()
        batches.append(Answered(groups, pending.texts, scores))
        for key, values in scores.items():
            totals.setdefault(key, []).extend(values[~scores["overall"].isnan()].tolist())
        records += _records(groups, pending.texts, scores)
        for source in sorted({*groups.non_tensor_batch.get("source", ())} - {""}):
            own = torch.tensor([name == source for name in groups.non_tensor_batch["source"]])
            for key, values in scores.items():
                kept = values[own][~scores["overall"][own].isnan()]
                by_source.setdefault((source, key), []).extend(kept.tolist())
    num_scored = len(totals["overall"])
    metrics = {f"val/{key}_reward": sum(values) / num_scored for key, values in totals.items() if num_scored}
    if num_scored:
        metrics["val/reward_score"] = metrics["val/overall_reward"]
    for (source, key), values in by_source.items():
        if values and (key == "overall" or any(values)):
            metrics[f"val/{source}/{key}_reward"] = sum(values) / len(values)
    return Validation(metrics, records, batches)


def _records(groups: DataProto, texts: list[str], scores: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    num_samples = scores["overall"].shape[1]
    keys = [key for key in ("uid", "source", "problem", "ground_truth") if key in groups.non_tensor_batch]
    flat = {key: values.flatten().tolist() for key, values in scores.items()}
    lengths = groups.batch["response_mask"].sum(-1).flatten().tolist()
    return [
        {key: str(groups.non_tensor_batch[key][i // num_samples]) for key in keys}
        | {"sample": i % num_samples, "response": text, "response_length": lengths[i]}
        | {"score": {key: None if math.isnan(values[i]) else values[i] for key, values in flat.items()}}
        for i, text in enumerate(texts)
    ]

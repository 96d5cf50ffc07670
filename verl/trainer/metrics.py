"""Metrics of a training step, under EasyR1's names.

Letters: G groups (prompts of a step), n samples, P padded prompt tokens, R padded response tokens.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import psutil
import torch
from torch import Tensor

from verl.protocol import DataProto

TIMED_PER_RESPONSE_TOKEN = ("gen", "reward")
TIMED_PER_TOKEN = ("old", "ref", "values", "adv", "update_critic", "update_actor")


class PhaseTimer:
    """Seconds of the phases of a step by name; a phase that is entered again adds up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Context of a phase."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def reset(self) -> None:
        """Forgets all phases, at the start of a step."""
        self.seconds = {}


def compute_reward_metrics(scores: Mapping[str, Tensor], sources: Sequence[str] = ()) -> dict[str, float]:
    """Means of the reward's parts [G, n] over the responses that have scores: reward/<part>.

    With several sources, one for each group, also reward/<source>/<part>, for parts that are not 0 throughout.
    """
    kept = ~scores["overall"].isnan()
    metrics = {f"reward/{key}": float(values[kept].mean()) for key, values in scores.items() if kept.any()}
    for source in sorted({*sources} - {""}):
        own = kept & torch.tensor([name == source for name in sources]).unsqueeze(-1)
        parts = {key: values[own] for key, values in scores.items()} if own.any() else {}
        shown = {key: values for key, values in parts.items() if key == "overall" or values.any()}
        metrics |= {f"reward/{source}/{key}": float(values.mean()) for key, values in shown.items()}
    return metrics


def compute_data_metrics(groups: DataProto, max_prompt_length: int, max_response_length: int) -> dict[str, float]:
    """Mean, maximum and minimum of scores, advantages and lengths of a step, and its token counts.

    Over responses: critic/score, critic/rewards (scores minus KL penalty), lengths. Over response tokens:
    critic/advantages, critic/returns (equal to advantages for group-relative estimators), with a critic critic/values.
    critic/vf_explained_var is 1 - Var(returns - values) / (Var(returns) + 1e-5). clip_ratio is the share of sequences
    at maximum length. perf/total_num_tokens counts a prompt once per response, as EasyR1 does.
    Responses without a score (NaN) are left out, but for clip_ratio and the counts of tokens.

    Args:
        groups: tensors scores, rewards [G, n], advantages, returns [G, n] or [G, n, R], response_mask [G, n, R],
            prompt_mask [G, P], and with a critic values [G, n, R].
        max_prompt_length, max_response_length: P and R, in tokens.
    """
    batch = groups.batch
    kept = ~batch["scores"].isnan()  # [G, n]
    mask = batch["response_mask"].bool() & kept.unsqueeze(-1)
    all_lengths = batch["response_mask"].sum(-1)  # [G, n]
    response_lengths = all_lengths[kept]
    prompt_lengths = batch["prompt_mask"].sum(-1)  # [G]
    found = [key for key in ("advantages", "returns", "values") if key in batch.keys()]
    per_token = {key: _per_token(batch[key], mask) for key in found}
    explained, returns = {}, per_token["returns"]
    if "values" in per_token and returns.numel() > 1:
        left = (returns - per_token["values"]).var()
        explained["critic/vf_explained_var"] = float(1 - left / (returns.var() + 1e-5))
    num_response_tokens = int(all_lengths.sum())
    num_samples = all_lengths.shape[1]
    return {
        **_mean_max_min("critic/score", batch["scores"][kept]),
        **_mean_max_min("critic/rewards", batch["rewards"][kept]),
        **{name: v for key, tokens in per_token.items() for name, v in _mean_max_min(f"critic/{key}", tokens).items()},
        **explained,
        **_mean_max_min("response_length", response_lengths),
        **_mean_max_min("prompt_length", prompt_lengths),
        "response_length/clip_ratio": float((all_lengths >= max_response_length).float().mean()),
        "prompt_length/clip_ratio": float((prompt_lengths >= max_prompt_length).float().mean()),
        "perf/num_response_tokens": num_response_tokens,
        "perf/total_num_tokens": num_response_tokens + num_samples * int(prompt_lengths.sum()),
    }


def compute_timing_metrics(
    timing_s: Mapping[str, float], data_metrics: Mapping[str, float], num_ranks: int
) -> dict[str, float]:
    """Seconds per stage, milliseconds per token, and throughput in tokens per second and rank.

    Of the stages in timing_s, `step` is the whole.
    """
    metrics = {f"timing_s/{stage}": seconds for stage, seconds in timing_s.items()}
    for stages, count in (
        (TIMED_PER_RESPONSE_TOKEN, data_metrics["perf/num_response_tokens"]),
        (TIMED_PER_TOKEN, data_metrics["perf/total_num_tokens"]),
    ):
        for stage in stages:
            if stage in timing_s:
                metrics[f"timing_per_token_ms/{stage}"] = 1000 * timing_s[stage] / max(count, 1)
    metrics["perf/time_per_step"] = timing_s["step"]
    metrics["perf/throughput"] = data_metrics["perf/total_num_tokens"] / (timing_s["step"] * num_ranks)
    return metrics


def compute_memory_metrics() -> dict[str, float]:
    """Used memory of this machine and resident memory of the driver, in GiB."""
    return {
        "perf/cpu_memory_used_gb": psutil.virtual_memory().used / 2**30,
        "perf/driver_memory_gb": psutil.Process().memory_info().rss / 2**30,
    }


def reduce_metrics(rank_metrics: Sequence[Mapping[str, tuple[float, float]]]) -> dict[str, float]:
    """Weighted means over ranks of metrics given as (sum, weight); weights are tokens, steps or 1.

    Names with perf/max_ are maxima over ranks. Metrics with total weight 0 are left out.
    """
    reduced = {}
    for name in dict.fromkeys(name for metrics in rank_metrics for name in metrics):
        pairs = [metrics[name] for metrics in rank_metrics if name in metrics and metrics[name][1] > 0]
        if not pairs:
            continue
        if name.startswith("perf/max_"):
            reduced[name] = max(total / weight for total, weight in pairs)
        else:
            reduced[name] = sum(total for total, _ in pairs) / sum(weight for _, weight in pairs)
    return reduced


def _per_token(values: Tensor, mask: Tensor) -> Tensor:
    """Values of all response tokens, flattened, from [G, n] or [G, n, R]."""
    return (values.unsqueeze(-1).expand(mask.shape) if values.dim() == 2 else values)[mask.bool()]


def _mean_max_min(name: str, values: Tensor) -> dict[str, float]:
    values = values.float() if values.numel() else torch.zeros(1)
    return {f"{name}/{kind}": float(getattr(values, kind)()) for kind in ("mean", "max", "min")}

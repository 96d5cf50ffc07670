"""Advantage estimators: GRPO, Dr. GRPO, pass@k, RLOO, ReMax, REINFORCE++ and GAE.

Letters: G prompts, n responses per prompt (a group), R response tokens. Response rewards are [G, n]; token rewards and
values are [G, n, R] with the right-padded response mask.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def compute_grpo_advantages(rewards: Tensor, eps: float = 1e-6) -> Tensor:
    """GRPO advantages: rewards normalised by mean and standard deviation of their group.

    A = (r - mean(r)) / (std(r) + eps), std with n - 1 in the denominator; 0 where all rewards of the group are equal.
    DeepSeekMath, https://arxiv.org/abs/2402.03300, section 4.1.2 (outcome supervision).

    Args:
        rewards: [G, n], n > 1.
    Returns:
        [G, n]; one number per response, the same for each of its tokens.
    """
    return compute_dr_grpo_advantages(rewards) / (rewards.std(dim=-1, keepdim=True) + eps)


def compute_dr_grpo_advantages(rewards: Tensor) -> Tensor:
    """Dr. GRPO advantages, centred without scaling: A = r - mean(r), exactly 0 when a group's rewards are all equal.

    Dr. GRPO, https://arxiv.org/abs/2503.20783, section 3.2: dividing by the standard deviation would upweight
    questions on which nearly all responses agree. Dr. GRPO also needs worker.actor.loss_avg_mode=fixed_length.
    """
    _check_group(rewards)
    deviation = rewards - rewards.mean(dim=-1, keepdim=True)
    # The mean of n equal floats can be off by one rounding, which 1 / eps would amplify.
    is_flat = rewards.amax(dim=-1, keepdim=True) == rewards.amin(dim=-1, keepdim=True)
    return deviation.masked_fill(is_flat, 0.0)


def compute_grpo_passk_advantages(rewards: Tensor, eps: float = 1e-6) -> Tensor:
    """Pass@k advantages: A = (best - second best) / (std(r) + eps) for the best response of a group, else 0.

    Leave-one-out gradient estimator of the best-of-n reward, https://arxiv.org/abs/2503.19595, scaled as in GRPO.
    """
    _check_group(rewards)
    best = rewards.topk(2, dim=-1)
    lead = (best.values[:, :1] - best.values[:, 1:]) / (rewards.std(dim=-1, keepdim=True) + eps)
    return torch.zeros_like(rewards).scatter(-1, best.indices[:, :1], lead)


def compute_rloo_advantages(rewards: Tensor) -> Tensor:
    """RLOO advantages, relative to the mean of the other responses: A_i = r_i - sum over j != i of r_j / (n - 1).

    REINFORCE leave-one-out, https://arxiv.org/abs/2402.14740; equal to n / (n - 1) (r - mean(r)).
    """
    return compute_dr_grpo_advantages(rewards) * (rewards.shape[-1] / (rewards.shape[-1] - 1))


GROUP_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "grpo": compute_grpo_advantages,
    "grpo_passk": compute_grpo_passk_advantages,
    "dr_grpo": compute_dr_grpo_advantages,
    "rloo": compute_rloo_advantages,
}
"""Choices of algorithm.adv_estimator that compare the rewards [G, n] of a group and need nothing else."""


@dataclass(frozen=True)
class EstimatorInputs:
    """Inputs of an estimator beyond a group's rewards; penalties are already subtracted."""

    rewards: Tensor
    """[G, n]."""
    token_rewards: Tensor
    mask: Tensor
    gamma: float
    lam: float
    baselines: Tensor | None
    """[G] greedy rewards, for remax."""
    values: Tensor | None
    """[G, n, R] of the critic, for gae."""


def compute_remax_advantages(rewards: Tensor, baselines: Tensor) -> Tensor:
    """ReMax advantages, relative to the greedy response: A = r - r(greedy).

    ReMax, https://arxiv.org/abs/2310.10505, algorithm 1.

    Args:
        rewards: [G, n].
        baselines: [G] rewards of the greedily decoded responses.
    """
    return rewards - baselines.unsqueeze(-1)


def compute_reinforce_plus_plus_advantages(token_rewards: Tensor, mask: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """REINFORCE++ advantages (returns whitened over all tokens of the batch) and returns.

    R_t = r_t + gamma R_{t+1}; A = whiten(R). REINFORCE++, https://arxiv.org/abs/2501.03262.

    Args:
        token_rewards, mask: [G, n, R].
    Returns:
        advantages and returns, [G, n, R].
    """
    returns = _discounted_sums(token_rewards * mask, gamma)
    return whiten(returns, mask), returns


def compute_gae_advantages(
    token_rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """GAE advantages, whitened over the batch, and returns, the critic's targets.

    delta_t = r_t + gamma V_{t+1} - V_t, V = 0 after the last token; A_t = delta_t + gamma lam A_{t+1}; returns A + V
    before A is whitened. GAE, https://arxiv.org/abs/1506.02438, equations 11, 12 and 16.

    Args:
        token_rewards, values, mask: [G, n, R]; values[t] is the value before token t.
    Returns:
        advantages and returns, [G, n, R].
    """
    values = values * mask
    following = torch.cat([values[..., 1:], torch.zeros_like(values[..., :1])], dim=-1)
    advantages = _discounted_sums((token_rewards + gamma * following - values) * mask, gamma * lam)
    return whiten(advantages, mask), advantages + values


def _remax(inputs: EstimatorInputs) -> tuple[Tensor, Tensor]:
    assert inputs.baselines is not None
    advantages = compute_remax_advantages(inputs.rewards, inputs.baselines)
    return advantages, advantages


def _reinforce_plus_plus(inputs: EstimatorInputs) -> tuple[Tensor, Tensor]:
    return compute_reinforce_plus_plus_advantages(inputs.token_rewards, inputs.mask, inputs.gamma)


def _gae(inputs: EstimatorInputs) -> tuple[Tensor, Tensor]:
    assert inputs.values is not None
    return compute_gae_advantages(inputs.token_rewards, inputs.values, inputs.mask, inputs.gamma, inputs.lam)


OTHER_ESTIMATORS: dict[str, Callable[[EstimatorInputs], tuple[Tensor, Tensor]]] = {
    "remax": _remax,
    "reinforce_plus_plus": _reinforce_plus_plus,
    "gae": _gae,
}
"""The other choices; each gives advantages and returns, [G, n] or [G, n, R]."""


def compute_advantages(
    estimator: str,
    rewards: Tensor,
    mask: Tensor,
    gamma: float = 1.0,
    lam: float = 1.0,
    penalties: Tensor | None = None,
    baselines: Tensor | None = None,
    values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of the named estimator: [G, n] for one per response, else [G, n, R].

    Args:
        estimator: a key of GROUP_ESTIMATORS or OTHER_ESTIMATORS.
        rewards: [G, n]; NaN drops a response: it is 0 in both, and the others are as if it did not exist. A group with
            fewer than two others is 0.
        mask: [G, n, R] of the responses.
        penalties: [G, n, R] subtracted from token rewards (KL in the reward).
        baselines: [G] greedy rewards, for remax.
        values: [G, n, R] of the critic, for gae.
    """
    if baselines is not None:  # a response without its baseline has no advantage
        rewards = rewards.masked_fill(baselines.isnan().unsqueeze(-1), torch.nan)
    kept = ~rewards.isnan()
    if not kept.all():
        return _compute_without_dropped(kept, estimator, rewards, mask, gamma, lam, penalties, baselines, values)
    token_rewards = spread_rewards(rewards, mask, penalties)
    totals = rewards if penalties is None else token_rewards.sum(dim=-1)
    if estimator in GROUP_ESTIMATORS:
        advantages = GROUP_ESTIMATORS[estimator](totals)
        return advantages, advantages
    inputs = EstimatorInputs(totals, token_rewards, mask, gamma, lam, baselines, values)
    return OTHER_ESTIMATORS[estimator](inputs)


def _compute_without_dropped(
    kept: Tensor,
    estimator: str,
    rewards: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    penalties: Tensor | None,
    baselines: Tensor | None,
    values: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns as of compute_advantages, for groups whose responses are partly dropped."""
    more = (gamma, lam, penalties)
    if estimator not in GROUP_ESTIMATORS:
        if baselines is not None:
            baselines = baselines.nan_to_num(0.0)
        rest = (estimator, rewards.nan_to_num(0.0), mask.bool() & kept.unsqueeze(-1), *more, baselines, values)
        dropped = ~kept
        return tuple(  # type: ignore[return-value]
            each.masked_fill(dropped if each.dim() == 2 else dropped.unsqueeze(-1), 0.0)
            for each in compute_advantages(*rest)
        )
    advantages = torch.zeros_like(rewards)
    for group, chosen in enumerate(kept):
        if chosen.sum() > 1:
            penalty = None if penalties is None else penalties[group, chosen].unsqueeze(0)
            own = (rewards[group, chosen].unsqueeze(0), mask[group, chosen].unsqueeze(0), gamma, lam, penalty)
            advantages[group, chosen] = compute_advantages(estimator, *own)[0][0]
    return advantages, advantages


def spread_rewards(rewards: Tensor, mask: Tensor, penalties: Tensor | None = None) -> Tensor:
    """Token rewards [G, n, R]: the response's reward [G, n] at its last token, minus each token's penalty."""
    last = (mask.sum(-1, keepdim=True).long() - 1).clamp(min=0)
    token_rewards = torch.zeros(mask.shape).scatter(-1, last, rewards.float().unsqueeze(-1)) * mask
    return token_rewards if penalties is None else token_rewards - penalties * mask


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Whitened values: (x - mean) / sqrt(var + 1e-8) where mask is 1, var with N - 1 in the denominator; else 0.

    In float64, so that equal values give exactly 0.
    """
    wide, mask = values.double(), mask.bool()
    chosen = wide[mask]
    if chosen.numel() < 2:
        return torch.zeros_like(values)
    white = (wide - chosen.mean()) * (chosen.var() + 1e-8).rsqrt()
    return white.masked_fill(~mask, 0.0).to(values.dtype)


def _discounted_sums(values: Tensor, decay: float) -> Tensor:
    """Reverse discounted sums y_t = x_t + decay y_{t+1} along the last dimension."""
    sums = values.clone()
    for t in range(values.shape[-1] - 2, -1, -1):
        sums[..., t] += decay * sums[..., t + 1]
    return sums


def _check_group(rewards: Tensor) -> None:
    if rewards.shape[-1] < 2:
        raise ValueError(f"got a group of {rewards.shape[-1]}; raise worker.rollout.n")

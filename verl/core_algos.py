"""The mathematics of GRPO: advantages, divergence, clipped loss. Tensors and floats in, tensors out.

Letters: G prompts, n responses per prompt (a group), R response tokens. Functions other than the advantages work on
each element, whatever the shape; what a sum is divided by is decided where the whole mini-batch is known.
"""

from collections.abc import Callable

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are cut to this size before exp: e^20 squared is still finite in float32, so gradients are too."""
MAX_LOW_VAR_KL = 10.0
MAX_CHI2 = 20.0
"""Above these values a token's divergence is constant: one stray token must not own the step."""


def compute_grpo_advantages(scores: Tensor, eps: float = 1e-6) -> Tensor:
    """How much better each response is than its group, in standard deviations of the group.

    A = (s - mean(s)) / (std(s) + eps), std with n - 1 in the denominator; 0 where all scores of the group are equal.
    DeepSeekMath, https://arxiv.org/abs/2402.03300, section 4.1.2 (outcome supervision).

    Args:
        scores: [G, n], n > 1.
    Returns:
        [G, n]; one number per response, the same for each of its tokens.
    """
    if scores.shape[-1] < 2:
        raise ValueError(f"got a group of {scores.shape[-1]}; raise worker.rollout.n")
    deviation = scores - scores.mean(dim=-1, keepdim=True)
    advantages = deviation / (scores.std(dim=-1, keepdim=True) + eps)
    # The mean of n equal floats can miss them by one rounding, which eps would blow up to a visible advantage.
    is_flat = scores.amax(dim=-1, keepdim=True) == scores.amin(dim=-1, keepdim=True)
    return advantages.masked_fill(is_flat, 0.0)


# Each takes d = log p - log p_ref. Under samples of p: k1, k2, k3 of http://joschu.net/blog/kl-approx.html estimate
# KL(p || p_ref), the first and third without bias; chi2 estimates the sum of (p_ref - p)^2 / p without bias.
KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "kl": lambda d: d,
    "abs": lambda d: d.abs(),
    "mse": lambda d: d.square() / 2,
    "low_var_kl": lambda d: (torch.expm1(-_cut(d)) + _cut(d)).clamp(max=MAX_LOW_VAR_KL),
    "chi2": lambda d: torch.expm1(-_cut(d)).square().clamp(max=MAX_CHI2),
}


def compute_kl(log_probs: Tensor, ref_log_probs: Tensor, kind: str) -> Tensor:
    """Each token's estimate of the divergence of the policy from the reference, in float32.

    With d = log_probs - ref_log_probs:
        kl          d                   k1
        abs         |d|
        mse         d^2 / 2             k2
        low_var_kl  e^-d - 1 + d        k3; never negative, at most MAX_LOW_VAR_KL
        chi2        (e^-d - 1)^2        at most MAX_CHI2

    Args:
        log_probs, ref_log_probs: of the same tokens, any shape.
        kind: a key of KL_ESTIMATORS.
    """
    if kind not in KL_ESTIMATORS:
        raise ValueError(f"algorithm.kl_penalty = {kind!r}: must be one of {', '.join(KL_ESTIMATORS)}")
    return KL_ESTIMATORS[kind](log_probs.float() - ref_log_probs.float())


def compute_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    clip_dual: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Each token's clipped surrogate loss, and what happened to it.

    With r = exp(log_probs - old_log_probs):
        L = max(-A r, -A clamp(r, 1 - clip_low, 1 + clip_high)), and for A < 0 at most -A clip_dual.
    PPO, https://arxiv.org/abs/1707.06347, equation 7; two clip ranges: DAPO, https://arxiv.org/abs/2503.14476,
    section 3.1; bound for A < 0: dual-clip PPO, https://arxiv.org/abs/1912.09729, equation 5.

    Args:
        log_probs, old_log_probs, advantages: of one shape, or of shapes that broadcast to that of log_probs.
    Returns:
        the loss, and without gradient, each in the loss's shape, to be averaged over response tokens:
        pg_clipfrac_higher (1 where the clamped ratio set the loss), pg_clipfrac_lower (1 where clip_dual set it),
        ppo_kl (old_log_probs - log_probs, k1 of the step so far).
    """
    log_ratio = log_probs - old_log_probs
    ratio = _cut(log_ratio).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    pessimistic = torch.maximum(unclipped, clipped)
    bound = -advantages * clip_dual
    is_bounded = (advantages < 0) & (pessimistic > bound)
    loss = torch.where(is_bounded, bound, pessimistic)
    return loss, {
        "pg_clipfrac_higher": (clipped > unclipped).float(),
        "pg_clipfrac_lower": is_bounded.float(),
        "ppo_kl": -log_ratio.detach(),
    }


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of the values where mask is 1, as a scalar; 0 when it is 1 nowhere. Other values may be anything."""
    mask = mask.bool()
    return values.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def _cut(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)

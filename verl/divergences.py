"""How far the policy is from the reference: estimates per token, the exact divergence, and an adaptive weight for it.

Letters: N tokens, V vocabulary.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are cut to this size before exp: e^20 squared is still finite in float32, so gradients are too."""
MAX_LOW_VAR_KL = 10.0
MAX_CHI2 = 20.0
"""Above these values a token's divergence is constant: one stray token must not own the step."""
MAX_RELATIVE_ERROR = 0.2
"""The adaptive weight follows at most this much of how far the divergence is off its target."""


def cut_log_ratio(log_ratio: Tensor) -> Tensor:
    """The log-ratio within +-MAX_LOG_RATIO."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


# Each takes d = log p - log p_ref. Under samples of p: k1, k2, k3 of http://joschu.net/blog/kl-approx.html estimate
# KL(p || p_ref), the first and third without bias; chi2 estimates the sum of (p_ref - p)^2 / p without bias.
KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "kl": lambda d: d,
    "abs": lambda d: d.abs(),
    "mse": lambda d: d.square() / 2,
    "low_var_kl": lambda d: (torch.expm1(-cut_log_ratio(d)) + cut_log_ratio(d)).clamp(max=MAX_LOW_VAR_KL),
    "chi2": lambda d: torch.expm1(-cut_log_ratio(d)).square().clamp(max=MAX_CHI2),
}
FULL_KL = "full"
"""Not an estimate: needs both distributions, see compute_full_kl."""


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
    return KL_ESTIMATORS[kind](log_probs.float() - ref_log_probs.float())


def compute_full_kl(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """KL(p || p_ref) = sum over v of p(v) (log p(v) - log p_ref(v)) of each token, [N], exact and with its gradient.

    Args:
        log_probs, ref_log_probs: [N, V], normalised, float32.
    """
    return (log_probs.exp() * (log_probs - ref_log_probs)).sum(dim=-1)


def adapt_kl_coef(coef: float, kl: float, target: float, horizon: float, num_responses: int) -> float:
    """The weight of the divergence after a step: larger when it was above its target, smaller when below.

    coef (1 + clip(kl / target - 1, -0.2, 0.2) num_responses / horizon).
    Ziegler et al., https://arxiv.org/abs/1909.08593, section 2.2.

    Args:
        coef: the weight of the step.
        kl: mean divergence of the step.
        target: what it should be, above 0.
        horizon: responses after which the weight may have grown by a fifth.
        num_responses: of the step.
    """
    if not math.isfinite(kl):  # a step that was left out says nothing of where the policy is
        return coef
    error = min(max(kl / target - 1, -MAX_RELATIVE_ERROR), MAX_RELATIVE_ERROR)
    return coef * (1 + error * num_responses / horizon)

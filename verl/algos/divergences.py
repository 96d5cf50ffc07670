"""KL of the policy from the reference policy: per-token KL estimators, the full KL, and the adaptive KL controller.

Letters: N tokens, V vocabulary.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Clamp of log-ratios before exp: e^20 squared is finite in float32, and so are gradients."""
MAX_LOW_VAR_KL = 10.0
MAX_CHI2 = 20.0
"""Clamps of a token's estimate, so that one outlier token cannot dominate a step; no gradient above them."""
MAX_RELATIVE_ERROR = 0.2
"""Clip of the relative error kl / target - 1 in the adaptive KL controller."""


def clamp_log_ratio(log_ratio: Tensor) -> Tensor:
    """The log-ratio clamped to +-MAX_LOG_RATIO."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


# Each takes d = log p - log p_ref. Under samples of p: k1, k2, k3 of http://joschu.net/blog/kl-approx.html estimate
# KL(p || p_ref), k1 and k3 unbiased; chi2 is an unbiased estimator of sum of (p_ref - p)^2 / p.
KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "kl": lambda d: d,
    "abs": lambda d: d.abs(),
    "mse": lambda d: d.square() / 2,
    "low_var_kl": lambda d: (torch.expm1(-clamp_log_ratio(d)) + clamp_log_ratio(d)).clamp(max=MAX_LOW_VAR_KL),
    "chi2": lambda d: torch.expm1(-clamp_log_ratio(d)).square().clamp(max=MAX_CHI2),
}
FULL_KL = "full"
"""The exact KL over the whole vocabulary, see compute_full_kl; no estimator."""


def compute_kl(log_probs: Tensor, ref_log_probs: Tensor, kind: str) -> Tensor:
    """Per-token KL estimates of the policy from the reference, in float32.

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
    """KL(p || p_ref) = sum over v of p(v) (log p(v) - log p_ref(v)) of each token, [N], with gradient.

    Args:
        log_probs, ref_log_probs: [N, V], normalised, float32.
    """
    return (log_probs.exp() * (log_probs - ref_log_probs)).sum(dim=-1)


def adapt_kl_coef(coef: float, kl: float, target: float, horizon: float, num_responses: int) -> float:
    """The KL coefficient for the next step: adaptive KL controller, higher when the KL was above its target.

    coef (1 + clip(kl / target - 1, -0.2, 0.2) num_responses / horizon).
    Ziegler et al., https://arxiv.org/abs/1909.08593, section 2.2.

    Args:
        coef: KL coefficient of this step.
        kl: mean KL of this step.
        target: of the KL, above 0.
        horizon: responses over which coef changes by at most a fifth.
        num_responses: of this step.
    """
    if not math.isfinite(kl):  # a skipped update has no KL
        return coef
    error = min(max(kl / target - 1, -MAX_RELATIVE_ERROR), MAX_RELATIVE_ERROR)
    return coef * (1 + error * num_responses / horizon)

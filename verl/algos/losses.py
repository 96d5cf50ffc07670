"""Policy losses (PPO clip, GSPO, CISPO, SAPO), value loss, importance weights and loss aggregation; tensors only.

Letters: N response tokens, packed, S responses. The caller divides sums by average_denominator of the mini-batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from verl.algos.divergences import clamp_log_ratio

Details = dict[str, Tensor]

LOSS_AVG_MODES = ("token", "seq", "fixed_length")


@dataclass(frozen=True)
class LossInputs:
    """Inputs of a policy loss: [N] tensors of the tokens, and its constants."""

    log_probs: Tensor
    log_ratio: Tensor
    """log_probs - old_log_probs."""
    advantages: Tensor
    lengths: Tensor
    """[S] tokens of each response."""
    clip_low: float
    clip_high: float
    clip_dual: float
    tau_positive: float
    tau_negative: float


def compute_policy_loss(
    loss_type: str,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    lengths: Tensor,
    clip_low: float,
    clip_high: float,
    clip_dual: float,
    tau_positive: float,
    tau_negative: float,
) -> tuple[Tensor, Details]:
    """Per-token policy loss and its metrics, with importance sampling ratio r = exp(log_probs - old_log_probs).

    Args:
        loss_type: a key of POLICY_LOSSES.
        log_probs, old_log_probs, advantages: [N].
        lengths: [S] tokens of each response.
    Returns:
        [N] loss, and per-token metrics without gradient: ppo_kl (old_log_probs - log_probs, the k1 estimator of
        KL(old || current)) and, with clipping, those of compute_clipped_loss.
    """
    log_ratio = log_probs - old_log_probs
    inputs = LossInputs(
        log_probs, log_ratio, advantages, lengths, clip_low, clip_high, clip_dual, tau_positive, tau_negative
    )
    loss, details = POLICY_LOSSES[loss_type](inputs)
    return loss, {"ppo_kl": -log_ratio.detach()} | details


def compute_clipped_loss(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, clip_dual: float
) -> tuple[Tensor, Details]:
    """PPO's clipped surrogate loss with dual clip, and clip fractions.

    With r = exp(log_ratio): L = max(-A r, -A clamp(r, 1 - clip_low, 1 + clip_high)), and for A < 0 at most
    -A clip_dual. PPO, https://arxiv.org/abs/1707.06347, equation 7; two clip ranges: DAPO's clip-higher,
    https://arxiv.org/abs/2503.14476, section 3.1; bound for A < 0: dual-clip PPO,
    https://arxiv.org/abs/1912.09729, equation 5.

    Returns:
        loss, and in its shape 0 or 1: pg_clipfrac_higher (the clamped ratio determined the loss), pg_clipfrac_lower
        (clip_dual did).
    """
    ratio = clamp_log_ratio(log_ratio).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    pessimistic = torch.maximum(unclipped, clipped)
    bound = -advantages * clip_dual
    is_bounded = (advantages < 0) & (pessimistic > bound)
    loss = torch.where(is_bounded, bound, pessimistic)
    return loss, {
        "pg_clipfrac_higher": (clipped > unclipped).float(),
        "pg_clipfrac_lower": is_bounded.float(),
    }


def compute_ppo_loss(inputs: LossInputs) -> tuple[Tensor, Details]:
    """PPO clip of token-level ratios."""
    return _clip(inputs, inputs.log_ratio)


def compute_gspo_loss(inputs: LossInputs) -> tuple[Tensor, Details]:
    """PPO clip of the sequence-level ratio: the geometric mean of its token-level ratios.

    GSPO, https://arxiv.org/abs/2507.18071, equations 5 and 7.
    """
    return _clip(inputs, _response_log_ratio(inputs))


def compute_gspo_token_loss(inputs: LossInputs) -> tuple[Tensor, Details]:
    """The value of GSPO, with a gradient through each token's own log-prob; equations 13 and 14."""
    own_gradient = inputs.log_probs - inputs.log_probs.detach()
    return _clip(inputs, _response_log_ratio(inputs).detach() + own_gradient)


def _response_log_ratio(inputs: LossInputs) -> Tensor:
    return mean_per_response(inputs.log_ratio, inputs.lengths).repeat_interleave(inputs.lengths)


def _clip(inputs: LossInputs, log_ratio: Tensor) -> tuple[Tensor, Details]:
    return compute_clipped_loss(log_ratio, inputs.advantages, inputs.clip_low, inputs.clip_high, inputs.clip_dual)


def compute_cispo_loss(inputs: LossInputs) -> tuple[Tensor, Details]:
    """CISPO loss: REINFORCE with a clipped importance sampling ratio, which carries no gradient (sg).

    L = -A sg(clamp(r, 1 - clip_low, 1 + clip_high)) log p, r = exp(log_ratio).
    Clipped tokens keep their gradient. clip_low = 1 sets no lower bound, as in the paper:
    CISPO of MiniMax-M1, https://arxiv.org/abs/2506.13585, equations 4 and 5.
    """
    ratio = clamp_log_ratio(inputs.log_ratio.detach()).exp()
    weight = ratio.clamp(1 - inputs.clip_low, 1 + inputs.clip_high)
    return -inputs.advantages * weight * inputs.log_probs, {}


def compute_sapo_loss(inputs: LossInputs) -> tuple[Tensor, Details]:
    """SAPO loss, a soft gate in place of clipping: L = -A 4 / tau sigmoid(tau (r - 1)), r = exp(log_ratio).

    tau is tau_positive for A >= 0, else tau_negative. At r = 1 the gradient equals that of the unclipped surrogate.
    SAPO, https://arxiv.org/abs/2511.20347.
    """
    tau = torch.where(inputs.advantages >= 0, inputs.tau_positive, inputs.tau_negative)
    gate = torch.sigmoid(tau * torch.expm1(clamp_log_ratio(inputs.log_ratio)))
    return -inputs.advantages * 4 / tau * gate, {}


POLICY_LOSSES: dict[str, Callable[[LossInputs], tuple[Tensor, Details]]] = {
    "default": compute_ppo_loss,
    "gspo": compute_gspo_loss,
    "gspo_token": compute_gspo_token_loss,
    "cispo": compute_cispo_loss,
    "sapo": compute_sapo_loss,
}
"""The choices of worker.actor.loss_type. A loss returns [N] losses and, in their shape, its metrics."""


def compute_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Details]:
    """PPO's clipped value loss per token: the larger squared error of the value and the value clipped around the old.

    L = max((V - R)^2, (clamp(V, V_old - clip, V_old + clip) - R)^2) / 2.
    PPO's clipped value loss, https://arxiv.org/abs/2005.12729, section 3, item 1.

    Args:
        values, old_values, returns: [N].
    Returns:
        [N] loss, and without gradient vf_clipfrac (1 where the clipped value determined it) and vpred_mean.
    """
    clipped_values = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
    unclipped, clipped = (values - returns).square(), (clipped_values - returns).square()
    details = {"vf_clipfrac": (clipped > unclipped).float(), "vpred_mean": values.detach()}
    return torch.maximum(unclipped, clipped) / 2, details


def compute_rollout_weights(old_log_probs: Tensor, rollout_log_probs: Tensor, cap: float) -> tuple[Tensor, Details]:
    """Truncated importance sampling (TIS) weights for the mismatch of rollout engine and trainer.

    w = min(p_old / p_rollout, cap), without gradient. Source:
    https://fengyao.notion.site/off-policy-rl.

    Args:
        old_log_probs, rollout_log_probs: [N], by trainer and engine with the same weights.
    Returns:
        [N] w, and tis_weight (w), tis_truncated (1 where the ratio was above cap), rollout_kl (k1 estimator of
        KL(rollout || old)), rollout_prob_gap (|p_rollout - p_old|).
    """
    old, rollout = old_log_probs.detach(), rollout_log_probs
    ratio = clamp_log_ratio(old - rollout).exp()
    weights = ratio.clamp(max=cap)
    return weights, {
        "tis_weight": weights,
        "tis_truncated": (ratio > cap).float(),
        "rollout_kl": rollout - old,
        "rollout_prob_gap": (rollout.exp() - old.exp()).abs(),
    }


def mean_per_response(values: Tensor, lengths: Tensor) -> Tensor:
    """Means [S] of values [N] over each response's tokens."""
    return torch.segment_reduce(values, "mean", lengths=lengths)


def average_weights(mode: str, lengths: Tensor) -> Tensor:
    """Weights [N] of token losses before they are summed and divided by average_denominator (loss aggregation)."""
    return (1 / lengths if mode == "seq" else torch.ones_like(lengths, dtype=torch.float)).repeat_interleave(lengths)


def average_denominator(mode: str, num_tokens: float, num_responses: float, max_response_length: int) -> float:
    """The denominator of the weighted loss sum over a whole mini-batch on all ranks (loss aggregation).

    token         num_tokens: token-mean. DAPO, https://arxiv.org/abs/2503.14476, section 3.3
    seq           num_responses (weights 1 / length): mean of response means, as in GRPO
    fixed_length  num_responses max_response_length: token sum over a constant.
                  Dr. GRPO, https://arxiv.org/abs/2503.20783, section 3.2
    """
    denominators = {
        "token": num_tokens,
        "seq": num_responses,
        "fixed_length": num_responses * max_response_length,
    }
    return denominators[mode]

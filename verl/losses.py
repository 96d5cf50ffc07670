"""Losses of packed response tokens: policy, value, and how tokens are averaged. Tensors and floats in, tensors out.

Letters: N response tokens of whole responses one behind the other, S responses. What a sum is divided by is decided
where the whole mini-batch is known.
"""

import torch
from torch import Tensor

from verl.divergences import cut_log_ratio

Details = dict[str, Tensor]

LOSS_TYPES = ("default", "gspo", "gspo_token", "cispo", "sapo")
LOSS_AVG_MODES = ("token", "seq", "fixed_length")


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
    """Each token's surrogate loss, and what happened to it.

        default     clipped, with the token's own ratio
        gspo        clipped, with the response's ratio: the geometric mean of its tokens'.
                    GSPO, https://arxiv.org/abs/2507.18071, equations 5 and 7
        gspo_token  the same value, each token's gradient by its own log-prob; same source, equations 13 and 14
        cispo       see compute_cispo_loss
        sapo        see compute_sapo_loss

    Args:
        loss_type: one of LOSS_TYPES.
        log_probs, old_log_probs, advantages: [N].
        lengths: [S] tokens of each response.
    Returns:
        [N] the loss, and without gradient, to be averaged over tokens: ppo_kl (old_log_probs - log_probs, k1 of the
        step so far) and, where the ratio is clipped, what compute_clipped_loss adds.
    """
    log_ratio = log_probs - old_log_probs
    details = {"ppo_kl": -log_ratio.detach()}
    if loss_type == "cispo":
        return compute_cispo_loss(log_probs, log_ratio, advantages, clip_low, clip_high), details
    if loss_type == "sapo":
        return compute_sapo_loss(log_ratio, advantages, tau_positive, tau_negative), details
    if loss_type != "default":
        response_log_ratio = mean_per_response(log_ratio, lengths).repeat_interleave(lengths)
        own_gradient = log_probs - log_probs.detach()
        log_ratio = response_log_ratio if loss_type == "gspo" else response_log_ratio.detach() + own_gradient
    loss, clipped = compute_clipped_loss(log_ratio, advantages, clip_low, clip_high, clip_dual)
    return loss, details | clipped


def compute_clipped_loss(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, clip_dual: float
) -> tuple[Tensor, Details]:
    """The clipped surrogate of each element, and whether it was clipped.

    With r = exp(log_ratio): L = max(-A r, -A clamp(r, 1 - clip_low, 1 + clip_high)), and for A < 0 at most
    -A clip_dual. PPO, https://arxiv.org/abs/1707.06347, equation 7; two clip ranges: DAPO's clip-higher,
    https://arxiv.org/abs/2503.14476, section 3.1; bound for A < 0: dual-clip PPO,
    https://arxiv.org/abs/1912.09729, equation 5.

    Returns:
        the loss, and 0 or 1 in its shape: pg_clipfrac_higher (the clamped ratio set the loss), pg_clipfrac_lower
        (clip_dual set it).
    """
    ratio = cut_log_ratio(log_ratio).exp()
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


def compute_cispo_loss(
    log_probs: Tensor, log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """REINFORCE with a bounded weight: L = -A sg(clamp(r, 1 - clip_low, 1 + clip_high)) log p, r = exp(log_ratio).

    No token loses its gradient by clipping. clip_low = 1 leaves the weight without a lower bound, as in the paper:
    CISPO of MiniMax-M1, https://arxiv.org/abs/2506.13585, equations 4 and 5.
    """
    weight = cut_log_ratio(log_ratio.detach()).exp().clamp(1 - clip_low, 1 + clip_high)
    return -advantages * weight * log_probs


def compute_sapo_loss(log_ratio: Tensor, advantages: Tensor, tau_positive: float, tau_negative: float) -> Tensor:
    """A soft gate for a clip: L = -A 4 / tau sigmoid(tau (r - 1)), r = exp(log_ratio).

    tau is tau_positive for A >= 0, else tau_negative. At r = 1 its gradient is that of the plain surrogate.
    SAPO, https://arxiv.org/abs/2511.20347.
    """
    tau = torch.where(advantages >= 0, tau_positive, tau_negative)
    return -advantages * 4 / tau * torch.sigmoid(tau * torch.expm1(cut_log_ratio(log_ratio)))


def compute_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Details]:
    """Each token's squared error of the critic, the larger one of its value's and its value's kept near the old.

    L = max((V - R)^2, (clamp(V, V_old - clip, V_old + clip) - R)^2) / 2.
    PPO's clipped value loss, https://arxiv.org/abs/2005.12729, section 3, item 1.

    Args:
        values, old_values, returns: [N].
    Returns:
        [N] the loss, and without gradient vf_clipfrac (1 where the clamped value set it) and vpred_mean.
    """
    near = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
    unclipped, clipped = (values - returns).square(), (near - returns).square()
    details = {"vf_clipfrac": (clipped > unclipped).float(), "vpred_mean": values.detach()}
    return torch.maximum(unclipped, clipped) / 2, details


def compute_rollout_weights(old_log_probs: Tensor, rollout_log_probs: Tensor, cap: float) -> tuple[Tensor, Details]:
    """Weights that correct for an engine which samples from slightly other probabilities than training computes.

    w = min(p_old / p_rollout, cap), a constant of the loss. Truncated importance sampling,
    https://fengyao.notion.site/off-policy-rl.

    Args:
        old_log_probs, rollout_log_probs: [N], of training and of the engine for the same weights.
    Returns:
        [N] w, and tis_weight (w), tis_truncated (1 where cap set it), rollout_kl (k1 of KL(rollout || old)),
        rollout_prob_gap (|p_rollout - p_old|).
    """
    old, rollout = old_log_probs.detach(), rollout_log_probs
    ratio = cut_log_ratio(old - rollout).exp()
    weights = ratio.clamp(max=cap)
    return weights, {
        "tis_weight": weights,
        "tis_truncated": (ratio > cap).float(),
        "rollout_kl": rollout - old,
        "rollout_prob_gap": (rollout.exp() - old.exp()).abs(),
    }


def mean_per_response(values: Tensor, lengths: Tensor) -> Tensor:
    """[S] means of [N] values over each response's tokens."""
    return torch.segment_reduce(values, "mean", lengths=lengths)


def average_weights(mode: str, lengths: Tensor) -> Tensor:
    """[N] what each token's loss is multiplied by before it is summed and divided by average_denominator."""
    return (1 / lengths if mode == "seq" else torch.ones_like(lengths, dtype=torch.float)).repeat_interleave(lengths)


def average_denominator(mode: str, num_tokens: float, num_responses: float, max_response_length: int) -> float:
    """What the weighted sum over a whole mini-batch, all ranks together, is divided by.

    token         num_tokens: every token counts the same. DAPO, https://arxiv.org/abs/2503.14476, section 3.3
    seq           num_responses (weights 1 / length): every response counts the same, as in GRPO
    fixed_length  num_responses max_response_length: a sum over tokens in a unit that no sample changes.
                  Dr. GRPO, https://arxiv.org/abs/2503.20783, section 3.2
    """
    denominators = {
        "token": num_tokens,
        "seq": num_responses,
        "fixed_length": num_responses * max_response_length,
    }
    return denominators[mode]

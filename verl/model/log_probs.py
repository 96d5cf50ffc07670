"""Chunked log-probs, entropy and full KL of response tokens from hidden states, without materialising all logits.

Letters: N response tokens, D hidden size, V vocabulary. Logits exist one chunk at a time, in the model's type; sums
over V are in float32. The backward pass recomputes each chunk and overwrites it with its gradient.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from verl.algos.divergences import compute_full_kl

LOGIT_CHUNK_BYTES = 1 << 30
BANNED_LOGIT_BIAS = -100.0
"""Logit bias of banned tokens, in the engine and in training, so that the scored distribution is the sampled one."""


def response_log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, banned: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probs [N] and entropies [N] (without gradient) of response tokens, in float32.

    With z = (hidden weight^T + bias) / temperature: log p(t) = z_t - logsumexp(z), entropy = logsumexp(z) - sum p z.

    Args:
        hidden: [N, D] states that predict the targets.
        weight: [V, D] output embedding.
        targets: [N] token ids.
        temperature: divides the logits, as in sampling.
        banned: token ids that are never sampled, and no targets; their bias is BANNED_LOGIT_BIAS.
    """
    log_probs, entropies = _ResponseLogProbs.apply(hidden, weight, targets, temperature, banned)  # type: ignore[misc]
    return log_probs, entropies


def full_divergence(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    temperature: float,
    banned: Tensor | None = None,
) -> Tensor:
    """Full KL divergence [N] of a model's next-token distributions from a reference's, in float32.

    Args:
        hidden, ref_hidden: [N, D] states that predict the same tokens.
        weight, ref_weight: [V, D] output embeddings.
        temperature: divides the logits of both.
        banned: as in response_log_probs.
    """

    def divergence(states: Tensor, ref_states: Tensor) -> Tensor:
        log_probs, ref_log_probs = (
            _logits(part, head, banned).float().div(temperature).log_softmax(dim=-1)
            for part, head in ((states, weight), (ref_states, ref_weight))
        )
        return compute_full_kl(log_probs, ref_log_probs)

    size = max(1, _chunk_rows(weight) // 4)  # several float32 tensors of a chunk's size are alive
    chunks = zip(hidden.split(size), ref_hidden.split(size), strict=True)
    parts = [checkpoint(divergence, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.cat(parts)  # type: ignore[arg-type]


def _chunk_rows(weight: Tensor) -> int:
    return max(1, LOGIT_CHUNK_BYTES // (weight.shape[0] * weight.element_size()))


def _logits(hidden: Tensor, weight: Tensor, banned: Tensor | None) -> Tensor:
    logits = hidden @ weight.T
    if banned is not None:
        logits[:, banned] += BANNED_LOGIT_BIAS
    return logits


class _ResponseLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, banned: Tensor | None):
        parts = []
        for rows, chosen in zip(hidden.split(_chunk_rows(weight)), targets.split(_chunk_rows(weight)), strict=True):
            score = _score_triton if rows.is_cuda else _score_torch
            parts.append(score(_logits(rows, weight, banned), chosen, temperature))
        log_probs, entropies, normalizers = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, targets, normalizers, banned)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropies)
        return log_probs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor):
        hidden, weight, targets, normalizers, banned = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        size = _chunk_rows(weight)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            logits = _logits(hidden[part], weight, banned)
            differentiate = _differentiate_triton if logits.is_cuda else _differentiate_torch
            differentiate(logits, targets[part], normalizers[part], grad[part], ctx.temperature)
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight.addmm_(logits.T, hidden[part])
        return grad_hidden, grad_weight, None, None, None


def _score_torch(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropies and log-normalizers, each [rows]."""
    scaled = logits.float() / temperature
    normalizers = scaled.logsumexp(dim=-1)
    log_probs = scaled.gather(1, targets.unsqueeze(1)).squeeze(1) - normalizers
    probs = (scaled - normalizers.unsqueeze(1)).exp_()
    return log_probs, normalizers - (probs * scaled).sum(dim=-1), normalizers


def _differentiate_torch(logits: Tensor, targets: Tensor, normalizers: Tensor, grad: Tensor, temperature: float):
    """Overwrites the logits with their gradient, given `grad` [rows] of the log-probs."""
    probs = (logits.float() / temperature - normalizers.unsqueeze(1)).exp_()
    probs.scatter_add_(1, targets.unsqueeze(1), torch.full_like(probs[:, :1], -1.0))
    logits.copy_(probs * (-grad.float() / temperature).unsqueeze(1))


def _score_triton(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    from verl.model.kernels.log_probs import BLOCK, score_kernel

    out = torch.empty(3, len(logits), dtype=torch.float32, device=logits.device)
    score_kernel[(len(logits),)](logits, targets, out, logits.shape[1], len(logits), 1 / temperature, BLOCK)  # type: ignore[arg-type]
    return out[0], out[1], out[2]


def _differentiate_triton(logits: Tensor, targets: Tensor, normalizers: Tensor, grad: Tensor, temperature: float):
    from verl.model.kernels.log_probs import BLOCK, differentiate_kernel

    grid = (len(logits),)
    arguments = (logits, targets, normalizers.contiguous(), grad.float().contiguous())
    differentiate_kernel[grid](*arguments, logits.shape[1], 1 / temperature, BLOCK)  # type: ignore[arg-type]

"""Flash attention for Hopper GPUs, as vLLM ships it: FlashAttention 3 forward, 4 backward; for attention.py.

Kernels of both use the GPU's asynchronous matrix products and copies: https://arxiv.org/abs/2407.08608. Those of 4 are
compiled at first use, in 20 s, and kept in a folder.
"""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

from torch import Tensor
from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func

BACKWARD_SIZES = (64, 96, 128)
"""Head sizes of the backward pass, those that FlashAttention tests on these GPUs; some others give wrong gradients."""
LONG = 256
"""Tokens, more than a block of any kernel has. Others are compiled for shorter sequences, if all of a call are."""


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Outputs [queries, heads, size] and LSE [heads, queries].

    Args:
        q, k, v: [tokens, heads, size].
        ends: cu_seqlens of queries and of keys.
        longest: max_seqlen of queries and of keys.
        causal: True for a causal mask, aligned at the ends of queries and keys.
        scale: of the logits; None: size^-1/2.
    """
    lengths = (longest[0], ends[0], longest[1], ends[1])
    return flash_attn_varlen_func(
        q, k, v, *lengths, softmax_scale=scale, causal=causal, fa_version=3, num_splits=1, return_softmax_lse=True
    )


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ends: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v; arguments as of forward, all contiguous.

    Args:
        grad, out: [queries, heads, size].
        lse: [heads, queries] in float32, as out of attention over these keys or over more.
    """
    lengths = {"cu_seqlens_q": ends[0], "cu_seqlens_k": ends[1]}
    lengths |= {"max_seqlen_q": max(longest[0], LONG), "max_seqlen_k": max(longest[1], LONG)}
    return _load_backward()(q, k, v, out, grad, lse, scale, causal, **lengths)


@cache
def _load_backward() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """FlashAttention 4's backward pass, which keeps compiled kernels where the environment says, or beside others."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(caches / "spatialthinker" / "flash_attention"))
    from vllm.vllm_flash_attn.cute.interface import _flash_attn_bwd

    return _flash_attn_bwd

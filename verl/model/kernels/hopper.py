"""FlashAttention 3 for Hopper GPUs, as vLLM ships it, without a backward pass; for attention.py.

Its kernels use the GPU's asynchronous matrix products and copies: https://arxiv.org/abs/2407.08608.
"""

from torch import Tensor
from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func


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

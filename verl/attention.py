"""Attention over packed rows: a prompt once for all its responses, and the vision tower's windows in one call.

Letters as in batching.py: G prompts, S responses, P and R their tokens, T tokens of the packed row.

In bfloat16 and float16 on a GPU both run on torch's variable-length flash kernels; anywhere else on scaled dot-product
attention over padded tables. Both forms give what n repeated prompts would, in value and gradient.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from verl.batching import GroupLayout

TEXT_ATTENTION = "shared_prompt"
VISION_ATTENTION = "varlen_flash"  # "flash" in the name makes transformers hand over all windows in one call
FLASH_DTYPES = (torch.bfloat16, torch.float16)
CAUSAL = (-1, 0)  # window to the left and to the right of a query; keys end where queries end
EVERYTHING = (-1, -1)


def has_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the variable-length kernels run for tensors of this device and type."""
    return device.type == "cuda" and dtype in FLASH_DTYPES and torch.cuda.get_device_capability(device) >= (8, 0)


def describe_attention(device: torch.device, dtype: torch.dtype) -> str:
    """Which kernels attention runs on here, and why not the faster ones."""
    if has_flash(device, dtype):
        return "variable-length flash attention (torch)"
    reason = "no GPU" if device.type != "cuda" else f"{dtype} or this GPU has no flash kernel"
    return f"scaled dot-product attention over padded tables ({reason})"


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, ends: tuple[Tensor, Tensor], longest: tuple[int, int], **kwargs
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(q, k, v, *ends, *longest, **kwargs)
    assert isinstance(out, Tensor)
    return out


def _flash_shared(q: Tensor, k: Tensor, v: Tensor, layout: GroupLayout, scale: float | None) -> Tensor:
    """[T, heads, size]: prompts causally, then responses over the keys of their prompt and their own past."""
    split = layout.num_prompt_tokens
    ends, longest = layout.prompt_ends, layout.longest_prompt
    prompt_out = _varlen(
        q[:split], k[:split], v[:split], (ends, ends), (longest, longest), scale=scale, window_size=CAUSAL
    )
    # index_select and not k[index]: its backward adds, the other one's sorts.
    response_out = _varlen(
        q[split:],
        k.index_select(0, layout.key_index),
        v.index_select(0, layout.key_index),
        (layout.response_ends, layout.key_ends),
        (layout.longest_response, layout.longest_keys),
        scale=scale,
        window_size=CAUSAL,
    )
    return torch.cat([prompt_out, response_out])


def _heads_first(states: Tensor, index: Tensor, num_repeats: int) -> Tensor:
    """[T, heads, size] gathered by [rows, columns] to [rows, heads * num_repeats, columns, size]."""
    gathered = states[index].transpose(1, 2)
    return gathered.repeat_interleave(num_repeats, dim=1) if num_repeats > 1 else gathered


def _padded_shared(q: Tensor, k: Tensor, v: Tensor, layout: GroupLayout, scale: float | None) -> Tensor:
    """The same over padded tables."""
    tables, repeats = layout.padded, q.shape[1] // k.shape[1]
    prompt_keys = _heads_first(k, tables.prompt_index, repeats)  # [G, heads, P, size]
    prompt_values = _heads_first(v, tables.prompt_index, repeats)
    prompt_out = scaled_dot_product_attention(
        _heads_first(q, tables.prompt_index, 1), prompt_keys, prompt_values, is_causal=True, scale=scale
    )
    own_keys = _heads_first(k, tables.response_index, repeats)  # [S, heads, R, size]
    own_values = _heads_first(v, tables.response_index, repeats)
    response_out = scaled_dot_product_attention(
        _heads_first(q, tables.response_index, 1),
        torch.cat([prompt_keys[layout.response_group], own_keys], dim=2),
        torch.cat([prompt_values[layout.response_group], own_values], dim=2),
        attn_mask=tables.attention_mask,
        scale=scale,
    )
    return torch.cat(
        [prompt_out.transpose(1, 2)[tables.prompt_mask], response_out.transpose(1, 2)[tables.response_mask]]
    )


def shared_prompt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    layout: GroupLayout,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed row; the prompt's part is done once for all its responses.

    Args:
        query: [1, heads, T, size]; key and value: [1, key heads, T, size].
        layout: the row's prompts and responses.

    Returns:
        [1, T, heads, size] and no weights.
    """
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))  # [T, heads, size]
    attend = _flash_shared if has_flash(q.device, q.dtype) else _padded_shared
    return attend(q, k, v, layout, scaling).unsqueeze(0), None


def vision_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention inside each window, or image, of a row of patches.

    Args:
        query, key, value: [1, heads, patches, size].
        cu_seq_lens_q: [windows + 1] first patch of each window, and the end.
        max_length_q: patches of the largest window.

    Returns:
        [1, patches, heads, size] and no weights.
    """
    if has_flash(query.device, query.dtype):
        q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
        ends = cu_seq_lens_q.to(torch.int32)
        longest = int(max_length_q)
        out = _varlen(q, k, v, (ends, ends), (longest, longest), scale=scaling, window_size=EVERYTHING)
        return out.unsqueeze(0), None
    lengths = cu_seq_lens_q.diff().tolist()
    windows = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    outs = [scaled_dot_product_attention(q, k, v, scale=scaling) for q, k, v in windows]
    return torch.cat(outs, dim=2).transpose(1, 2), None


AttentionInterface.register(TEXT_ATTENTION, shared_prompt_attention)
AttentionInterface.register(VISION_ATTENTION, vision_attention)

"""Padding-free attention: shared-prefix (cascade) attention of the decoder, window attention of the vision encoder.

Letters as in packing.py: G prompts, S responses, P and R their tokens, T tokens of the packed row.

A prompt is the shared prefix of its responses and is computed once. On a GPU in bfloat16 or float16 both use torch's
variable-length flash attention, elsewhere scaled dot-product attention (SDPA) over padded tensors; on Hopper GPUs the
decoder uses vLLM's flash attention. Values and gradients equal those of one prompt copy per response.
"""

from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn  # also registers torch.ops.torch_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from verl.model.flops import head_dim
from verl.model.internals import is_usable
from verl.model.packing import GroupLayout

TEXT_ATTENTION = "shared_prompt"
VISION_ATTENTION = "varlen_flash"  # "flash" in the name makes transformers hand over all windows in one call
FLASH_OF_GROUPS = "flash attention of groups"  # in internals.py
FLASH_FOR_HOPPER = "flash attention for Hopper"  # in internals.py
BACKWARD_FOR_HOPPER = "flash attention backward for Hopper"  # in internals.py
HOPPER = (9, 0)  # compute capability
MOST_APART = 0.02
"""Relative distance of gradients by two kernels in bfloat16, at most; 0.003 was measured on an H200."""
FLASH_DTYPES = (torch.bfloat16, torch.float16)
CAUSAL = (-1, 0)  # window left and right of a query (-1: unlimited); queries and keys are aligned at their ends
EVERYTHING = (-1, -1)


def has_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """True when variable-length flash attention supports this device and type."""
    return device.type == "cuda" and dtype in FLASH_DTYPES and torch.cuda.get_device_capability(device) >= (8, 0)


def _has_flash_of_groups(device: torch.device, dtype: torch.dtype) -> bool:
    return has_flash(device, dtype) and is_usable(FLASH_OF_GROUPS)


@cache
def hopper_kernels(device_type: str) -> Any | None:
    """The module of kernels for Hopper GPUs; None elsewhere, and after a warning where vLLM's cannot be used."""
    is_hopper = device_type == "cuda" and torch.cuda.get_device_capability() == HOPPER
    if not is_hopper or not is_usable(FLASH_FOR_HOPPER):
        return None
    try:
        from verl.model.kernels import hopper
    except ImportError as error:
        print(f"Warning: vLLM's attention for Hopper GPUs is not used, but torch's: {error}", flush=True)  # noqa: T201
        return None
    return hopper


def import_kernels(device: torch.device) -> None:
    """Imports ahead, without using the GPU, what a Hopper GPU's first pass would wait for: vLLM takes seconds."""
    if device.type == "cuda" and is_usable(FLASH_FOR_HOPPER):
        with suppress(ImportError):  # hopper_kernels tells why, where it matters
            import_module("verl.model.kernels.hopper")


@dataclass(frozen=True)
class _VarlenCall:
    """One variable-length attention call over slices of the packed row.

    Attributes:
        queries, keys: slices of the row.
        ends, longest: cu_seqlens and max_seqlen of queries and of keys.
        window: CAUSAL or EVERYTHING.
    """

    queries: slice
    keys: slice
    ends: tuple[Tensor, Tensor]
    longest: tuple[int, int]
    window: tuple[int, int]

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, kernels: Any | None = None
    ) -> tuple[Tensor, Tensor]:
        """Outputs [queries, heads, size] and log-sum-exp (LSE) [heads, queries]; kernels: None for torch's."""
        tensors = (q[self.queries], k[self.keys], v[self.keys])
        if kernels is not None:
            return kernels.forward(*tensors, self.ends, self.longest, self.window == CAUSAL, scale)
        arguments = (*self.ends, *self.longest, self.window == CAUSAL, scale, list(self.window))
        out, lse, _ = torch.ops.torch_attn._varlen_attn(*tensors, *arguments)
        return out, lse

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float | None,
        kernels: Any | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k, v from these keys; out and lse are of the merged attention over all keys of a query."""
        at, of = self.queries, self.keys
        tensors = (grad[at], q[at], k[of], v[of], out[at], lse[:, at].contiguous())
        if kernels is not None:
            return kernels.backward(*tensors, self.ends, self.longest, self.window == CAUSAL, scale)
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
        arguments = (*self.ends, *self.longest, self.window == CAUSAL, no_dropout, scale, list(self.window))
        return torch.ops.torch_attn._varlen_attn_backward(*tensors, *arguments)


@cache
def backward_kernels(
    device_type: str, dtype: torch.dtype, num_heads: int, num_key_heads: int, size: int
) -> Any | None:
    """The module of kernels whose backward pass takes such heads; None for torch's, after a warning where it fails.

    It is compiled here at first use, and compared with torch's: compiled kernels may come from a folder of old ones.
    """
    kernels = hopper_kernels(device_type)
    if kernels is None or size not in kernels.BACKWARD_SIZES or not is_usable(BACKWARD_FOR_HOPPER):
        return None
    generator = torch.Generator(device_type).manual_seed(0)
    grad, q, k, v = (
        torch.randn(300, heads, size, generator=generator, device=device_type).to(dtype)
        for heads in (num_heads, num_heads, num_key_heads, num_key_heads)
    )
    ends = torch.tensor([0, 40, 300], dtype=torch.int32, device=device_type)
    try:
        for window in (CAUSAL, EVERYTHING):
            call = _VarlenCall(slice(None), slice(None), (ends, ends), (260, 260), window)
            out, lse = call.forward(q, k, v, size**-0.5, kernels)
            tried, plain = (call.backward(grad, q, k, v, out, lse, size**-0.5, each) for each in (kernels, None))
            pairs = [(each.float(), wanted.float()) for each, wanted in zip(tried, plain, strict=True)]
            if not all((each - wanted).norm() < MOST_APART * wanted.norm() for each, wanted in pairs):
                raise ValueError("its gradients are others than torch's")
    except Exception as error:  # noqa: BLE001 -- compilers raise anything, and there is a plain way
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"Warning: torch's backward pass of attention is used, not FlashAttention 4's: {reason}", flush=True)  # noqa: T201
        return None
    return kernels


def compile_backward(device: torch.device, dtype: torch.dtype, config: Any) -> bool:
    """Compiles what only gradients of attention need; True when that is FlashAttention 4, False when it is torch.

    Args:
        config: of the decoder.
    """
    if not _has_flash_of_groups(device, dtype):
        return False
    heads = config.num_attention_heads, config.num_key_value_heads, head_dim(config)
    return backward_kernels(device.type, dtype, *heads) is not None


def describe_attention(device: torch.device, dtype: torch.dtype, config: Any) -> str:
    """A description of the attention kernels in use, with the reason when they are not flash attention.

    Args:
        config: of the decoder.
    """
    if not _has_flash_of_groups(device, dtype):
        reason = "no GPU" if device.type != "cuda" else f"{dtype}, this GPU or this torch has no flash kernel"
        return f"scaled dot-product attention over padded tables ({reason})"
    kernels = "torch"
    if hopper_kernels(device.type) is not None:
        gradients = "FlashAttention 4" if compile_backward(device, dtype, config) else "torch"
        kernels = f"torch; in the decoder vLLM's FlashAttention 3, gradients by {gradients}"
    return f"variable-length flash attention ({kernels})"


def _plan_calls(
    prompt_ends: Tensor, group_ends: Tensor, response_ends: Tensor, split: int, longest: list[int]
) -> tuple[_VarlenCall, _VarlenCall, _VarlenCall]:
    """The three calls of cascade attention: causal over prompts, responses to their prompt, causal over responses.

    In the second all responses of a group form one query sequence, so the prompt's keys are read once and not copied.
    """
    prompt, group, response = longest
    prompts, responses = slice(0, split), slice(split, None)
    return (
        _VarlenCall(prompts, prompts, (prompt_ends, prompt_ends), (prompt, prompt), CAUSAL),
        _VarlenCall(responses, prompts, (group_ends, prompt_ends), (group, prompt), EVERYTHING),
        _VarlenCall(responses, responses, (response_ends, response_ends), (response, response), CAUSAL),
    )


def _merge(prefix: Tensor, prefix_lse: Tensor, suffix: Tensor, suffix_lse: Tensor, out: Tensor) -> Tensor:
    """Merges attention over two sets of keys into `out` [N, heads, size]; returns the merged LSE [heads, N]."""
    if out.is_cuda:
        from verl.model.kernels.attention import merge

        return merge(prefix, prefix_lse, suffix, suffix_lse, out)
    lse = torch.logaddexp(prefix_lse, suffix_lse)
    prefix_share, suffix_share = ((part - lse).exp().T.unsqueeze(-1) for part in (prefix_lse, suffix_lse))
    out.copy_(prefix_share * prefix + suffix_share * suffix)
    return lse


@torch.library.custom_op("verl::shared_attention", mutates_args=())
def _shared_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_ends: Tensor,
    group_ends: Tensor,
    response_ends: Tensor,
    split: int,
    longest: list[int],
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Outputs [T, heads, size] and LSE [heads, T]; arguments as of _plan_calls.

    One custom op, so that selective activation checkpointing can save its outputs without those of its parts.
    """
    kernels = hopper_kernels(q.device.type)
    of_prompts, over_prompts, over_responses = _plan_calls(prompt_ends, group_ends, response_ends, split, longest)
    out = torch.empty_like(q)
    out[:split], prompt_lse = of_prompts.forward(q, k, v, scale, kernels)
    parts = over_prompts.forward(q, k, v, scale, kernels) + over_responses.forward(q, k, v, scale, kernels)
    return out, torch.cat([prompt_lse, _merge(*parts, out[split:])], dim=1)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.split, ctx.longest, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _shared_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, prompt_ends, group_ends, response_ends, out, lse = ctx.saved_tensors
    calls = _plan_calls(prompt_ends, group_ends, response_ends, ctx.split, ctx.longest)
    kernels = backward_kernels(q.device.type, q.dtype, q.shape[1], *k.shape[1:])
    arguments = (grad.contiguous(), q, k, v, out, lse, ctx.scale, kernels)
    of_prompts, over_prompts, over_responses = (call.backward(*arguments) for call in calls)
    prompts, responses = slice(0, ctx.split), slice(ctx.split, None)
    grad_q, grad_k, grad_v = (torch.empty_like(states) for states in (q, k, v))
    grad_q[prompts] = of_prompts[0]
    torch.add(over_prompts[0], over_responses[0], out=grad_q[responses])
    for total, index in ((grad_k, 1), (grad_v, 2)):
        torch.add(of_prompts[index], over_prompts[index], out=total[prompts])
        total[responses] = over_responses[index]
    return grad_q, grad_k, grad_v, *(None,) * 6


_shared_attention.register_autograd(_shared_backward, setup_context=_save_for_backward)


def _flash_shared(q: Tensor, k: Tensor, v: Tensor, layout: GroupLayout, scale: float | None) -> Tensor:
    """Cascade attention [T, heads, size] on flash kernels: prompts, then responses."""
    ends = (layout.prompt_ends, layout.group_ends, layout.response_ends)
    longest = [layout.longest_prompt, layout.longest_group, layout.longest_response]
    q, k, v = (states.contiguous() for states in (q, k, v))
    return _shared_attention(q, k, v, *ends, layout.num_prompt_tokens, longest, scale)[0]


def _heads_first(states: Tensor, index: Tensor, num_repeats: int) -> Tensor:
    """Gathers [T, heads, size] by index [rows, columns] to [rows, heads * num_repeats, columns, size]."""
    gathered = states[index].transpose(1, 2)
    return gathered.repeat_interleave(num_repeats, dim=1) if num_repeats > 1 else gathered


def _padded_shared(q: Tensor, k: Tensor, v: Tensor, layout: GroupLayout, scale: float | None) -> Tensor:
    """Cascade attention [T, heads, size] by SDPA over padded tensors."""
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
    """Shared-prefix attention of a packed row: each prompt is computed once for all its responses.

    Args:
        query: [1, heads, T, size]; key and value: [1, key heads, T, size].
        layout: sequence boundaries of the row.

    Returns:
        [1, T, heads, size] and None for the attention weights.
    """
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))  # [T, heads, size]
    attend = _flash_shared if _has_flash_of_groups(q.device, q.dtype) else _padded_shared
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
    """Attention inside each window, or each image, of packed patches.

    Args:
        query, key, value: [1, heads, patches, size].
        cu_seq_lens_q: [windows + 1] cumulative window lengths.
        max_length_q: patches of the largest window.

    Returns:
        [1, patches, heads, size] and None for the attention weights.
    """
    if has_flash(query.device, query.dtype):
        q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
        ends = cu_seq_lens_q.to(torch.int32)
        longest = int(max_length_q)
        out = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling, window_size=EVERYTHING)
        assert isinstance(out, Tensor)
        return out.unsqueeze(0), None
    lengths = cu_seq_lens_q.diff().tolist()
    windows = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    outs = [scaled_dot_product_attention(q, k, v, scale=scaling) for q, k, v in windows]
    return torch.cat(outs, dim=2).transpose(1, 2), None


AttentionInterface.register(TEXT_ATTENTION, shared_prompt_attention)
AttentionInterface.register(VISION_ATTENTION, vision_attention)

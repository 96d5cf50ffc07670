"""Gated delta rule and short convolution over packed rows, the linear attention of Qwen3.5's layers.

Letters as in packing.py: G prompts, S responses, T tokens of the packed row; N sequences, each of L tokens or fewer;
H heads of keys, V heads of values, K and D sizes of a key and of a value; C channels and W taps of a convolution.

A head's state is a matrix, which each token decays, corrects towards its value and reads:
state_t = exp(g_t) (I - beta_t k_t k_t^T) state_(t-1) + beta_t k_t v_t^T, out_t = state_t^T q_t
(Gated Delta Networks, https://arxiv.org/abs/2412.06464, equation 10). Where attention shares the keys of a prompt,
these layers share its last state and the last W inputs of its convolution: both are computed once and handed to every
response, whose gradients add up in them.
"""

import os
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv1d, silu, softplus
from transformers import PreTrainedModel

from verl.model.attention import FLASH_DTYPES, HOPPER
from verl.model.families import decoder
from verl.model.internals import is_usable
from verl.model.packing import GroupLayout

LINEAR_ATTENTION = "linear attention"  # in internals.py
CHUNK = 64
"""Tokens whose corrections are solved together; more cost more work per token, fewer more steps."""
NORM_EPS = 1e-6
"""Added to squared lengths of queries and keys, as in transformers and flash-linear-attention."""


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    cu_seqlens: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Outputs [1, T, V, D] and last states [N, V, K, D] of packed sequences; called as flash-linear-attention's.

    In each chunk, with a_i = exp(g_1 + ... + g_i), the corrections u solve a triangular system
    u_i + beta_i sum_(j<i) a_i / a_j (k_i k_j) u_j = beta_i (v_i - a_i state^T k_i); then
    out_i = a_i state^T q_i + sum_(j<=i) a_i / a_j (q_i k_j) u_j (section 3.3).

    Args:
        q, k: [1, T, H, K]; each of the H heads serves V / H heads of values.
        v: [1, T, V, D].
        g, beta: [1, T, V] logarithm of the decay, and strength of the correction.
        cu_seqlens: [N + 1] cumulative lengths.
        initial_state: [N, V, K, D]; None: zeros.
        output_final_state: False returns None in place of the states.
        use_qk_l2norm_in_kernel: True divides queries and keys by their lengths.
    """
    index, mask = _unpacked_index(cu_seqlens, CHUNK)
    repeats = v.shape[2] // k.shape[2]
    exact = torch.promote_types(v.dtype, torch.float32)
    queries, keys, values = (part[0].to(exact)[index].transpose(1, 2) for part in (q, k, v))  # [N, heads, L, size]
    decay, strength = ((part[0].to(exact)[index] * mask.unsqueeze(-1)).transpose(1, 2) for part in (g, beta))
    if use_qk_l2norm_in_kernel:
        queries, keys = (part * (part.square().sum(-1, keepdim=True) + NORM_EPS).rsqrt() for part in (queries, keys))
    queries = queries.repeat_interleave(repeats, 1) * queries.shape[-1] ** -0.5
    keys = keys.repeat_interleave(repeats, 1)
    state = keys.new_zeros(len(keys), keys.shape[1], keys.shape[3], values.shape[3])
    if initial_state is not None:
        state = initial_state.to(exact)
    outputs = []
    size = min(CHUNK, index.shape[1])
    later = torch.ones(size, size, dtype=torch.bool, device=k.device).triu(1)
    for start in range(0, index.shape[1], CHUNK):
        at = slice(start, start + CHUNK)
        query, key, value, beta_of = queries[:, :, at], keys[:, :, at], values[:, :, at], strength[:, :, at, None]
        logs = decay[:, :, at].cumsum(-1).unsqueeze(-1)  # of a_i
        ratios = (logs - logs.transpose(-1, -2)).masked_fill(later, -torch.inf).exp()
        system = beta_of * (key @ key.transpose(-1, -2)) * ratios
        wanted = beta_of * (value - logs.exp() * (key @ state))
        corrections = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
        outputs.append(logs.exp() * (query @ state) + (query @ key.transpose(-1, -2) * ratios) @ corrections)
        last = logs[:, :, -1:]
        state = last.exp() * state + ((last - logs).exp() * key).transpose(-1, -2) @ corrections
    out = torch.cat(outputs, dim=2).transpose(1, 2)[mask].unsqueeze(0)
    return out.to(v.dtype), state if output_final_state else None


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    *,
    cu_seqlens: Tensor,
    initial_state: Tensor | None = None,
    activation: str | None = "silu",
) -> tuple[Tensor, None]:
    """Outputs [1, T, C] of a convolution of each channel over itself and the W - 1 tokens before.

    Called as flash-linear-attention's, and as there the second result is of no use here.

    Args:
        x: [1, T, C].
        weight: [C, W], of the token itself last.
        cu_seqlens: [N + 1] cumulative lengths.
        initial_state: [N, C, W] inputs before each sequence, the latest last; None: zeros.
        activation: "silu", or None for none.
    """
    index, mask = _unpacked_index(cu_seqlens)
    channels, width = weight.shape
    inputs = x[0][index].transpose(1, 2)  # [N, C, L]
    before = inputs.new_zeros(len(inputs), channels, width) if initial_state is None else initial_state.to(x.dtype)
    inputs = torch.cat([before[:, :, 1:], inputs], dim=2)
    out = conv1d(inputs, weight.unsqueeze(1), groups=channels).transpose(1, 2)[mask].unsqueeze(0)
    return silu(out) if activation == "silu" else out, None


def _unpacked_index(cu_seqlens: Tensor, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Packed index [N, L] of each sequence's tokens, right-padded with 0, and its mask; L is short or a multiple."""
    lengths = cu_seqlens.diff()
    width = int(lengths.max())
    width = -(-width // multiple) * multiple if width > multiple else width
    offset = torch.arange(width, device=cu_seqlens.device)
    mask = offset < lengths.unsqueeze(1)
    return (cu_seqlens[:-1].unsqueeze(1) + offset).masked_fill(~mask, 0).long(), mask


def _missing_for_hopper() -> str:
    """The first of TileLang and its compiler that is missing, in words; empty with both."""
    if find_spec("tilelang") is None:
        return "the package tilelang"
    own = which("nvcc")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    homes = [home] if home else [str(Path(own).parents[1])] if own else ["/usr/local/cuda", "/opt/cuda"]
    with suppress(PackageNotFoundError):
        homes += [
            str(Path(str(file.locate())).parents[1]) for file in files("nvidia-cuda-nvcc") or () if file.name == "nvcc"
        ]
    if any((Path(each) / "bin" / "nvcc").is_file() for each in homes):
        return ""
    return "CUDA's compiler nvcc: install CUDA's toolkit and set CUDA_HOME, or install the package nvidia-cuda-nvcc"


@cache
def _fast_kernels(capability: tuple[int, int]) -> tuple[Any, Any]:
    """Those of flash-linear-attention; where they cannot be used, after a warning, those of this file."""
    if not is_usable(LINEAR_ATTENTION):
        return chunk_gated_delta_rule, causal_conv1d
    from fla.modules.causal_conv1d import causal_conv1d as fast_conv1d
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule as fast_delta_rule

    # With Triton 3.6 its own gradient is wrong on these GPUs, and flash-linear-attention refuses to compute it.
    if capability == HOPPER and (missing := _missing_for_hopper()):
        print(  # noqa: T201
            "Warning: linear attention is computed by a slow form in torch: on Hopper GPUs flash-linear-attention "
            f"needs {missing}",
            flush=True,
        )
        return chunk_gated_delta_rule, fast_conv1d
    return fast_delta_rule, fast_conv1d


def kernels_for(device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Delta rule and convolution for this device and type."""
    if device.type != "cuda" or dtype not in FLASH_DTYPES:
        return chunk_gated_delta_rule, causal_conv1d
    return _fast_kernels(torch.cuda.get_device_capability(device))


def convolve_packed(x: Tensor, weight: Tensor, layout: GroupLayout, convolve: Any = causal_conv1d) -> Tensor:
    """[1, T, C] after convolution and SiLU; each response is preceded by the last tokens of its prompt.

    Args:
        x: [1, T, C] of a packed row.
        weight: [C, W].
        convolve: causal_conv1d of this file or of flash-linear-attention.
    """
    split, width = layout.num_prompt_tokens, weight.shape[1]
    starts, ends = layout.prompt_ends[:-1].unsqueeze(1), layout.prompt_ends[1:].unsqueeze(1)
    last = ends - width + torch.arange(width, device=x.device)  # [G, W]
    tails = x[0].index_select(0, last.clamp(min=0).flatten()).view(*last.shape, -1)
    tails = (tails * (last >= starts).unsqueeze(-1)).transpose(1, 2)  # [G, C, W]; a prompt may be shorter than W
    before = tails.index_select(0, layout.response_group).contiguous()
    of_prompts, _ = convolve(x[:, :split], weight, activation="silu", cu_seqlens=layout.prompt_ends)
    of_responses, _ = convolve(
        x[:, split:], weight, initial_state=before, activation="silu", cu_seqlens=layout.response_ends
    )
    return torch.cat([of_prompts, of_responses], dim=1)


def delta_rule_packed(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, layout: GroupLayout, rule: Any = chunk_gated_delta_rule
) -> Tensor:
    """Outputs [1, T, V, D] of a packed row; each response begins with the last state of its prompt.

    Args:
        q, k, v, g, beta: as of chunk_gated_delta_rule.
        rule: that function of this file or of flash-linear-attention.
    """
    split = layout.num_prompt_tokens
    prompts, responses = ([part[:, at] for part in (q, k, v, g, beta)] for at in (slice(split), slice(split, None)))
    of_prompts, states = rule(
        *prompts, cu_seqlens=layout.prompt_ends, output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    of_responses, _ = rule(
        *responses,
        cu_seqlens=layout.response_ends,
        initial_state=states.index_select(0, layout.response_group),
        use_qk_l2norm_in_kernel=True,
    )
    return torch.cat([of_prompts, of_responses], dim=1)


def linear_layers(model: PreTrainedModel) -> list[Any]:
    """The decoder layers with linear attention; none in most families."""
    return [layer for layer in decoder(model).layers if hasattr(layer, "linear_attn")]


def scan_packed(model: PreTrainedModel) -> None:
    """Replaces the forward pass of linear attention by one over packed rows, in place."""
    for layer in linear_layers(model):
        layer.linear_attn.forward = MethodType(_forward, layer.linear_attn)


def _forward(self: Any, hidden_states: Tensor, *, layout: GroupLayout, **_: Any) -> Tensor:
    """The output [1, T, hidden] of linear attention; the decay is computed in float32."""
    rule, convolve = kernels_for(hidden_states.device, hidden_states.dtype)
    mixed = convolve_packed(self.in_proj_qkv(hidden_states), self.conv1d.weight.squeeze(1), layout, convolve)
    widths = [self.key_dim, self.key_dim, self.value_dim]
    sizes = [self.head_k_dim, self.head_k_dim, self.head_v_dim]
    q, k, v = (part.unflatten(2, (-1, size)) for part, size in zip(mixed.split(widths, 2), sizes, strict=True))
    beta = self.in_proj_b(hidden_states).sigmoid()
    g = -self.A_log.float().exp() * softplus(self.in_proj_a(hidden_states).float() + self.dt_bias.float())
    out = delta_rule_packed(q, k, v, g, beta, layout, rule)
    gate = self.in_proj_z(hidden_states).unflatten(2, (-1, self.head_v_dim))
    return self.out_proj(self.norm(out.flatten(0, 2), gate.flatten(0, 2)).view(*out.shape[:2], -1))

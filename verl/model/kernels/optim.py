"""Fused Triton kernel of the KahanAdamW step in distributed/optim.py: one pass over its five tensors."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def round_to_bf16(x, threshold):
    """x with 16 bits of its float32 mantissa, rounded up where its last bits and the threshold's first carry over."""
    bits = x.to(tl.int32, bitcast=True) + (threshold >> 16).to(tl.int32)
    return (bits & -65536).to(tl.float32, bitcast=True)


@triton.jit
def add_rounded(w, change, threshold):
    """w + change, rounded to float32 stochastically by 2Sum, as in distributed/optim.py."""
    total = w + change
    back = total - w
    error = (w - (total - back)) + (change - back)
    toward = tl.where((error > 0) == (total > 0), 1, -1)
    neighbour = (total.to(tl.int32, bitcast=True) + toward).to(tl.float32, bitcast=True)
    is_moved = threshold.to(tl.float32) * 2.3283064365386963e-10 * tl.abs(neighbour - total) < tl.abs(error)
    return tl.where(is_moved, neighbour, total)


@triton.jit(do_not_specialize=["first", "offset_m", "offset_v", "offset_w", "num_values"])
def kahan_adamw_kernel(
    value,
    gradient,
    mean,
    square,
    low_bits,
    num_values,
    first,
    offset_m,
    offset_v,
    offset_w,
    step_size,
    square_scale,
    beta1,
    beta2,
    eps,
    decay,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_value = at < num_values
    h = (at + first).to(tl.uint32) * 0x9E3779B1
    h = (h ^ (h >> 15)) * 0x85EBCA77
    h = (h ^ (h >> 13)) * 0xC2B2AE3D
    h = h ^ (h >> 16)
    g = tl.load(gradient + at, mask=is_value, other=0.0).to(tl.float32)
    m = beta1 * tl.load(mean + at, mask=is_value, other=0.0).to(tl.float32) + (1 - beta1) * g
    v = beta2 * tl.load(square + at, mask=is_value, other=0.0).to(tl.float32) + (1 - beta2) * g * g
    high = tl.load(value + at, mask=is_value, other=0.0).to(tl.float32).to(tl.int32, bitcast=True)
    low = tl.load(low_bits + at, mask=is_value, other=0).to(tl.int32)
    w = (high + low).to(tl.float32, bitcast=True)
    change = -(decay * w + step_size * m / (tl.sqrt(v * square_scale) + eps))
    bits = add_rounded(w, change, h * 0x165667B1 + offset_w.to(tl.uint32)).to(tl.int32, bitcast=True)
    rounded = ((bits + 0x8000) & -65536).to(tl.float32, bitcast=True)
    m = round_to_bf16(m, h + offset_m.to(tl.uint32))
    v = round_to_bf16(v, h * 0x27D4EB2F + offset_v.to(tl.uint32))
    tl.store(value + at, rounded.to(tl.bfloat16), mask=is_value)
    tl.store(mean + at, m.to(tl.bfloat16), mask=is_value)
    tl.store(square + at, v.to(tl.bfloat16), mask=is_value)
    tl.store(low_bits + at, bits.to(tl.int16), mask=is_value)


def update(
    value: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    low_bits: Tensor,
    *,
    first: int,
    offsets: list[int],
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Updates all but the gradient in place; contiguous tensors of equal size, `step` from 1."""
    assert all(tensor.is_contiguous() for tensor in (value, gradient, mean, square, low_bits))
    if not value.numel():  # an empty shard of a small parameter
        return
    beta1, beta2 = betas
    scalars = (lr / (1 - beta1**step), 1 / (1 - beta2**step), beta1, beta2, eps, lr * weight_decay)
    grid = (triton.cdiv(value.numel(), BLOCK),)
    signed = [offset - (offset >> 31 << 32) for offset in offsets]  # one type for all: int32
    tensors = (value, gradient, mean, square, low_bits.view(torch.int16))
    kahan_adamw_kernel[grid](*tensors, value.numel(), first, *signed, *scalars, BLOCK)  # type: ignore[arg-type]

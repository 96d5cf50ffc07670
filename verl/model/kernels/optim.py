"""Fused Triton kernel of the KahanAdamW step in distributed/optim.py: one pass over its five tensors.

Its constants are those of that file; results agree but for the last bit of float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512
"""Few values per thread: with more the intermediate ones do not fit into registers."""


@triton.jit
def load_float(pointer, at, is_value):
    """Values in bfloat16, in float32."""
    return tl.load(pointer + at, mask=is_value, other=0.0).to(tl.float32)


@triton.jit
def load_bits(pointer, at, is_value):
    """Bits of values in bfloat16, as signed numbers."""
    return tl.load(pointer + at, mask=is_value, other=0.0).to(tl.int16, bitcast=True).to(tl.int32)


@triton.jit
def store_bits(pointer, at, is_value, bits):
    """Stores the last 16 bits as a value in bfloat16."""
    tl.store(pointer + at, bits.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=is_value)


@triton.jit
def round_up_bits(x, threshold):
    """Bits of x in bfloat16, where the last bits of its float32 form and the threshold's first ones carry over."""
    return (x.to(tl.int32, bitcast=True) + (threshold >> 16).to(tl.int32)) >> 16


@triton.jit
def add_rounded(w, change, threshold):
    """Bits of w + change, rounded to float32 stochastically by 2Sum, as in distributed/optim.py."""
    total = w + change
    back = total - w
    error = (w - (total - back)) + (change - back)
    bits = total.to(tl.int32, bitcast=True)
    neighbour = tl.where((error > 0) == (total > 0), bits + 1, bits - 1)
    gap = tl.abs(neighbour.to(tl.float32, bitcast=True) - total)
    return tl.where(threshold.to(tl.float32) * 2.3283064365386963e-10 * gap < tl.abs(error), neighbour, bits)


@triton.jit(do_not_specialize=["num_values", "first", "step"])
def kahan_adamw_kernel(
    value,
    gradient,
    mean,
    square,
    low_bits,
    num_values,
    first,
    step,
    step_size,
    beta1,
    beta2,
    eps,
    decay,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_value = at < num_values
    g = load_float(gradient, at, is_value)
    m = beta1 * load_float(mean, at, is_value) + (1 - beta1) * g
    v = beta2 * load_float(square, at, is_value) + (1 - beta2) * g * g
    w = ((load_bits(value, at, is_value) << 16) + load_bits(low_bits, at, is_value)).to(tl.float32, bitcast=True)
    h = (at + first).to(tl.uint32) * 0x9E3779B1
    h = (h ^ (h >> 15)) * 0x85EBCA77
    t = step.to(tl.uint32)
    change = -(decay * w + step_size * m / (tl.sqrt(v) + eps))
    w_bits = add_rounded(w, change, h + t * 2360945575)
    store_bits(value, at, is_value, (w_bits + 0x8000) >> 16)
    store_bits(low_bits, at, is_value, w_bits)
    store_bits(mean, at, is_value, round_up_bits(m, h + t * 3518319155))
    store_bits(square, at, is_value, round_up_bits(v, h + t * 2654435769))


def update(
    value: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    low_bits: Tensor,
    *,
    first: int,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Updates all but the gradient in place; contiguous tensors of equal size in bfloat16, `step` from 1."""
    assert gradient.is_contiguous() and value.is_contiguous() and gradient.dtype == value.dtype == torch.bfloat16
    num_values = value.numel()
    if not num_values:  # an empty shard of a small parameter
        return
    beta1, beta2 = betas
    correction = (1 - beta2**step) ** 0.5
    scalars = (correction * lr / (1 - beta1**step), beta1, beta2, correction * eps, lr * weight_decay)
    grid = (-(-num_values // BLOCK),)  # triton.cdiv would take a tenth of a small tensor's time on the host
    tensors = (value, gradient, mean, square, low_bits)
    kahan_adamw_kernel[grid](*tensors, num_values, first, step, *scalars, BLOCK)  # type: ignore[arg-type]

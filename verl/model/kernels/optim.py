"""Fused Triton kernel of the KahanAdamW step in optim.py: one pass over its five tensors, computed in float32."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def kahan_adamw_kernel(
    value,
    gradient,
    mean,
    square,
    compensation,
    num_values,
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
    g = tl.load(gradient + at, mask=is_value, other=0.0).to(tl.float32)
    m = beta1 * tl.load(mean + at, mask=is_value, other=0.0).to(tl.float32) + (1 - beta1) * g
    v = beta2 * tl.load(square + at, mask=is_value, other=0.0).to(tl.float32) + (1 - beta2) * g * g
    c = tl.load(compensation + at, mask=is_value, other=0.0).to(tl.float32)
    c -= step_size * m / (tl.sqrt(v * square_scale) + eps)
    p = tl.load(value + at, mask=is_value, other=0.0).to(tl.float32) * (1 - decay)
    rounded = (p + c).to(value.dtype.element_ty)
    c += p - rounded.to(tl.float32)
    tl.store(value + at, rounded, mask=is_value)
    tl.store(mean + at, m.to(mean.dtype.element_ty), mask=is_value)
    tl.store(square + at, v.to(square.dtype.element_ty), mask=is_value)
    tl.store(compensation + at, c.to(compensation.dtype.element_ty), mask=is_value)


def update(
    value: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    compensation: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Updates all but the gradient in place; contiguous tensors of equal size, `step` from 1."""
    assert all(tensor.is_contiguous() for tensor in (value, gradient, mean, square, compensation))
    if not value.numel():  # an empty shard of a small parameter
        return
    beta1, beta2 = betas
    scalars = (lr / (1 - beta1**step), 1 / (1 - beta2**step), beta1, beta2, eps, lr * weight_decay)
    grid = (triton.cdiv(value.numel(), BLOCK),)
    kahan_adamw_kernel[grid](value, gradient, mean, square, compensation, value.numel(), *scalars, BLOCK)  # type: ignore[arg-type]

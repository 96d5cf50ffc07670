"""Fused Triton kernels of log-probs, entropy and their gradient for log_probs.py; one program per row of logits."""

import triton
import triton.language as tl

BLOCK = 8192


@triton.jit
def score_kernel(logits, targets, out, num_columns, num_rows, inverse_temperature, BLOCK: tl.constexpr):
    """Writes log-prob of the target, entropy and log-normalizer of a row to out[0], out[1], out[2]; online softmax."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * num_columns
    highest = float("-inf")
    total = 0.0  # sum of e^(z - highest)
    weighted = 0.0  # sum of e^(z - highest) z
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        is_column = columns < num_columns
        z = tl.load(logits + columns, mask=is_column, other=float("-inf")).to(tl.float32) * inverse_temperature
        new_highest = tl.maximum(highest, tl.max(z, 0))
        shrink = tl.exp(highest - new_highest)
        e = tl.exp(z - new_highest)
        total = total * shrink + tl.sum(e, 0)
        weighted = weighted * shrink + tl.sum(tl.where(is_column, e * z, 0.0), 0)
        highest = new_highest
    normalizer = highest + tl.log(total)
    target = tl.load(targets + row)
    chosen = tl.load(logits + target).to(tl.float32) * inverse_temperature
    tl.store(out + row, chosen - normalizer)
    tl.store(out + num_rows + row, normalizer - weighted / total)
    tl.store(out + 2 * num_rows + row, normalizer)


@triton.jit
def differentiate_kernel(logits, targets, normalizers, grad, num_columns, inverse_temperature, BLOCK: tl.constexpr):
    """Overwrites the row with grad (onehot(target) - softmax) / temperature."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * num_columns
    normalizer = tl.load(normalizers + row)
    scale = tl.load(grad + row) * inverse_temperature
    target = tl.load(targets + row)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        is_column = columns < num_columns
        z = tl.load(logits + columns, mask=is_column, other=float("-inf")).to(tl.float32) * inverse_temperature
        probs = tl.exp(z - normalizer)
        value = scale * (tl.where(columns == target, 1.0, 0.0) - probs)
        tl.store(logits + columns, value.to(logits.dtype.element_ty), mask=is_column)

"""Triton kernel that merges attention over two sets of keys by their LSE (merge_attn_states), for attention.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32
"""Queries of one head per program."""


@triton.jit
def merge_kernel(
    prefix,
    prefix_lse,
    suffix,
    suffix_lse,
    out,
    lse,
    num_queries,
    num_heads,
    size,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    head = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_queries
    at = head.to(tl.int64) * num_queries + rows
    first = tl.load(prefix_lse + at, mask=is_row, other=0.0)
    second = tl.load(suffix_lse + at, mask=is_row, other=0.0)
    highest = tl.maximum(first, second)
    total = highest + tl.log(tl.exp(first - highest) + tl.exp(second - highest))
    tl.store(lse + at, total, mask=is_row)
    columns = tl.arange(0, COLUMNS)
    offsets = (rows.to(tl.int64)[:, None] * num_heads + head) * size + columns[None, :]
    is_element = is_row[:, None] & (columns < size)[None, :]
    a = tl.load(prefix + offsets, mask=is_element, other=0.0).to(tl.float32)
    b = tl.load(suffix + offsets, mask=is_element, other=0.0).to(tl.float32)
    merged = tl.exp(first - total)[:, None] * a + tl.exp(second - total)[:, None] * b
    tl.store(out + offsets, merged.to(out.dtype.element_ty), mask=is_element)


def merge(prefix: Tensor, prefix_lse: Tensor, suffix: Tensor, suffix_lse: Tensor, out: Tensor) -> Tensor:
    """Writes the merged attention to `out` [N, heads, size], returns its LSE [heads, N]; all tensors contiguous."""
    assert all(tensor.is_contiguous() for tensor in (prefix, prefix_lse, suffix, suffix_lse, out))
    num_queries, num_heads, size = out.shape
    lse = torch.empty_like(suffix_lse)
    grid = (triton.cdiv(num_queries, ROWS), num_heads)
    columns = triton.next_power_of_2(size)
    merge_kernel[grid](prefix, prefix_lse, suffix, suffix_lse, out, lse, num_queries, num_heads, size, ROWS, columns)  # type: ignore[arg-type]
    return lse

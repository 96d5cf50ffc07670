"""The row kernel of attention.py: attention over two sets of keys from attention over each."""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32
"""Queries of one head that a program takes."""


@triton.jit
def merge_kernel(
    seen,
    seen_lse,
    own,
    own_lse,
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
    first = tl.load(seen_lse + at, mask=is_row, other=0.0)
    second = tl.load(own_lse + at, mask=is_row, other=0.0)
    highest = tl.maximum(first, second)
    total = highest + tl.log(tl.exp(first - highest) + tl.exp(second - highest))
    tl.store(lse + at, total, mask=is_row)
    columns = tl.arange(0, COLUMNS)
    places = (rows.to(tl.int64)[:, None] * num_heads + head) * size + columns[None, :]
    is_place = is_row[:, None] & (columns < size)[None, :]
    a = tl.load(seen + places, mask=is_place, other=0.0).to(tl.float32)
    b = tl.load(own + places, mask=is_place, other=0.0).to(tl.float32)
    merged = tl.exp(first - total)[:, None] * a + tl.exp(second - total)[:, None] * b
    tl.store(out + places, merged.to(out.dtype.element_ty), mask=is_place)


def merge(seen: Tensor, seen_lse: Tensor, own: Tensor, own_lse: Tensor, out: Tensor) -> Tensor:
    """Writes the merged [N, heads, size] to `out` and returns its log-normalizers [heads, N]; all contiguous."""
    assert all(tensor.is_contiguous() for tensor in (seen, seen_lse, own, own_lse, out))
    num_queries, num_heads, size = out.shape
    lse = torch.empty_like(own_lse)
    grid = (triton.cdiv(num_queries, ROWS), num_heads)
    columns = triton.next_power_of_2(size)
    merge_kernel[grid](seen, seen_lse, own, own_lse, out, lse, num_queries, num_heads, size, ROWS, columns)  # type: ignore[arg-type]
    return lse

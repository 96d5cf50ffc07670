"""On a GPU: attention in two parts is as close to float64 as FlashAttention's own, also replayed as a CUDA graph."""

import pytest
import torch

from tests.support.gpus import relative
from tests.support.shared_prefix import attend, draw_tensors, make_metadata, make_parts, make_step, run

pytestmark = pytest.mark.gpu
SAMPLES = [(3, 8), (1, 1), (0, 2), (6, 5), (2, 1), (2, 1), (4, 3), (5, 70)]


@pytest.mark.parametrize("is_graph", [False, True])
def test_two_parts_are_flash_attention(is_graph):
    builder, attention, plain = make_parts("cuda", torch.bfloat16)
    builder.__dict__["supports_cascade"] = True
    graph, out = torch.cuda.CUDAGraph(), None
    for seed in range(3):
        table, lens, starts = (part.cuda() for part in make_step(SAMPLES, 2, seed))
        num_rows = int(starts[-1])
        queries, cache = draw_tensors(len(lens), "cuda", torch.bfloat16, seed)
        metadata = builder.build(0, make_metadata(table, lens, starts))
        assert metadata.groups.seq_lens.any()  # or there would be but one part
        if not is_graph or seed == 0:
            out = run(attention, queries, cache, metadata)
        if is_graph and seed == 0:
            with torch.cuda.graph(graph):
                static = queries, cache
                out = run(attention, *static, metadata)
        if is_graph:
            for kept, new in zip(static, (queries, cache), strict=True):
                kept.copy_(new)
            graph.replay()
        keys, values = cache.unbind(1)
        paged = {"cu_seqlens_q": starts, "seqused_k": lens, "block_table": table}
        exact, _ = attend(queries, keys, values, **paged, softmax_scale=attention.scale, causal=True)
        theirs = run(plain, queries, cache, builder.prefix_builder.build(0, make_metadata(table, lens, starts)))
        errors = [relative(one[:num_rows], exact[:num_rows]) for one in (out, theirs)]
        print(f"against float64: in two parts {errors[0]:.1e}, in one {errors[1]:.1e}")
        assert errors[0] < 2 * errors[1] + 1e-3

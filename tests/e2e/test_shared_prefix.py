"""Attention in two parts is attention, and the parts are what a step's rows share; FlashAttention is written out."""

from types import SimpleNamespace

import pytest
import torch

from tests.support.shared_prefix import (
    BLOCK,
    SYSTEM,
    attend,
    draw_tensors,
    make_metadata,
    make_parts,
    make_step,
    merge,
    run,
)

pytestmark = pytest.mark.e2e


def groups_of(parts) -> list[tuple[int, int]]:
    """Rows and shared tokens of each group."""
    sizes = parts.starts.diff().tolist()
    return [(size, length) for size, length in zip(sizes, parts.prefix_lens.tolist(), strict=True) if size]


@pytest.mark.parametrize(
    ("samples", "groups"),
    [
        ([(3, 4), (5, 2)], [(4, 3 + SYSTEM), (2, 5 + SYSTEM)]),
        ([(3, 1), (4, 1), (5, 1)], [(3, SYSTEM)]),  # one sample each is left: they share how prompts begin
        ([(3, 2), (4, 1), (5, 2)], [(2, 3 + SYSTEM), (1, 0), (2, 5 + SYSTEM)]),
        ([(0, 3), (2, 2)], [(3, SYSTEM), (2, 2 + SYSTEM)]),
        ([(2, 70)], [(64, 2 + SYSTEM), (6, 2 + SYSTEM)]),
        ([(2, 65)], [(64, 2 + SYSTEM), (1, 0)]),
        ([(1, 1)], [(1, 0)]),
    ],
)
@pytest.mark.parametrize("num_padded", [0, 3])
def test_rows_of_a_prompt_are_a_group(samples, groups, num_padded):
    from verl.workers.shared_prefix import split_prefixes

    table, lens, starts = make_step(samples, num_padded)
    parts = split_prefixes(table, lens, starts, BLOCK)
    assert groups_of(parts) == [(size, num_blocks * BLOCK) for size, num_blocks in groups]
    assert len(parts.starts) == len(lens) + 1 and parts.starts[-1] == len(lens) - num_padded


@pytest.mark.parametrize(
    ("num_blocks", "groups"), [*[(n, [(1, 0), (2, 4 * BLOCK)]) for n in (1, 2, 3, 4)], (5, [(3, 4 * BLOCK)])]
)
def test_a_group_never_shares_the_block_that_a_row_writes_to(num_blocks, groups):
    """Rows of one prompt of five blocks; the first is only so far, the second writes the last token of the fifth."""
    from verl.workers.shared_prefix import split_prefixes

    table, _, starts = make_step([(3, 3)])
    lens = torch.tensor([num_blocks * BLOCK, 5 * BLOCK, 6 * BLOCK]).int()
    assert groups_of(split_prefixes(table, lens, starts, BLOCK)) == groups


SAMPLES = [(3, 8), (1, 1), (0, 2), (6, 5), (2, 1), (2, 1), (4, 3), (5, 44)]


@pytest.mark.parametrize("num_padded", [0, 2])
def test_two_parts_are_the_whole(monkeypatch, num_padded):
    from vllm.v1.attention.backends import flash_attn

    from verl.workers import shared_prefix

    builder, attention, plain = make_parts("cpu", torch.float32)
    calls = []
    monkeypatch.setattr(
        flash_attn, "flash_attn_varlen_func", lambda **a: calls.append(a) or attend(**a), raising=False
    )
    monkeypatch.setattr(shared_prefix, "merge_attn_states", merge)
    builder.__dict__["supports_cascade"] = True
    for seed in range(3):  # the memory that is kept is written anew by each step
        table, lens, starts = make_step(SAMPLES, num_padded, seed)
        queries, cache = draw_tensors(len(lens), "cpu", torch.float32, seed)
        metadata = builder.build(0, make_metadata(table, lens, starts))
        num_rows = int(starts[-1])
        out = run(attention, queries, cache, metadata)[:num_rows]
        assert len(calls) == 2 * (seed + 1)
        keys, values = cache.unbind(1)
        expected, _ = attend(
            q=queries, k=keys, v=values, cu_seqlens_q=starts, seqused_k=lens, block_table=table,
            softmax_scale=attention.scale, causal=True,
        )  # fmt: skip
        torch.testing.assert_close(out, expected[:num_rows].float(), atol=1e-6, rtol=1e-5)
    addresses = {name: value.data_ptr() for name, value in vars(builder.buffers).items()}
    assert metadata.seq_lens.data_ptr() == addresses["suffix_lens"]
    assert metadata.groups.block_table.data_ptr() == addresses["prefix_table"]


def test_steps_that_read_a_prompt_and_layers_of_other_kinds_are_left_to_vllm(monkeypatch):
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from verl.workers import shared_prefix

    builder, attention, plain = make_parts("cpu", torch.float32)
    layers = {"layer": SimpleNamespace(impl=attention)}
    monkeypatch.setattr(shared_prefix, "get_layers_from_vllm_config", lambda *_: layers)
    for impl, supports_cascade in ((plain, False), (attention, True)):
        layers["layer"].impl = impl
        builder.__dict__.pop("supports_cascade", None)
        assert builder.supports_cascade == supports_cascade
    step = make_metadata(*make_step(SAMPLES))
    assert hasattr(builder.build(0, step), "groups")
    step.max_query_len = 2
    assert not hasattr(builder.build(0, step), "groups")
    for num_rows in (1, shared_prefix.FEW_ROWS, shared_prefix.FEW_ROWS + 1):
        few = make_metadata(*make_step([(0, 1)] * (num_rows - 1) + [(1, 1)]))
        assert hasattr(builder.build(0, few), "groups") == (num_rows > shared_prefix.FEW_ROWS)
    assert attention.supports_cascade
    other = {
        "sliding_window": (127, 0),
        "logits_soft_cap": 30.0,
        "sinks": torch.zeros(1),
        "vllm_flash_attn_version": 2,
    }
    for name, value in other.items():
        with monkeypatch.context() as changed:
            changed.setattr(attention, name, value)
            assert not attention.supports_cascade
    backend = AttentionBackendEnum.FLASH_ATTN.get_class()
    assert backend is shared_prefix.SharedPrefixBackend and backend.get_name() == "FLASH_ATTN"
    assert backend.get_builder_cls() is type(builder) and backend.get_impl_cls() is type(attention)


@pytest.mark.parametrize("most", [1, 24, 48, 63, 64, 65, 256, 1000, 1024])
def test_no_graph_serves_steps_of_few_rows_and_of_many(most):
    from verl.trainer.engine_arguments import cudagraph_sizes
    from verl.workers.shared_prefix import FEW_ROWS

    assert most < FEW_ROWS or FEW_ROWS in cudagraph_sizes(most)

"""Steps of an engine whose rows share blocks of the KV cache, and vLLM's parts that attend in them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

BLOCK, NUM_BLOCKS, WIDTH = 16, 256, 12
HEADS, KEY_HEADS, SIZE = 8, 2, 32
SYSTEM = 2
"""Blocks that all prompts of a step begin with."""


def make_step(samples: list[tuple[int, int]], num_padded: int = 0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tables, lengths and starts of rows: for each prompt its own blocks beyond SYSTEM and how many samples it has.

    Behind a row's last block its table holds what an earlier row left there, as an engine's does.
    """
    generator = torch.Generator().manual_seed(seed)
    free = iter(torch.randperm(NUM_BLOCKS, generator=generator).tolist())
    system = [next(free) for _ in range(SYSTEM)]
    stale = [next(free) for _ in range(WIDTH)]
    table, lens = [], []
    for num_blocks, num_samples in samples:
        prompt = system + [next(free) for _ in range(num_blocks)]
        for _ in range(num_samples):
            length = int(torch.randint(1, 3 * BLOCK, (1,), generator=generator))
            blocks = prompt + [next(free) for _ in range(-(-length // BLOCK))]
            table.append(blocks + stale[len(blocks) :])
            lens.append(len(prompt) * BLOCK + length)
    table += [[0] * WIDTH] * num_padded
    starts = [*range(len(lens) + 1), *[len(lens)] * num_padded]
    return torch.tensor(table).int(), torch.tensor(lens + [0] * num_padded).int(), torch.tensor(starts).int()


def attend(q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q, seqused_k, block_table, softmax_scale, causal, **_: Any):
    """FlashAttention over paged keys, in float64: outputs [T, H, D] and sums [H, T]; who sees nothing has 0, -inf."""
    out, sums = torch.zeros_like(q, dtype=torch.float64), q.new_full(q.shape[1::-1], -torch.inf, dtype=torch.float64)
    repeats = q.shape[1] // k.shape[2]
    starts = cu_seqlens_q.tolist()
    for row, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
        num_keys = int(seqused_k[row])
        if end == start or not num_keys:
            continue
        assert not causal or end - start == 1  # then all keys are seen
        keys, values = (
            cache[block_table[row].long()].flatten(0, 1)[:num_keys].double().repeat_interleave(repeats, 1)
            for cache in (k, v)
        )
        scores = torch.einsum("qhd,khd->hqk", q[start:end].double(), keys) * softmax_scale
        sums[:, start:end] = scores.logsumexp(-1)
        out[start:end] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
    return out, sums


def merge(output: Tensor, first: Tensor, first_sums: Tensor, second: Tensor, second_sums: Tensor) -> None:
    """Source: arXiv 2501.01005, section 2.2."""
    weights = torch.stack([first_sums, second_sums]).softmax(0).transpose(1, 2).unsqueeze(-1)
    output.copy_(weights[0] * first + weights[1] * second)


def make_parts(device: str, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """Builder and attention of groups, and the attention of vLLM alone."""
    from vllm.config import (
        CacheConfig,
        CompilationConfig,
        ModelConfig,
        SchedulerConfig,
        VllmConfig,
        set_current_vllm_config,
    )
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from verl.workers.shared_prefix import SharedPrefixAttention, SharedPrefixBuilder

    model = ModelConfig(model=str(Path(__file__).parents[2] / "configs" / "toy_model"), max_model_len=BLOCK * WIDTH)
    model.get_num_attention_heads = lambda _: HEADS  # type: ignore[method-assign]
    model.get_num_kv_heads = lambda _: KEY_HEADS  # type: ignore[method-assign]
    model.get_head_size = lambda: SIZE  # type: ignore[method-assign]
    scheduler = SchedulerConfig(max_num_seqs=256, max_model_len=BLOCK * WIDTH, is_encoder_decoder=False)
    graphs = CompilationConfig(cudagraph_mode="FULL_AND_PIECEWISE", max_cudagraph_capture_size=256)  # type: ignore
    config = VllmConfig(
        model_config=model,
        scheduler_config=scheduler,
        cache_config=CacheConfig(block_size=BLOCK),
        compilation_config=graphs,
    )
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=KEY_HEADS, head_size=SIZE, dtype=dtype)
    shape = (HEADS, SIZE, SIZE**-0.5, KEY_HEADS, None, None, "auto")
    with set_current_vllm_config(config):
        builder = SharedPrefixBuilder(spec, ["layer"], config, torch.device(device))
        shared, plain = SharedPrefixAttention(*shape), FlashAttentionImpl(*shape)
    if device == "cpu":
        shared.vllm_flash_attn_version = 3  # which is written out here
    return builder, shared, plain


def make_metadata(table: Tensor, lens: Tensor, starts: Tensor) -> Any:
    """The step as a runner describes it."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    num_rows = len(lens)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts.cpu(),
        seq_lens=lens,
        num_reqs=num_rows,
        num_actual_tokens=num_rows,
        max_query_len=1,
        max_seq_len=BLOCK * WIDTH,
        block_table_tensor=table,
        slot_mapping=torch.zeros(num_rows, dtype=torch.int64, device=table.device),
    )


def draw_tensors(num_rows: int, device: str, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """Queries [B, HEADS, SIZE] and a cache [NUM_BLOCKS, 2, BLOCK, KEY_HEADS, SIZE]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (num_rows, HEADS, SIZE), (NUM_BLOCKS, 2, BLOCK, KEY_HEADS, SIZE)
    queries, cache = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return queries, cache


def run(attention: Any, queries: Tensor, cache: Tensor, metadata: Any) -> Tensor:
    """Its output [B, HEADS, SIZE]."""
    one = torch.ones(1, device=queries.device)
    layer = SimpleNamespace(_q_scale=one, _k_scale=one, _v_scale=one)
    return attention.forward(layer, queries, queries, queries, cache, metadata, torch.zeros_like(queries))

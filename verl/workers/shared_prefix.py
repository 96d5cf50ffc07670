"""Cascade (shared-prefix) attention backend for vLLM: reads a prompt's KV cache once for all its samples.

When 1,024 sequences of 128 prompts decode, nine tenths of the memory traffic are prompts, each read once per sample.
Here neighbouring sequences with the same leading KV cache blocks (prefix caching) form a group. All its queries attend
to the shared prefix in one call and to their own suffixes in another, and both outputs are merged exactly by their
log-sum-exp (FlashInfer, https://arxiv.org/abs/2501.01005, section 2.2). Loaded only by vLLM.

Letters: B rows (sequences that decode one token), M blocks of a row's block table; at most B groups.
"""

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from vllm.config import CUDAGraphMode, VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides, is_quantized_kv_cache
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

MAX_GROUP_ROWS = 64
"""Rows of a group; more samples of a prompt form several groups."""
FEW_ROWS = 64
"""Rows of a step up to which every row reads its own prompt.

At the end of a rollout hardly two rows of a prompt are left: a second call and its tables cost as much as they save,
and the host 1.3 ms a step. CUDA graphs are captured for steps of exactly so many rows (`cudagraph_sizes`), so that
each holds one kind of steps alone.
"""


@dataclass
class CascadeTables:
    """Block tables of a step's two attention calls: prefixes per group, suffixes per row.

    Attributes:
        starts: [B + 1] cumulative group sizes (cu_seqlens of queries); unused groups are empty.
        prefix_lens: [B] tokens of each group's shared blocks.
        prefix_table: [B, M] block table of each group's prefix.
        suffix_lens: [B] tokens of each row after the prefix, with the newest.
        suffix_table: [B, M] block table of each row's suffix.
    """

    starts: Tensor
    prefix_lens: Tensor
    prefix_table: Tensor
    suffix_lens: Tensor
    suffix_table: Tensor


def split_prefixes(table: Tensor, lens: Tensor, starts: Tensor, block_size: int) -> CascadeTables:
    """Groups neighbouring rows that share more leading blocks with each other than with their other neighbours.

    Without GPU syncs and with shapes independent of the number of groups, so that CUDA graphs can capture it.

    Args:
        table: [B, M] block table; arbitrary beyond a row's tokens.
        lens: [B] tokens of each row with that of this step; 0 for padding rows.
        starts: [B + 1] cumulative queries of the rows, 1 or 0 each.
        block_size: tokens.
    """
    num_rows, width = table.shape
    rows = torch.arange(num_rows, device=table.device)
    whole = (lens - 1).clamp(min=0) // block_size  # full blocks before the token of this step
    links = torch.zeros(num_rows + 1, dtype=torch.int64, device=table.device)  # blocks shared with the row before
    links[1:-1] = (table[1:] == table[:-1]).long().cumprod(dim=1).sum(dim=1)
    links[1:-1] = torch.minimum(links[1:-1], torch.minimum(whole[1:], whole[:-1]))
    before, here, after = links.roll(1)[:-1], links[:-1], links[1:]
    is_first = (here == 0) | (here < before) | (here < after)
    first = torch.where(is_first, rows, 0).cummax(0).values
    is_first |= (rows - first) % MAX_GROUP_ROWS == 0
    group = is_first.cumsum(0) - 1

    def smallest(values: Tensor, largest: int | Tensor) -> Tensor:
        """Minimum per group; `largest` for empty groups."""
        return (torch.zeros_like(rows) + largest).scatter_reduce(0, group, values, "amin")

    shared = smallest(torch.where(is_first, width, here), width)  # no row shares all M blocks
    shared = torch.where(shared == width, 0, shared)
    begins = torch.cat([smallest(starts[:-1].long(), starts[-1]), starts[-1:].long()])
    own = shared[group]
    beyond = (own.unsqueeze(1) + torch.arange(width, device=table.device)).clamp(max=width - 1)
    return CascadeTables(
        starts=begins.int(),
        prefix_lens=(shared * block_size).int(),
        prefix_table=table[smallest(rows, num_rows - 1)],
        suffix_lens=(lens - own * block_size).int(),
        suffix_table=table.gather(1, beyond),
    )


class SharedPrefixBuilder(FlashAttentionMetadataBuilder):
    """Metadata builder: cascade attention for decode-only steps of many rows, vLLM's own for others."""

    supports_update_block_table = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.prefix_builder = FlashAttentionMetadataBuilder(*args, **kwargs)
        self.buffers: CascadeTables | None = None

    @cached_property
    def supports_cascade(self) -> bool:
        """True when all layers support cascade attention; evaluated late, since layers exist only after the model."""
        layers = get_layers_from_vllm_config(self.vllm_config, Attention, self.layer_names)
        mode = self.compilation_config.cudagraph_mode
        return (
            self.dcp_world_size == 1
            and (mode is None or mode.mixed_mode() != CUDAGraphMode.FULL)  # one graph would serve both kinds of steps
            and all(map(_supports_cascade, layers.values()))
        )

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> FlashAttentionMetadata:
        """Attention metadata of a step; with cascade attention that of the prefixes is in `groups`."""
        step = common_attn_metadata
        is_plain = step.num_reqs <= FEW_ROWS or step.max_query_len > 1 or common_prefix_len or step.causal is not True
        if is_plain or not self.supports_cascade:
            return super().build(common_prefix_len, step, fast_build)
        rows = slice(step.num_reqs)
        lens, starts = step.seq_lens[rows], step.query_start_loc
        tables = split_prefixes(step.block_table_tensor[rows], lens, starts, self.block_size)
        tables = self._copy_to_buffers(tables)
        prefixes = replace(
            step,
            query_start_loc=tables.starts,
            seq_lens=tables.prefix_lens,
            block_table_tensor=tables.prefix_table,
            max_query_len=MAX_GROUP_ROWS,
            causal=False,
        )
        suffixes = replace(step, seq_lens=tables.suffix_lens, block_table_tensor=tables.suffix_table)
        metadata = super().build(0, suffixes, fast_build)
        metadata.groups = self.prefix_builder.build(0, prefixes, fast_build)  # type: ignore[attr-defined]
        return metadata

    def _copy_to_buffers(self, tables: CascadeTables) -> CascadeTables:
        """Copies the tables to static buffers, as CUDA graphs require."""
        if self.buffers is None:
            scheduler = self.vllm_config.scheduler_config
            most = max(scheduler.max_num_seqs, self.max_cudagraph_size or 0)
            sizes = {f.name: (most + (f.name == "starts"), *getattr(tables, f.name).shape[1:]) for f in fields(tables)}
            self.buffers = CascadeTables(**{name: getattr(tables, name).new_zeros(s) for name, s in sizes.items()})
        views = {}
        for name in (field.name for field in fields(tables)):
            new = getattr(tables, name)
            views[name] = getattr(self.buffers, name)[: len(new)].copy_(new)
        return CascadeTables(**views)


class SharedPrefixAttention(FlashAttentionImpl):
    """FlashAttention in two calls, prefix and suffix, for steps with groups."""

    @property
    def supports_cascade(self) -> bool:
        """True for FlashAttention 3 with plain causal attention: no window, ALiBi, sinks, soft cap or quantized KV."""
        return (
            self.vllm_flash_attn_version == 3
            and self.attn_type == AttentionType.DECODER
            and self.sliding_window == (-1, -1)
            and self.alibi_slopes is None
            and self.sinks is None
            and not self.logits_soft_cap
            and not is_quantized_kv_cache(self.kv_cache_dtype)
        )

    def forward(
        self,
        layer: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: FlashAttentionMetadata,
        output: Tensor,
        *scales: Any,
        **named_scales: Any,
    ) -> Tensor:
        """Writes the attention of [T, heads, size] queries to `output`."""
        groups = getattr(attn_metadata, "groups", None)
        if groups is None:
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *scales, **named_scales)
        num_tokens = attn_metadata.num_actual_tokens
        keys, values = (canonicalize_singleton_dim_strides(part) for part in kv_cache.unbind(1))
        shared, own = (
            flash_attn.flash_attn_varlen_func(
                q=query[:num_tokens],
                k=keys,
                v=values,
                cu_seqlens_q=part.query_start_loc,
                max_seqlen_q=part.max_query_len,
                seqused_k=part.seq_lens,
                max_seqlen_k=part.max_seq_len,
                softmax_scale=self.scale,
                causal=part.causal,
                block_table=part.block_table,
                scheduler_metadata=part.scheduler_metadata,
                num_splits=part.max_num_splits,
                fa_version=self.vllm_flash_attn_version,
                return_softmax_lse=True,
            )
            for part in (groups, attn_metadata)
        )
        merge_attn_states(output[:num_tokens], *shared, *own)
        return output


@register_backend(AttentionBackendEnum.FLASH_ATTN)
class SharedPrefixBackend(FlashAttentionBackend):
    """FlashAttention backend with cascade attention, under the same name, so that vLLM selects it where supported."""

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        """The attention implementation."""
        return SharedPrefixAttention

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        """The metadata builder."""
        return SharedPrefixBuilder


class SharedPrefixWorker:
    """vLLM worker extension, through which each worker process loads this module."""

    vllm_config: VllmConfig

    def shared_prompt_fault(self) -> str:
        """The reason why cascade attention is inactive; empty when it is active."""
        layers = get_layers_from_vllm_config(self.vllm_config, Attention).values()
        others = {layer.get_attn_backend().get_name() for layer in layers if not _supports_cascade(layer)}
        return f"attention is {', '.join(sorted(others))}" if others else ""


def _supports_cascade(layer: Any) -> bool:
    return isinstance(layer.impl, SharedPrefixAttention) and layer.impl.supports_cascade

"""Attention of vLLM that reads a prompt's keys and values once for all its samples; vLLM alone loads this module.

When 1,024 sequences of 128 prompts write a token each, nine tenths of what the engine reads are prompts, each of them
once for every sample. Here neighbours in a step that begin with the same blocks of the KV cache are a group: all its
queries attend to the shared blocks together, each to its own rest alone, and the sums of both softmaxes join the two
outputs exactly (https://arxiv.org/abs/2501.01005, section 2.2).

Letters: B rows (sequences that write one token), M blocks of a row's table; groups are at most as many as rows.
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

LARGEST_GROUP = 64
"""Rows; more samples of a prompt are several groups."""


@dataclass
class Parts:
    """A step's attention in two.

    Attributes:
        starts: [B + 1] first query of each group; groups that there are not have no queries.
        shared_lens: [B] tokens in the blocks that a group shares.
        shared_table: [B, M] these blocks first.
        own_lens: [B] tokens of each row beyond them, its newest among them.
        own_table: [B, M] their blocks first.
    """

    starts: Tensor
    shared_lens: Tensor
    shared_table: Tensor
    own_lens: Tensor
    own_table: Tensor


def split_rows(table: Tensor, lens: Tensor, starts: Tensor, block_size: int) -> Parts:
    """Groups of neighbours that share more blocks with each other than with those beside them.

    Nothing here waits for the device or depends on how many groups there are, so that CUDA graphs can follow.

    Args:
        table: [B, M] numbers of each row's blocks; beyond its tokens anything.
        lens: [B] tokens of each row, the one of this step included; 0 for rows that only fill the step up.
        starts: [B + 1] first query of each row, 1 or 0 of them in each.
        block_size: tokens.
    """
    num_rows, width = table.shape
    rows = torch.arange(num_rows, device=table.device)
    whole = (lens - 1).clamp(min=0) // block_size  # blocks that hold nothing of this step
    links = torch.zeros(num_rows + 1, dtype=torch.int64, device=table.device)  # blocks shared with the row before
    links[1:-1] = (table[1:] == table[:-1]).long().cumprod(dim=1).sum(dim=1)
    links[1:-1] = torch.minimum(links[1:-1], torch.minimum(whole[1:], whole[:-1]))
    before, here, after = links.roll(1)[:-1], links[:-1], links[1:]
    is_first = (here == 0) | (here < before) | (here < after)
    first = torch.where(is_first, rows, 0).cummax(0).values
    is_first |= (rows - first) % LARGEST_GROUP == 0
    group = is_first.cumsum(0) - 1

    def smallest(values: Tensor, largest: int | Tensor) -> Tensor:
        """Of each group; `largest` where there is none."""
        return (torch.zeros_like(rows) + largest).scatter_reduce(0, group, values, "amin")

    shared = smallest(torch.where(is_first, width, here), width)  # a whole width of blocks is more than a row has
    shared = torch.where(shared == width, 0, shared)
    begins = torch.cat([smallest(starts[:-1].long(), starts[-1]), starts[-1:].long()])
    own = shared[group]
    beyond = (own.unsqueeze(1) + torch.arange(width, device=table.device)).clamp(max=width - 1)
    return Parts(
        starts=begins.int(),
        shared_lens=(shared * block_size).int(),
        shared_table=table[smallest(rows, num_rows - 1)],
        own_lens=(lens - own * block_size).int(),
        own_table=table.gather(1, beyond),
    )


class SharedPrefixBuilder(FlashAttentionMetadataBuilder):
    """Splits the steps in which every row writes one token; in others attention is vLLM's."""

    supports_update_block_table = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.of_groups = FlashAttentionMetadataBuilder(*args, **kwargs)
        self.kept: Parts | None = None

    @cached_property
    def is_plain(self) -> bool:
        """Whether the layers do nothing that two parts could not do; they are there only once the model is."""
        layers = get_layers_from_vllm_config(self.vllm_config, Attention, self.layer_names)
        mode = self.compilation_config.cudagraph_mode
        return (
            self.dcp_world_size == 1
            and (mode is None or mode.mixed_mode() != CUDAGraphMode.FULL)  # one graph for steps of both kinds
            and all(map(_is_plain, layers.values()))
        )

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> FlashAttentionMetadata:
        """A step's metadata, with that of its groups as `groups`."""
        step = common_attn_metadata
        if step.max_query_len > 1 or common_prefix_len or step.causal is not True or not self.is_plain:
            return super().build(common_prefix_len, step, fast_build)
        rows = slice(step.num_reqs)
        parts = split_rows(step.block_table_tensor[rows], step.seq_lens[rows], step.query_start_loc, self.block_size)
        parts = self._keep(parts)
        groups = replace(
            step,
            query_start_loc=parts.starts,
            seq_lens=parts.shared_lens,
            block_table_tensor=parts.shared_table,
            max_query_len=LARGEST_GROUP,
            causal=False,
        )
        own = replace(step, seq_lens=parts.own_lens, block_table_tensor=parts.own_table)
        metadata = super().build(0, own, fast_build)
        metadata.groups = self.of_groups.build(0, groups, fast_build)  # type: ignore[attr-defined]
        return metadata

    def _keep(self, parts: Parts) -> Parts:
        """The parts in memory that stays where it is, as a CUDA graph wants it."""
        if self.kept is None:
            scheduler = self.vllm_config.scheduler_config
            most = max(scheduler.max_num_seqs, self.max_cudagraph_size or 0)
            sizes = {f.name: (most + (f.name == "starts"), *getattr(parts, f.name).shape[1:]) for f in fields(parts)}
            self.kept = Parts(**{name: getattr(parts, name).new_zeros(size) for name, size in sizes.items()})
        views = {}
        for name in (field.name for field in fields(parts)):
            new = getattr(parts, name)
            views[name] = getattr(self.kept, name)[: len(new)].copy_(new)
        return Parts(**views)


class SharedPrefixAttention(FlashAttentionImpl):
    """Two calls of FlashAttention for a step that has groups."""

    @property
    def is_plain(self) -> bool:
        """Whether it is FlashAttention 3 and attends to all tokens before, without a change of any score."""
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
    """FlashAttention with these two; it keeps its name, by which vLLM chooses it where a GPU can run it."""

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        """What computes."""
        return SharedPrefixAttention

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        """What prepares a step."""
        return SharedPrefixBuilder


class SharedPrefixWorker:
    """What an engine extends its workers by, so that each of their processes loads this module."""

    vllm_config: VllmConfig

    def shared_prompt_fault(self) -> str:
        """Why every sample reads its prompt all the same; empty if a prompt is read once."""
        layers = get_layers_from_vllm_config(self.vllm_config, Attention).values()
        others = {layer.get_attn_backend().get_name() for layer in layers if not _is_plain(layer)}
        return f"attention is {', '.join(sorted(others))}" if others else ""


def _is_plain(layer: Any) -> bool:
    return isinstance(layer.impl, SharedPrefixAttention) and layer.impl.is_plain

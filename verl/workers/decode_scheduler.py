"""vLLM's scheduler with a shorter way for requests that only write; vLLM alone loads this module, by its name.

With a thousand requests planning a step takes longer than computing it. Most of that goes to room in the KV cache,
which a request needs once a block, and to images, which it has left behind with its prompt.
"""

import math
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request


class _ShortWays(Scheduler):
    """What vLLM would answer, sooner; where the answer is not plain, vLLM gives it."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        manager = self.kv_cache_manager
        allocate, cache = manager.allocate_slots, manager.cache_blocks
        block_size = math.gcd(*(group.kv_cache_spec.block_size for group in self.kv_cache_config.kv_cache_groups))

        def allocate_slots(
            request: Request, num_new_tokens: int, *, num_lookahead_tokens: int = 0, **waiting: Any
        ) -> KVCacheBlocks | None:
            has_room = request.num_computed_tokens % block_size > 0  # in the last of its blocks
            if num_new_tokens == 1 and has_room and not num_lookahead_tokens and not waiting:
                return manager.empty_kv_cache_blocks
            return allocate(request, num_new_tokens, num_lookahead_tokens=num_lookahead_tokens, **waiting)

        def cache_blocks(request: Request, num_computed_tokens: int) -> None:
            if num_computed_tokens % block_size == 0 or num_computed_tokens <= request.num_prompt_tokens:
                cache(request, num_computed_tokens)

        manager.allocate_slots = allocate_slots  # type: ignore[method-assign]
        manager.cache_blocks = cache_blocks  # type: ignore[method-assign]

    def _try_schedule_encoder_inputs(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int, encoder_compute_budget: int, **more: Any
    ) -> tuple[list[int], int, int, list[int]]:
        if num_computed_tokens >= request.num_prompt_tokens:
            return [], num_new_tokens, encoder_compute_budget, []
        return super()._try_schedule_encoder_inputs(
            request, num_computed_tokens, num_new_tokens, encoder_compute_budget, **more
        )


class DecodeScheduler(_ShortWays, AsyncScheduler):
    """For engines that plan a step while the GPU computes the one before it."""


class SyncDecodeScheduler(_ShortWays):
    """For engines that wait for each step, as on a CPU."""

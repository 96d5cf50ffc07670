"""vLLM scheduler with a decode-only fast path; loaded only by vLLM, through its scheduler_cls.

With a thousand requests scheduling a step on the CPU takes longer than its GPU work: per request, vLLM handles
speculative decoding, grammars, images, KV connectors, KV cache allocation and streaming outputs. A request past
prefill whose output is returned only at its end needs none of these, except a new KV block now and then. Requests
that go on together are counted together (decode_batch.py).
"""

import math
from copy import copy
from typing import Any

import numpy as np
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from verl.workers.decode_batch import DecodeBatch, tokens_of


class _DecodeFastPath(Scheduler):
    """Decode-only fast path with the same schedule as vLLM; anything else falls back to vLLM."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        manager = self.kv_cache_manager
        allocate, cache = manager.allocate_slots, manager.cache_blocks
        groups = self.kv_cache_config.kv_cache_groups
        block_size = math.gcd(*(group.kv_cache_spec.block_size for group in groups))
        self.num_cache_groups, self.smallest_block = len(groups), block_size
        self.hash_block = manager.block_pool.hash_block_size
        self.supports_fast_path = not (
            self.num_spec_tokens
            or self.num_lookahead_tokens
            or self.use_pp
            or self.lora_config
            or self.connector
            or self.ec_connector
            or self.log_stats
            or self.defer_block_free
            or self.needs_kv_cache_zeroing
            or self.has_mamba_layers
            or self.dynamic_sd_lookup is not None
            or 0 < self.scheduler_config.long_prefill_token_threshold
        )
        spec = groups[0].kv_cache_spec
        self.has_plain_blocks = (
            len(groups) == 1
            and type(spec) is FullAttentionSpec
            and spec.sliding_window is None
            and manager.enable_caching
        )
        # A step's routing goes with the output of its tokens, which vLLM itself has to give.
        self.buffers_tokens = self.supports_fast_path and not self.enable_return_routed_experts
        self.is_async = isinstance(self, AsyncScheduler)
        self.batch: DecodeBatch | None = None

        if self.has_mamba_layers:  # states have blocks of their own, which are taken at other tokens
            return

        def allocate_slots(
            request: Request, num_new_tokens: int, *, num_lookahead_tokens: int = 0, **options: Any
        ) -> KVCacheBlocks | None:
            if num_new_tokens == 1 and self._is_mid_block(request) and not num_lookahead_tokens and not options:
                return manager.empty_kv_cache_blocks
            return allocate(request, num_new_tokens, num_lookahead_tokens=num_lookahead_tokens, **options)

        def cache_blocks(request: Request, num_computed_tokens: int) -> None:
            if num_computed_tokens % block_size == 0 or num_computed_tokens <= request.num_prompt_tokens:
                cache(request, num_computed_tokens)

        manager.allocate_slots = allocate_slots  # type: ignore[method-assign]
        manager.cache_blocks = cache_blocks  # type: ignore[method-assign]

    def add_request(self, request: Request) -> None:
        """Adds a request; its tokens are buffered until its end if only the final output is wanted."""
        super().add_request(request)
        annotated: Any = request  # with two attributes of this class
        sampling = request.sampling_params
        is_buffered = (
            self.buffers_tokens
            and sampling is not None
            and sampling.output_kind == RequestOutputKind.FINAL_ONLY
            and sampling.logprobs is None
            and sampling.prompt_logprobs is None
            and sampling.repetition_detection is None
            and not request.use_structured_output
            and not request.resumable
        )
        annotated.buffered_tokens = [] if is_buffered else None
        annotated.stop_ids = {sampling.eos_token_id, *(sampling.stop_token_ids or ())} if sampling else set()

    def _try_schedule_encoder_inputs(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int, encoder_compute_budget: int, **more: Any
    ) -> tuple[list[int], int, int, list[int]]:
        if num_computed_tokens >= request.num_prompt_tokens:
            return [], num_new_tokens, encoder_compute_budget, []
        return super()._try_schedule_encoder_inputs(
            request, num_computed_tokens, num_new_tokens, encoder_compute_budget, **more
        )

    def _is_mid_block(self, request: Request) -> bool:
        """True when the next token neither starts nor fills a KV cache block."""
        return 0 < request.num_computed_tokens % self.smallest_block < self.smallest_block - 1

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Schedules the next step, on the fast path when all running requests only decode."""
        if (plan := self._schedule_batch()) is not None:
            return plan
        self._leave_batch()
        decoding = self._decode_batch()
        if decoding is None:
            return super().schedule(*args, **kwargs)
        plan = self._schedule_decode(decoding)
        if self.buffers_tokens and all(map(self._is_buffered, decoding)):
            gap = self.pp_size if self.is_async and self.use_v2_model_runner else 0  # type: ignore[attr-defined]
            self.batch = DecodeBatch(decoding, plan, self.current_step, gap)
        return plan

    def settle(self) -> None:
        """Brings the requests' own counters and tokens up to date, which lag behind while they decode together."""
        if self.batch is not None:
            self.batch.settle_all()

    def _leave_batch(self) -> None:
        self.settle()
        self.batch = None

    def finish_requests(self, *args: Any, **kwargs: Any) -> list[tuple[str, int]]:
        """As vLLM's, for requests that are aborted."""
        self._leave_batch()
        return super().finish_requests(*args, **kwargs)

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """As vLLM's."""
        self._leave_batch()
        return super().reset_prefix_cache(*args, **kwargs)

    def _only_decodes(self) -> bool:
        """True when no request waits and none is held back."""
        has_waiting = self.waiting or self.skipped_waiting or not self.running
        return self.supports_fast_path and not has_waiting and self._pause_state == PauseState.UNPAUSED

    def _schedule_batch(self) -> SchedulerOutput | None:
        """The schedule of a step in which the batch goes on; None when there is none, or something else happens."""
        batch = self.batch
        if batch is None or not self._only_decodes():
            return None
        pending, computed = batch.pending[batch.live], batch.computed[batch.live]
        ends = (pending > 0) & (computed + 2 - pending >= batch.prompt[batch.live] + batch.most[batch.live])
        if ends.any():  # a step in flight samples their last token
            batch.retire(batch.live[ends])
        live, block = batch.live, self.smallest_block
        computed, pending = batch.computed[live], batch.pending[live]
        within = computed % block
        num_blocks = np.count_nonzero(within == 0) * self.num_cache_groups
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        if not len(live) or len(live) > self.max_num_scheduled_tokens or num_blocks > free:
            return None
        if computed.max() + 2 > self.max_model_len:
            return None
        self.current_step += 1
        self.kv_cache_manager.new_step_starts()
        new_blocks: list[tuple[list[int], ...] | None] = [None] * len(live)
        is_short = pending > 0 if self.has_plain_blocks else np.zeros(len(live), dtype=bool)
        for index in np.flatnonzero((within == 0) | (within == block - 1) & ~is_short).tolist():
            new_blocks[index] = self._next_block(batch.settle(int(live[index])), bool(is_short[index]))
        outputs = (batch.written[live] + pending).tolist()
        plan = self._plan(batch.live_ids, batch.scheduled, new_blocks, computed.tolist(), outputs)
        plan.num_scheduled_tokens = {}  # what vLLM counts for each request, the batch counts
        self._update_after_schedule(plan)
        plan.num_scheduled_tokens = batch.scheduled
        batch.advance(plan, self.current_step, self.is_async)
        return plan

    def _next_block(self, request: Request, is_short: bool) -> tuple[list[int], ...] | None:
        """The ids of new blocks for the next token, of which there are enough; None without a new one.

        What is left out where `is_short` holds does nothing for a request that waits for a token, in whose KV cache
        every block stays.
        """
        manager = self.kv_cache_manager
        if not is_short:
            blocks = manager.allocate_slots(request, 1)
            assert blocks is not None, "free blocks were counted"
            return blocks.get_block_ids(allow_none=True)
        (blocks_of,) = manager.coordinator.single_type_managers
        length = request.num_computed_tokens + 1
        new = blocks_of.allocate_new_blocks(request.request_id, length, length)
        manager.coordinator.cache_blocks(request, request.num_tokens)
        return ([block.block_id for block in new],)

    def _decode_batch(self) -> list[Request] | None:
        """Requests that decode one token in the next step; None when the fast path does not apply."""
        if not self._only_decodes():
            return None
        decoding, num_blocks = [], 0
        seen = None if self.use_v2_model_runner else self.prev_step_scheduled_req_ids
        for request in self.running:
            computed, pending = request.num_computed_tokens, request.num_output_placeholders
            if pending > 0 and computed + 2 - pending >= request.num_prompt_tokens + request.max_tokens:
                continue  # a step in flight samples its last token
            if (
                len(request._all_token_ids) + pending - computed != 1
                or computed < request.num_prompt_tokens
                or computed + 2 > self.max_model_len
                or request.spec_token_ids
                or (seen is not None and request.request_id not in seen)
            ):
                return None
            num_blocks += computed % self.smallest_block == 0
            decoding.append(request)
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        exceeds_limits = len(decoding) > self.max_num_scheduled_tokens or num_blocks * self.num_cache_groups > free
        return None if exceeds_limits or not decoding else decoding

    def _schedule_decode(self, decoding: list[Request]) -> SchedulerOutput:
        """The schedule of a step in which each request decodes one token, and nothing else happens."""
        self.current_step += 1
        manager = self.kv_cache_manager
        manager.new_step_starts()
        ids = [request.request_id for request in decoding]
        new_blocks: list[tuple[list[int], ...] | None] = []
        for request in decoding:
            blocks = manager.allocate_slots(request, 1)
            assert blocks is not None, "free blocks were counted"
            new_blocks.append(blocks.get_block_ids(allow_none=True))
        computed = [request.num_computed_tokens for request in decoding]
        outputs = [len(r._output_token_ids) + r.num_output_placeholders for r in decoding]
        plan = self._plan(ids, dict.fromkeys(ids, 1), new_blocks, computed, outputs)
        self._update_after_schedule(plan)
        return plan

    def _plan(
        self,
        ids: list[str],
        scheduled: dict[str, int],
        new_blocks: list[tuple[list[int], ...] | None],
        computed: list[int],
        outputs: list[int],
    ) -> SchedulerOutput:
        """A step in which requests decode one token each, from their computed tokens and those that they gave."""
        self.prefill_capacity_bound = False
        if not self.use_v2_model_runner:
            self.prev_step_scheduled_req_ids.clear()
            self.prev_step_scheduled_req_ids.update(ids)
        return SchedulerOutput(
            scheduled_new_reqs=[],
            scheduled_cached_reqs=CachedRequestData(
                req_ids=ids,
                resumed_req_ids=set(),
                new_token_ids=[],
                all_token_ids={},
                new_block_ids=new_blocks,
                num_computed_tokens=computed,
                num_output_tokens=outputs,
            ),
            num_scheduled_tokens=scheduled,
            total_num_scheduled_tokens=len(ids),
            scheduled_spec_decode_tokens={},
            scheduled_encoder_inputs={},
            num_common_prefix_blocks=self.kv_cache_manager.get_num_common_prefix_blocks(self.running[0].request_id),
            preempted_req_ids=self.reset_preempted_req_ids,
            finished_req_ids=self.finished_req_ids,
            free_encoder_mm_hashes=self.encoder_cache_manager.get_freed_mm_hashes(),
            new_block_ids_to_zero=None,
            num_spec_tokens_to_schedule=self.num_spec_tokens,
        )

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        """As vLLM's; where experts are returned, only requests without a token yet have their blocks listed.

        vLLM lists all blocks of every request in every step, and reads the list with a request's first token alone.
        """
        returns_experts, self.enable_return_routed_experts = self.enable_return_routed_experts, False
        super()._update_after_schedule(scheduler_output)
        self.enable_return_routed_experts = returns_experts
        if returns_experts:
            group = self.routed_experts_mgr.attn_gid
            for number in scheduler_output.num_scheduled_tokens:
                if not self.requests[number]._output_token_ids:
                    self._re_block_ids[number] = self.kv_cache_manager.get_blocks(number).get_block_ids()[group]

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Applies sampled tokens; buffered ones are output together at the end of their request."""
        batch = self.batch
        slots = None if batch is None else batch.scheduled_in(scheduler_output)
        if batch is None or slots is None:
            return self._update_one_by_one(scheduler_output, model_runner_output)
        ids = list(scheduler_output.num_scheduled_tokens)
        tokens = tokens_of(ids, model_runner_output)
        if tokens is None:
            return self._update_one_by_one(scheduler_output, model_runner_output)
        length = batch.written[slots] + 1
        continues = batch.is_live[slots] & ~np.isin(tokens, batch.stops)
        continues &= (length < batch.most[slots]) & (batch.prompt[slots] + length < self.max_model_len)
        others = slots[~continues].tolist()
        in_batch = [slot for slot in others if batch.is_live[slot]]
        for slot in in_batch:  # before the others get a token
            batch.settle(slot)
        self._append(batch, slots[continues], tokens[continues])
        numbers = [batch.ids[slot] for slot in others]
        outputs = self._update_rest(scheduler_output, model_runner_output, dict.fromkeys(numbers, 1))
        self._read_batch(in_batch, has_rest=len(others) > len(in_batch))
        return outputs

    def _append(self, batch: DecodeBatch, slots: np.ndarray, tokens: np.ndarray) -> None:
        """Gives requests that go on a token each, and hashes and caches the blocks that are filled."""
        has_pending = batch.pending[slots] > 0
        batch.append(slots, tokens)
        computed = batch.computed[slots] - batch.pending[slots]
        fills = (batch.prompt[slots] + batch.written[slots]) % self.hash_block == 0
        caches = has_pending & (computed % self.smallest_block == 0)
        for index in np.flatnonzero(fills | caches).tolist():
            request = batch.settle(int(slots[index]))
            if fills[index]:
                request.update_block_hashes()
            if caches[index]:
                self.kv_cache_manager.cache_blocks(request, int(computed[index]))

    def _read_batch(self, slots: list[int], has_rest: bool = False) -> None:
        """Takes requests of the batch as vLLM has left them.

        The batch ends when one is held back, or when one of the rest, whose last token was in flight, goes on.
        """
        batch = self.batch
        assert batch is not None
        ended = [slot for slot in slots if batch.ids[slot] not in self.requests]
        left = [slot for slot in slots if batch.ids[slot] in self.requests]
        batch.read(left)
        if ended:
            batch.drop(np.array(ended))
        if any(batch.requests[slot].status != RequestStatus.RUNNING for slot in left) or (
            has_rest and len(self.running) != len(batch.live)
        ):
            self._leave_batch()

    def _update_one_by_one(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Applies sampled tokens request by request."""
        if self.batch is not None:
            self.batch.settle_all()
            outputs = self._update_settled(scheduler_output, model_runner_output)
            self._read_batch(self.batch.live.tolist())
            return outputs
        return self._update_settled(scheduler_output, model_runner_output)

    def _update_settled(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        if not self.buffers_tokens or model_runner_output.kv_connector_output:
            return super().update_from_output(scheduler_output, model_runner_output)
        tokens, index = model_runner_output.sampled_token_ids, model_runner_output.req_id_to_index
        others: dict[str, int] = {}
        for number, num_tokens in scheduler_output.num_scheduled_tokens.items():
            request: Any = self.requests.get(number)
            if request is None or not tokens or not self._continues(request, tokens[index[number]]):
                others[number] = num_tokens
                continue
            (token,) = tokens[index[number]]
            request._output_token_ids.append(token)
            request._all_token_ids.append(token)
            if len(request._all_token_ids) % self.hash_block == 0:
                request.update_block_hashes()
            request.buffered_tokens.append(token)
            if request.num_output_placeholders:
                request.num_output_placeholders -= 1
                computed = request.num_computed_tokens - request.num_output_placeholders
                if computed % self.smallest_block == 0:
                    self.kv_cache_manager.cache_blocks(request, computed)
        return self._update_rest(scheduler_output, model_runner_output, others)

    def _update_rest(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput, others: dict[str, int]
    ) -> dict[int, EngineCoreOutputs]:
        """As vLLM's for the requests `others`, whose buffered tokens are output with what they get now."""
        live: Any = self.requests
        buffered = {number: live[number].buffered_tokens for number in others if number in live}
        rest = copy(scheduler_output)
        rest.num_scheduled_tokens = others
        outputs_by_client = super().update_from_output(rest, model_runner_output)
        for outputs in outputs_by_client.values():
            for output in outputs.outputs:
                if earlier := buffered.get(output.request_id):
                    output.new_token_ids = [*earlier, *output.new_token_ids]
                    earlier.clear()
        return outputs_by_client

    def _is_buffered(self, request: Any) -> bool:
        """True when the request's tokens are buffered, while vLLM has no images of it to free.

        It holds them up to its first token, and again when it is resumed after a preemption.
        """
        return (
            request.buffered_tokens is not None
            and request.prefill_stats is None
            and not self.encoder_cache_manager.get_cached_input_ids(request)
            and request.status == RequestStatus.RUNNING
            and not request.async_tokens_to_discard
        )

    def _continues(self, request: Any, tokens: list[int]) -> bool:
        """True when the request gets one token now and more later."""
        return (
            self._is_buffered(request)
            and len(tokens) == 1
            and tokens[0] not in request.stop_ids
            and len(request._output_token_ids) + 1 < request.max_tokens
            and len(request._all_token_ids) + 1 < self.max_model_len
        )


class DecodeScheduler(_DecodeFastPath, AsyncScheduler):
    """For asynchronous scheduling: a step is scheduled while the GPU computes the previous one."""


class SyncDecodeScheduler(_DecodeFastPath):
    """For synchronous scheduling, as on a CPU."""

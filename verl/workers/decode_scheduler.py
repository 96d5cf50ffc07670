"""vLLM's scheduler with a shorter way for requests that only write; vLLM alone loads this module, by its name.

With a thousand requests planning a step takes longer than computing it: for each, vLLM asks about drafts, grammars,
images, remote caches, room in the KV cache and what its client wants to hear. A request that has its prompt behind it
and wants to be heard when it is done has one answer to all of these.
"""

import math
from copy import copy
from typing import Any

from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus


class _ShortWays(Scheduler):
    """What vLLM would answer, sooner; where the answer is not plain, vLLM gives it."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        manager = self.kv_cache_manager
        allocate, cache = manager.allocate_slots, manager.cache_blocks
        groups = self.kv_cache_config.kv_cache_groups
        block_size = math.gcd(*(group.kv_cache_spec.block_size for group in groups))
        self.num_cache_groups, self.smallest_block = len(groups), block_size
        self.hash_block = manager.block_pool.hash_block_size
        self.is_plain_engine = not (
            self.num_spec_tokens
            or self.num_lookahead_tokens
            or self.use_pp
            or self.lora_config
            or self.connector
            or self.ec_connector
            or self.log_stats
            or self.defer_block_free
            or self.needs_kv_cache_zeroing
            or self.enable_return_routed_experts
            or self.need_mamba_block_aligned_split
            or self.dynamic_sd_lookup is not None
            or 0 < self.scheduler_config.long_prefill_token_threshold
        )

        def allocate_slots(
            request: Request, num_new_tokens: int, *, num_lookahead_tokens: int = 0, **waiting: Any
        ) -> KVCacheBlocks | None:
            if num_new_tokens == 1 and self._is_inside(request) and not num_lookahead_tokens and not waiting:
                return manager.empty_kv_cache_blocks
            return allocate(request, num_new_tokens, num_lookahead_tokens=num_lookahead_tokens, **waiting)

        def cache_blocks(request: Request, num_computed_tokens: int) -> None:
            if num_computed_tokens % block_size == 0 or num_computed_tokens <= request.num_prompt_tokens:
                cache(request, num_computed_tokens)

        manager.allocate_slots = allocate_slots  # type: ignore[method-assign]
        manager.cache_blocks = cache_blocks  # type: ignore[method-assign]

    def add_request(self, request: Request) -> None:
        """Takes a request in; what it writes is held back if its client wants nothing else, and that at its end."""
        super().add_request(request)
        writer: Any = request  # that carries two notes of this class
        sampling = request.sampling_params
        is_plain = (
            sampling is not None
            and sampling.output_kind == RequestOutputKind.FINAL_ONLY
            and sampling.logprobs is None
            and sampling.prompt_logprobs is None
            and sampling.repetition_detection is None
            and not request.use_structured_output
            and not request.resumable
        )
        writer.held_tokens = [] if is_plain else None
        writer.ends = {sampling.eos_token_id, *(sampling.stop_token_ids or ())} if sampling else set()

    def _try_schedule_encoder_inputs(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int, encoder_compute_budget: int, **more: Any
    ) -> tuple[list[int], int, int, list[int]]:
        if num_computed_tokens >= request.num_prompt_tokens:
            return [], num_new_tokens, encoder_compute_budget, []
        return super()._try_schedule_encoder_inputs(
            request, num_computed_tokens, num_new_tokens, encoder_compute_budget, **more
        )

    def _is_inside(self, request: Request) -> bool:
        """Whether its next token neither begins nor fills a block of the KV cache."""
        return 0 < request.num_computed_tokens % self.smallest_block < self.smallest_block - 1

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """The next step's plan."""
        writing = self._writing()
        return super().schedule(*args, **kwargs) if writing is None else self._plan_tokens(writing)

    def _writing(self) -> list[Request] | None:
        """The requests that get a token in the next step, if all that run do nothing else and have room for it."""
        is_waited_for = self.waiting or self.skipped_waiting or not self.running
        if not self.is_plain_engine or is_waited_for or self._pause_state != PauseState.UNPAUSED:
            return None
        writing, num_blocks = [], 0
        seen = None if self.use_v2_model_runner else self.prev_step_scheduled_req_ids
        for request in self.running:
            computed, pending = request.num_computed_tokens, request.num_output_placeholders
            if pending > 0 and computed + 2 - pending >= request.num_prompt_tokens + request.max_tokens:
                continue  # a step under way writes its last token
            if (
                len(request._all_token_ids) + pending - computed != 1
                or computed < request.num_prompt_tokens
                or computed + 2 > self.max_model_len
                or request.spec_token_ids
                or (seen is not None and request.request_id not in seen)
            ):
                return None
            num_blocks += computed % self.smallest_block == 0
            writing.append(request)
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        is_too_much = len(writing) > self.max_num_scheduled_tokens or num_blocks * self.num_cache_groups > free
        return None if is_too_much or not writing else writing

    def _plan_tokens(self, writing: list[Request]) -> SchedulerOutput:
        """A step in which each of the requests gets a token, and nothing else happens."""
        self.current_step += 1
        manager = self.kv_cache_manager
        manager.new_step_starts()
        ids = [request.request_id for request in writing]
        new_blocks: list[tuple[list[int], ...] | None] = []
        for request in writing:
            blocks = manager.allocate_slots(request, 1)
            assert blocks is not None, "counted before"
            new_blocks.append(blocks.get_block_ids(allow_none=True))
        self.prefill_capacity_bound = False
        num_scheduled_tokens = dict.fromkeys(ids, 1)
        if not self.use_v2_model_runner:
            self.prev_step_scheduled_req_ids.clear()
            self.prev_step_scheduled_req_ids.update(ids)
        plan = SchedulerOutput(
            scheduled_new_reqs=[],
            scheduled_cached_reqs=CachedRequestData(
                req_ids=ids,
                resumed_req_ids=set(),
                new_token_ids=[],
                all_token_ids={},
                new_block_ids=new_blocks,
                num_computed_tokens=[request.num_computed_tokens for request in writing],
                num_output_tokens=[len(r._output_token_ids) + r.num_output_placeholders for r in writing],
            ),
            num_scheduled_tokens=num_scheduled_tokens,
            total_num_scheduled_tokens=len(ids),
            scheduled_spec_decode_tokens={},
            scheduled_encoder_inputs={},
            num_common_prefix_blocks=manager.get_num_common_prefix_blocks(self.running[0].request_id),
            preempted_req_ids=self.reset_preempted_req_ids,
            finished_req_ids=self.finished_req_ids,
            free_encoder_mm_hashes=self.encoder_cache_manager.get_freed_mm_hashes(),
            new_block_ids_to_zero=None,
            num_spec_tokens_to_schedule=self.num_spec_tokens,
        )
        self._update_after_schedule(plan)
        return plan

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Takes a step's tokens; those that are held back are told together, when a request ends."""
        if not self.is_plain_engine or model_runner_output.kv_connector_output:
            return super().update_from_output(scheduler_output, model_runner_output)
        tokens, index = model_runner_output.sampled_token_ids, model_runner_output.req_id_to_index
        others: dict[str, int] = {}
        for number, num_tokens in scheduler_output.num_scheduled_tokens.items():
            request: Any = self.requests.get(number)
            if request is None or not tokens or not self._goes_on(request, tokens[index[number]]):
                others[number] = num_tokens
                continue
            (token,) = tokens[index[number]]
            request._output_token_ids.append(token)
            request._all_token_ids.append(token)
            if len(request._all_token_ids) % self.hash_block == 0:
                request.update_block_hashes()
            request.held_tokens.append(token)
            if request.num_output_placeholders:
                request.num_output_placeholders -= 1
                computed = request.num_computed_tokens - request.num_output_placeholders
                if computed % self.smallest_block == 0:
                    self.kv_cache_manager.cache_blocks(request, computed)
        under_way: Any = self.requests
        held = {number: under_way[number].held_tokens for number in others if number in under_way}
        rest = copy(scheduler_output)
        rest.num_scheduled_tokens = others
        told = super().update_from_output(rest, model_runner_output)
        for outputs in told.values():
            for output in outputs.outputs:
                if earlier := held.get(output.request_id):
                    output.new_token_ids = [*earlier, *output.new_token_ids]
                    earlier.clear()
        return told

    def _goes_on(self, request: Any, tokens: list[int]) -> bool:
        """Whether the request gets one token now and more later. Its first token goes vLLM's way, which then forgets
        its images."""
        return (
            request.held_tokens is not None
            and request.prefill_stats is None
            and len(tokens) == 1
            and tokens[0] not in request.ends
            and request.status == RequestStatus.RUNNING
            and not request.async_tokens_to_discard
            and len(request._output_token_ids) + 1 < request.max_tokens
            and len(request._all_token_ids) + 1 < self.max_model_len
        )


class DecodeScheduler(_ShortWays, AsyncScheduler):
    """For engines that plan a step while the GPU computes the one before it."""


class SyncDecodeScheduler(_ShortWays):
    """For engines that wait for each step, as on a CPU."""

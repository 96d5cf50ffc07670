"""The engine's scheduler plans what vLLM's own would plan, step for step, also when the KV cache runs out."""

import random
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.e2e
TOY_MODEL = Path(__file__).parents[2] / "configs" / "toy_model"
BLOCK, NUM_BLOCKS = 16, 24  # of 24 sequences of up to 100 tokens: some have to give their blocks back
NUM_PROMPTS, NUM_SAMPLES, LONGEST, IMAGE = 6, 4, 128, 16
STOP = 352
"""Drawn at the fiftieth step."""
LATE = 40
"""The step before which the last prompt comes."""


def make_scheduler(scheduler_class, is_async):
    from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    model = ModelConfig(model=str(TOY_MODEL), max_model_len=LONGEST)
    scheduler = SchedulerConfig(
        max_num_seqs=20,
        max_num_batched_tokens=192,
        max_model_len=LONGEST,
        is_encoder_decoder=False,
        enable_chunked_prefill=True,
        async_scheduling=is_async,
    )
    cache = CacheConfig(block_size=BLOCK, enable_prefix_caching=True)
    config = VllmConfig(model_config=model, scheduler_config=scheduler, cache_config=cache)
    config.scheduler_config.async_scheduling = is_async  # a CPU takes it back, and nothing is computed here
    cache.num_gpu_blocks = NUM_BLOCKS
    layers = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    return scheduler_class(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(NUM_BLOCKS, [], [KVCacheGroupSpec(["layer"], layers)]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        hash_block_size=BLOCK,
        log_stats=False,
    )


def make_requests(output_kind, change_hasher=lambda hasher: hasher):
    """Groups of samples of one prompt each, of many lengths, with an image near the prompt's beginning."""
    from vllm import SamplingParams
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    rng = random.Random(0)
    init_none_hash(sha256)
    hasher = change_hasher(get_request_block_hasher(BLOCK, sha256))
    for prompt in range(NUM_PROMPTS):
        ids = [rng.randrange(500) for _ in range(rng.choice([IMAGE + 4, 31, 32, 33, 47, 60]))]
        place = PlaceholderRange(2, IMAGE)
        image = MultiModalFeatureSpec(data=None, modality="image", identifier=f"i{prompt}", mm_position=place)
        for sample in range(NUM_SAMPLES):
            yield Request(
                request_id=f"{prompt}-{sample}",
                prompt_token_ids=ids,
                sampling_params=SamplingParams(
                    max_tokens=rng.randrange(1, 64), ignore_eos=True, stop_token_ids=[STOP], output_kind=output_kind
                ),
                pooling_params=None,
                mm_features=[image],
                block_hasher=hasher,
            )


def run(scheduler_class, is_async, is_for_gpu, output_kind):
    """Every step's plan, every request's tokens and what its client was told; as many steps under way as in an engine.

    What a client is told: tokens, how often, and why it ended.
    """
    from vllm.v1.outputs import ModelRunnerOutput

    scheduler = make_scheduler(scheduler_class, is_async)
    scheduler.use_v2_model_runner = is_for_gpu  # it is told less of what it knows
    requests = list(make_requests(output_kind))
    late = requests[-NUM_SAMPLES:]
    for request in requests[:-NUM_SAMPLES]:
        scheduler.add_request(request)
    plans, under_way, told = [], [], {request.request_id: ([], [], []) for request in requests}
    preempted = 0
    while scheduler.has_requests() or under_way:
        if len(plans) == LATE:
            for request in late:
                scheduler.add_request(request)
        plan = scheduler.schedule()
        preempted += len(plan.preempted_req_ids or ())
        plans.append(asdict(plan) | {"order": list(plan.num_scheduled_tokens)})
        # A prompt that is not yet computed to its end gives no token.
        writing = [i for i in plan.num_scheduled_tokens if not scheduler.requests[i].is_prefill_chunk]
        if plan.num_scheduled_tokens:
            under_way.append((plan, writing))
        if len(under_way) > is_async or (under_way and not plan.num_scheduled_tokens):
            done, writing = under_way.pop(0)
            ids = list(done.num_scheduled_tokens)
            tokens = [[7 * len(plans) % 500 + k % 5] if i in writing else [] for k, i in enumerate(ids)]
            result = ModelRunnerOutput(ids, {i: k for k, i in enumerate(ids)}, tokens)
            for outputs in scheduler.update_from_output(done, result).values():
                for output in outputs.outputs:
                    ids, times, ends = told[output.request_id]
                    ids.extend(output.new_token_ids)
                    times.append(len(plans))
                    ends.extend([output.finish_reason, output.stop_reason] if output.finish_reason is not None else [])
    return plans, [list(request.output_token_ids) for request in requests], told, preempted


@pytest.mark.parametrize("is_final_only", [False, True])
@pytest.mark.parametrize("is_for_gpu", [False, True])
@pytest.mark.parametrize("is_async", [False, True])
def test_plans_and_tokens_are_those_of_vllm(is_async, is_for_gpu, is_final_only, monkeypatch):
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    from verl.workers.decode_scheduler import DecodeScheduler, SyncDecodeScheduler

    output_kind = RequestOutputKind.FINAL_ONLY if is_final_only else RequestOutputKind.DELTA
    own, theirs = (DecodeScheduler, AsyncScheduler) if is_async else (SyncDecodeScheduler, Scheduler)
    num_short = count_calls(monkeypatch, own, "_schedule_decode")
    plans, tokens, told, preempted = run(own, is_async, is_for_gpu, output_kind)
    expected_plans, expected_tokens, expected_told, _ = run(theirs, is_async, is_for_gpu, output_kind)
    assert preempted > 0
    assert len(num_short) > 10
    assert all(tokens)
    assert any(STOP in ends for _, _, ends in told.values())
    for step, (plan, expected) in enumerate(zip(plans, expected_plans, strict=True)):
        assert plan == expected, {key: (step, plan[key], expected[key]) for key in plan if plan[key] != expected[key]}
    assert tokens == expected_tokens
    for number, (ids, times, ends) in told.items():
        expected_ids, expected_times, expected_ends = expected_told[number]
        assert (ids, ends) == (expected_ids, expected_ends)
        assert times[-1] == expected_times[-1]
        assert times == expected_times or is_final_only
    if is_final_only:  # the first token and the last, and what is written while blocks are taken away
        assert sum(len(times) for _, times, _ in told.values()) < 4 * len(told)


def test_a_prompt_that_is_hashed_once_has_the_hashes_of_each_of_its_samples(monkeypatch):
    from vllm.sampling_params import RequestOutputKind

    from verl.workers.rollout import hash_prompts_once

    monkeypatch.setenv("PYTHONHASHSEED", "0")  # or vLLM begins with another hash each time
    hashed = []

    def change(hasher):
        def counted(request):
            hashed.append(request.request_id)
            return hasher(request)

        return hash_prompts_once(counted)

    expected = list(make_requests(RequestOutputKind.FINAL_ONLY))
    requests = list(make_requests(RequestOutputKind.FINAL_ONLY, change))
    assert hashed == [f"{prompt}-0" for prompt in range(NUM_PROMPTS)]
    for length in range(2 * BLOCK):  # of what the samples write
        for number, pair in enumerate(zip(requests, expected, strict=True)):
            assert pair[0].block_hashes == pair[1].block_hashes
            for request in pair:
                request.append_output_token_ids(number + length)
    for sample in range(1, NUM_SAMPLES):
        prompt_blocks = requests[0].num_prompt_tokens // BLOCK
        first, other = requests[0].block_hashes, requests[sample].block_hashes
        assert first[:prompt_blocks] == other[:prompt_blocks] and not set(first[prompt_blocks:]) & set(other)


def count_calls(monkeypatch, owner, name):
    """A list that grows with each call of the method."""
    calls, method = [], getattr(owner, name)

    def counted(self, *args):
        calls.append(args)
        return method(self, *args)

    monkeypatch.setattr(owner, name, counted)
    return calls

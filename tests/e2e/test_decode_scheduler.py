"""The engine's scheduler plans and counts what vLLM's own would, step for step, also when the KV cache runs out."""

import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.e2e
TOY_MODEL = Path(__file__).parents[2] / "configs" / "toy_model"
BLOCK, NUM_BLOCKS = 16, 24  # of 24 sequences of up to 100 tokens: some have to give their blocks back
NUM_PROMPTS, NUM_SAMPLES, LONGEST, IMAGE = 6, 4, 112, 16
STOP = 352
"""Drawn at the fiftieth step."""
LATE = 40
"""The step before which the last prompt comes."""
ABORTED = {20: "4-3", 30: "0-1", 45: "5-0"}
"""Step -> request that is aborted before it."""
RESET = 60
"""The step before which all lose their blocks, as for new weights."""
FLAT = (type(None), bool, int, float, str, bytes)


OWN = "batch"
"""The attribute of this project's scheduler that holds what vLLM's requests hold otherwise."""
LAYERS, CHOSEN = 3, 2
"""Layers of a mixture of experts, and experts of each token."""


def make_scheduler(scheduler_class, is_async, returns_experts=False):
    from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    model = ModelConfig(model=str(TOY_MODEL), max_model_len=LONGEST)
    if returns_experts:
        model.enable_return_routed_experts = True
        for name, value in {"num_experts": 8, "num_experts_per_tok": CHOSEN, "num_hidden_layers": LAYERS}.items():
            setattr(model.hf_text_config, name, value)
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
                arrival_time=float(prompt),
            )


def flatten(value: Any, path: str = "", seen: dict[int, str] | None = None) -> Iterator[tuple[str, Any]]:
    """Paths and values of all that an object of vLLM's engine holds, whatever its attributes are called.

    An object that was met before is its first path, so that links between objects are compared too.
    """
    seen = {} if seen is None else seen
    if isinstance(value, FLAT):
        yield path, value
    elif isinstance(value, Mapping):
        yield path, tuple(sorted(map(repr, value)))
        for key, each in value.items():
            yield from flatten(each, f"{path}[{key!r}]", seen)
    elif isinstance(value, Set):
        yield path, tuple(sorted(repr(getattr(each, "request_id", each)) for each in value))
    elif isinstance(value, Sequence | deque):
        yield path, len(value)
        for index, each in enumerate(value):
            yield from flatten(each, f"{path}[{index}]", seen)
    elif type(value).__module__.startswith(("vllm.v1.", "verl.")):
        if id(value) not in seen:
            seen[id(value)] = path
            names = getattr(value, "__dict__", None) or getattr(value, "__slots__", ())
            for name in (name for name in names if name != OWN):
                yield from flatten(getattr(value, name), f"{path}.{name}", seen)
        yield path, seen[id(value)]


def route(scheduler, plan):
    """Experts of a step's tokens, which tell step, request and position, and the tokens' slots in the KV cache."""
    from vllm.v1.outputs import RoutedExpertsLists

    rows, slots = [], []
    for number, count in plan.num_scheduled_tokens.items():
        ends = scheduler.requests[number].num_computed_tokens
        blocks = scheduler.kv_cache_manager.get_blocks(number).get_block_ids()[0]
        for position in range(ends - count, ends):
            rows.append([[scheduler.current_step % 251, position]] * LAYERS)
            slots.append(blocks[position // BLOCK] * BLOCK + position % BLOCK)
    return RoutedExpertsLists(np.array(rows, dtype=np.uint8), np.array(slots))


def run(scheduler_class, is_async, is_for_gpu, output_kind, returns_experts=False, notes_each=True):
    """Every step's plan, every request's tokens and what its client was told; as many steps under way as in an engine.

    What a client is told: tokens, how often, why it ended, and experts. Last come the changes of the scheduler's and
    the requests' attributes with each plan and each update, or without `notes_each` at the end alone.
    """
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import RequestStatus

    scheduler = make_scheduler(scheduler_class, is_async, returns_experts)
    scheduler.use_v2_model_runner = is_for_gpu  # it is told less of what it knows
    requests = list(make_requests(output_kind))
    late = requests[-NUM_SAMPLES:]
    for request in requests[:-NUM_SAMPLES]:
        scheduler.add_request(request)
    plans, under_way, told = [], [], {request.request_id: ([], [], [], []) for request in requests}
    preempted, changes, last = 0, [], {}

    def note_changes():
        nonlocal last
        getattr(scheduler, "settle", lambda: None)()  # counters of requests lag behind
        before, last = last, dict(flatten({"scheduler": scheduler, "requests": requests}))
        changes.append(dict(last.items() - before.items()))

    while scheduler.has_requests() or under_way:
        if len(plans) == LATE:
            for request in late:
                scheduler.add_request(request)
        if aborted := ABORTED.get(len(plans)):
            assert scheduler.finish_requests(aborted, RequestStatus.FINISHED_ABORTED)
        if len(plans) == RESET:
            assert scheduler.reset_prefix_cache(reset_running_requests=True)
        plan = scheduler.schedule()
        if notes_each:
            note_changes()
        preempted += len(plan.preempted_req_ids or ()) * (len(plans) != RESET)
        plans.append(asdict(plan) | {"order": list(plan.num_scheduled_tokens)})
        # A prompt that is not yet computed to its end gives no token.
        writing = [i for i in plan.num_scheduled_tokens if not scheduler.requests[i].is_prefill_chunk]
        if plan.num_scheduled_tokens:
            under_way.append((plan, writing, route(scheduler, plan) if returns_experts else None))
        if len(under_way) > is_async or (under_way and not plan.num_scheduled_tokens):
            done, writing, routing = under_way.pop(0)
            ids = list(done.num_scheduled_tokens)
            tokens = [[7 * len(plans) % 500 + k % 5] if i in writing else [] for k, i in enumerate(ids)]
            result = ModelRunnerOutput(ids, {i: k for k, i in enumerate(ids)}, tokens, routed_experts=routing)
            for outputs in scheduler.update_from_output(done, result).values():
                for output in outputs.outputs:
                    ids, times, ends, experts = told[output.request_id]
                    ids.extend(output.new_token_ids)
                    experts.extend([] if output.routed_experts is None else output.routed_experts.tolist())
                    times.append(len(plans))
                    ends.extend([output.finish_reason, output.stop_reason] if output.finish_reason is not None else [])
            if notes_each:
                note_changes()
    note_changes()
    return plans, [list(request.output_token_ids) for request in requests], told, preempted, changes


def find_differences(changes, expected):
    """(step, own changes, vLLM's) of the first steps that differ; what vLLM's scheduler never holds is left out."""
    known = set().union(*expected)
    own = [{path: value for path, value in step.items() if path in known} for step in changes]
    assert len(own) == len(expected)
    differing = [(step, *pair) for step, pair in enumerate(zip(own, expected, strict=True)) if pair[0] != pair[1]]
    return [(step, dict(a.items() - b.items()), dict(b.items() - a.items())) for step, a, b in differing[:3]]


@pytest.fixture(autouse=True)
def same_hashes(monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "0")  # or vLLM begins with another hash each time


@pytest.mark.parametrize(("is_final_only", "notes_each"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("is_for_gpu", [False, True])
@pytest.mark.parametrize("is_async", [False, True])
def test_plans_counters_and_tokens_are_those_of_vllm(is_async, is_for_gpu, is_final_only, notes_each, monkeypatch):
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    from verl.workers import decode_batch
    from verl.workers.decode_scheduler import DecodeScheduler, SyncDecodeScheduler

    monkeypatch.setattr(decode_batch, "WINDOW", 5)  # runs full several times
    output_kind = RequestOutputKind.FINAL_ONLY if is_final_only else RequestOutputKind.DELTA
    own, theirs = (DecodeScheduler, AsyncScheduler) if is_async else (SyncDecodeScheduler, Scheduler)
    num_short, together = count_calls(monkeypatch, own, "_plan"), count_calls(monkeypatch, own, "_append")
    plans, tokens, told, preempted, changes = run(own, is_async, is_for_gpu, output_kind, notes_each=notes_each)
    expected_plans, expected_tokens, expected_told, _, expected_changes = run(
        theirs, is_async, is_for_gpu, output_kind, notes_each=notes_each
    )
    assert preempted > 0
    assert len(num_short) > 10
    assert (len(together) > 10) == is_final_only
    assert sum(map(bool, tokens)) >= len(tokens) - len(ABORTED)
    assert any(STOP in ends for _, _, ends, _ in told.values())
    for step, (plan, expected) in enumerate(zip(plans, expected_plans, strict=True)):
        assert plan == expected, {key: (step, plan[key], expected[key]) for key in plan if plan[key] != expected[key]}
    assert tokens == expected_tokens
    assert not find_differences(changes, expected_changes)
    for number in told.keys() - set(ABORTED.values()):
        ids, times, ends, _ = told[number]
        expected_ids, expected_times, expected_ends, _ = expected_told[number]
        assert (ids, ends) == (expected_ids, expected_ends)
        assert times[-1] == expected_times[-1]
        assert times == expected_times or is_final_only
    if is_final_only:  # the first token and the last, and what is written while blocks are taken away
        assert sum(len(times) for _, times, *_ in told.values()) < 4 * len(told)


@pytest.mark.parametrize("is_async", [False, True])
def test_experts_of_every_token_are_those_that_vllm_returns(is_async, monkeypatch):
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    from verl.workers.decode_scheduler import DecodeScheduler, SyncDecodeScheduler

    own, theirs = (DecodeScheduler, AsyncScheduler) if is_async else (SyncDecodeScheduler, Scheduler)
    num_short, listed = count_calls(monkeypatch, own, "_plan"), []
    blocks = count_calls(monkeypatch, KVCacheManager, "get_blocks")
    ran = []
    for scheduler in (own, theirs):
        ran.append(run(scheduler, is_async, False, RequestOutputKind.FINAL_ONLY, True))
        listed.append(len(blocks) - sum(listed))
    assert listed[0] < 0.7 * listed[1]  # the short way, and blocks of requests that wait for their first token alone
    (plans, tokens, told, preempted, _), (expected_plans, expected_tokens, expected_told, *_) = ran
    assert preempted > 0
    assert len(num_short) > 10
    assert (plans, tokens) == (expected_plans, expected_tokens)
    assert told == expected_told
    whole = [experts for ids, _, _, experts in told.values() if len(ids) > 1]
    assert len(whole) > 10
    assert all(len(experts) > IMAGE and len(experts[0]) == LAYERS for experts in whole)


@pytest.mark.parametrize("method", ["_update_request_with_output", "_update_after_schedule"])
def test_a_counter_of_another_vllm_that_the_short_way_leaves_out_is_found(method, monkeypatch):
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.request import Request

    from verl.workers.decode_scheduler import DecodeScheduler

    known = getattr(AsyncScheduler, method)

    def counted(self, first, *more):
        for request in [first] if isinstance(first, Request) else map(self.requests.get, first.num_scheduled_tokens):
            request.number_of_calls = getattr(request, "number_of_calls", 0) + 1
        return known(self, first, *more)

    monkeypatch.setattr(AsyncScheduler, method, counted)
    ran = [run(scheduler, True, True, RequestOutputKind.FINAL_ONLY) for scheduler in (DecodeScheduler, AsyncScheduler)]
    found = find_differences(*(changes for *_, changes in ran))
    assert found
    assert all(path.endswith(".number_of_calls") for _, own, theirs in found for path in own.keys() | theirs.keys())


def test_a_prompt_that_is_hashed_once_has_the_hashes_of_each_of_its_samples():
    from vllm.sampling_params import RequestOutputKind

    from verl.workers.rollout import hash_prompts_once

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

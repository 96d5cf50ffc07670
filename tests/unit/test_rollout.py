"""Requests to the engine, without an engine."""

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from verl.protocol import DataProto
from verl.protocol.row_values import as_objects
from verl.trainer.engines import Engines
from verl.trainer.metrics import PhaseTimer
from verl.workers.rollout import RolloutWorker
from verl.workers.routing import group_experts, switch_routing

NUM_PROMPTS, PROMPT_TOKENS = 6, 40


def finish(request_id: str, parameters: Any) -> SimpleNamespace:
    """A request's samples, last first, each as many tokens as it may have, all of them the request's number."""
    n, length = getattr(parameters, "n", 1), getattr(parameters, "max_tokens", 1)
    samples = [SimpleNamespace(index=i, token_ids=[int(request_id)] * length) for i in reversed(range(n))]
    return SimpleNamespace(request_id=request_id, finished=True, outputs=samples)


class Engine:
    """Notes what comes in which order, and finishes what it has, last first."""

    def __init__(self):
        self.events, self.held = [], []

    def add_request(self, request_id, engine_input, parameters):
        self.events.append(request_id)
        self.held.append((request_id, parameters))

    def step(self):
        self.events.append("step")
        self.held, done = [], self.held
        return [finish(*each) for each in reversed(done)]

    def has_unfinished_requests(self):
        return bool(self.held)


def make_worker(monkeypatch, num_threads: int) -> tuple[RolloutWorker, Engine, list]:
    """A worker, what it drives, and the first token of each prompt that it rendered."""
    engine_kwargs = {"max_num_batched_tokens": 2 * PROMPT_TOKENS}
    sizes = {"max_response_length": 1, "banned_token_ids": [], "image_size": {}, "num_threads": num_threads}
    worker = RolloutWorker(0, 1, model_path="", device="cpu", engine=engine_kwargs, **sizes)
    engine, rendered = Engine(), []
    worker.llm = SimpleNamespace(llm_engine=engine, request_counter=iter(range(9, 99)))  # 9 and 10: not by letters

    def render(ids, images, videos):
        rendered.append(ids[0])
        return {"prompt_token_ids": ids, "images": images}

    monkeypatch.setattr(worker, "_render", render)
    return worker, engine, rendered


@pytest.mark.parametrize("num_threads", [1, 4])
def test_the_engine_computes_once_a_pass_is_full_and_outputs_keep_the_prompts_order(monkeypatch, num_threads):
    worker, engine, _ = make_worker(monkeypatch, num_threads)
    requests = [[SimpleNamespace(n=2, max_tokens=1)]] * NUM_PROMPTS
    responses = worker._run([[[0] * PROMPT_TOKENS] * NUM_PROMPTS, [[]] * NUM_PROMPTS], requests)
    every_sample = [(number, sample) for number in range(9, 9 + NUM_PROMPTS) for sample in range(2)]
    assert [(each.token_ids[0], each.index) for each in responses] == every_sample
    assert engine.events == ["9", "10", "step", "11", "12", "step", "13", "14", "step"]


def make_prompts(*numbers: int, image: bytes = b"png") -> DataProto:
    ids = [[number] * PROMPT_TOKENS for number in numbers]
    return DataProto.from_dict(
        non_tensors={"raw_prompt_ids": as_objects(ids), "images": as_objects([[image]] * len(ids))}
    )


def test_experts_of_a_group_are_the_prompts_and_then_each_responses():
    """The engine notes none for the last token of a response, and those of the prompt with every sample."""

    def noted(*numbers):
        return np.array(numbers, dtype=np.uint8).reshape(-1, 1, 1)

    samples = [(noted(1, 2, 3, 4), [7, 8]), (noted(1, 2, 3, 5, 6), [7, 8, 9]), (noted(1, 2, 3), [9])]
    completions = [SimpleNamespace(routed_experts=experts, token_ids=ids) for experts, ids in samples]
    (group,) = group_experts(completions, 3)
    assert group.flatten().tolist() == [1, 2, 3, 4, 4, 5, 6, 6, 3]
    completions[1].routed_experts = None
    with pytest.raises(RuntimeError, match="worker.actor.routing_replay=false"):
        group_experts(completions, 3)


def test_an_engine_notes_experts_where_they_are_read_and_forgets_prompts_without():
    runner, scheduler, resets = SimpleNamespace(), SimpleNamespace(enable_return_routed_experts=True), []
    llm = SimpleNamespace(
        llm_engine=SimpleNamespace(engine_core=SimpleNamespace(engine_core=SimpleNamespace(scheduler=scheduler))),
        collective_rpc=lambda call, args: call(SimpleNamespace(model_runner=runner), *args),
        reset_prefix_cache=lambda: resets.append(True),
    )
    for is_on, num_resets in ((True, 0), (False, 0), (False, 0), (True, 1), (True, 1)):
        switch_routing(llm, is_on)
        assert (scheduler.enable_return_routed_experts, runner.routed_experts_initialized) == (is_on, is_on)
        assert len(resets) == num_resets


@pytest.mark.parametrize("num_threads", [1, 8])
def test_prompts_rendered_ahead_are_rendered_once_and_only_they_are_taken(monkeypatch, num_threads):
    worker, engine, rendered = make_worker(monkeypatch, num_threads)

    def run(prompts: DataProto) -> list[int]:
        rendered.clear()
        worker._run(worker._columns(prompts), [[None]] * len(prompts))
        return sorted(rendered)

    worker.render_ahead(make_prompts(1, 2, 3))
    assert sorted(rendered) == [1, 2, 3]
    assert run(make_prompts(2, 4)) == [4]
    assert run(make_prompts(2)) == [2]  # what the engine was given is not kept
    assert run(make_prompts(3, image=b"other")) == [3]
    worker.render_ahead(make_prompts(5))
    assert list(worker.rendered) == [((5,) * PROMPT_TOKENS, (b"png",), ())]  # 1 and 3 were not asked for
    assert run(make_prompts(5)) == [] and engine.events[-2:] == ["13", "step"]


def test_each_response_has_a_limit_of_its_own(monkeypatch):
    worker, engine, _ = make_worker(monkeypatch, 1)
    worker.max_response_length = 5
    worker.llm.collective_rpc = lambda *_, **__: None
    use_settings(monkeypatch)
    prompts = make_prompts(1, 2)
    prompts.non_tensor_batch["max_tokens"] = np.array([[3, 1], [2, 5]])
    prompts.meta_info = {"sampling": {"n": 2, "temperature": 0.5}, "seed": 1}
    responses = worker.generate(prompts).batch
    assert responses["response_mask"].sum(-1).tolist() == [[3, 1], [2, 5]]
    assert responses["responses"][:, :, 0].tolist() == [[9, 10], [11, 12]]  # neighbours share their prompt
    assert responses["responses"][0, 0].tolist() == [9, 9, 9, 0, 0]


def use_settings(monkeypatch) -> None:
    """Stands in for vLLM's SamplingParams."""
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace))
    kinds = SimpleNamespace(RequestOutputKind=SimpleNamespace(FINAL_ONLY=1))
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", kinds)


def seeds_of(monkeypatch, world_size: int, seeds: list[int]) -> list[list[int]]:
    """For each seed of a step, those with which the engines set their generators."""
    use_settings(monkeypatch)
    found: list[list[int]] = []
    for seed in seeds:
        found.append([])
        for rank in range(world_size):
            worker, engine, _ = make_worker(monkeypatch, 1)
            worker.rank, worker.world_size = rank, world_size
            worker.llm.collective_rpc = lambda method, args: found[-1].append(args[0])
            monkeypatch.setattr(worker, "_pad", lambda *arguments: None)
            prompts = make_prompts(1)
            prompts.meta_info = {"sampling": {"n": 1}, "seed": seed}
            worker.generate(prompts)
    return found


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_every_engine_of_every_step_has_a_seed_of_its_own_and_a_step_has_it_again(monkeypatch, world_size):
    steps = [1_000_003 + step for step in range(20)]
    seeds = seeds_of(monkeypatch, world_size, steps)
    every = [seed for step in seeds for seed in step]
    assert len(set(every)) == len(every) == 20 * world_size
    assert seeds_of(monkeypatch, world_size, steps[7:9]) == seeds[7:9]
    assert all(0 <= seed < 2**32 for seed in every)


def test_large_seeds_stay_in_the_generators_range(monkeypatch):
    (seeds,) = seeds_of(monkeypatch, 8, [2**40 + 5])
    assert len(set(seeds)) == 8 and all(0 <= seed < 2**32 for seed in seeds)


def test_the_engines_seed_follows_the_runs_seed_and_the_call():
    def seed_of(run_seed: int, call: int) -> int:
        requests: list[DataProto] = []
        settings = SimpleNamespace(
            rollout=SimpleNamespace(seed=run_seed),
            actor=SimpleNamespace(tis_imp_ratio_cap=None, routing_replay=False),
        )

        class Group(list):
            def generate(self, request):
                requests.append(request)
                return make_prompts(1)

        engines: Any = SimpleNamespace(settings=settings, group=Group([0]))
        engines._request = lambda prompts: Engines._request(engines, prompts)
        Engines.generate(engines, make_prompts(1), {"n": 1}, call, for_training=False)
        return requests[0].meta_info["seed"]

    calls = [[seed_of(run_seed, call) for call in range(1, 6)] for run_seed in (0, 1, 2)]
    assert len({seed for run in calls for seed in run}) == 15
    assert calls[1] == [seed_of(1, call) for call in range(1, 6)]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_single_rank_prepares_images_while_the_engine_samples_for_training(num_ranks):
    calls: list[Any] = []

    class Ranks(list):
        def start(self, method, images):
            calls.append((method, len(images), list(images.non_tensor_batch)))
            return lambda: calls.append("ready")

    class Group(list):
        def generate(self, request):
            calls.append("sampled")
            return make_prompts(1)

    settings: Any = SimpleNamespace(
        rollout=SimpleNamespace(seed=0), actor=SimpleNamespace(tis_imp_ratio_cap=None, routing_replay=False)
    )
    ranks: Any = Ranks(range(num_ranks))
    group: Any = Group([0])
    engines = Engines(settings, group, ranks, PhaseTimer())
    engines.generate(make_prompts(1), {"n": 1}, 0)
    assert calls == ([("prepare_images", 1, ["images"]), "sampled", "ready"] if num_ranks == 1 else ["sampled"])
    calls.clear()
    engines.generate(make_prompts(1), {"n": 1}, 0, for_training=False)
    assert calls == ["sampled"]

"""How the engine is fed, without an engine."""

from types import SimpleNamespace

import pytest

from verl.workers.rollout import RolloutWorker

NUM_PROMPTS, PROMPT_TOKENS = 6, 40


class Engine:
    """Notes what comes in which order, and finishes what it has, last first."""

    def __init__(self):
        self.events, self.held = [], []

    def add_request(self, request_id, engine_input, parameters):
        self.events.append(request_id)
        self.held.append(request_id)

    def step(self):
        self.events.append("step")
        self.held, done = [], self.held
        return [SimpleNamespace(request_id=i, finished=True) for i in reversed(done)]

    def has_unfinished_requests(self):
        return bool(self.held)


@pytest.mark.parametrize("num_threads", [1, 4])
def test_the_engine_computes_once_a_pass_is_full_and_outputs_keep_the_prompts_order(monkeypatch, num_threads):
    engine_kwargs = {"max_num_batched_tokens": 2 * PROMPT_TOKENS}
    sizes = {"max_response_length": 1, "banned_token_ids": [], "image_size": {}, "num_threads": num_threads}
    worker = RolloutWorker(0, 1, model_path="", device="cpu", engine=engine_kwargs, **sizes)
    engine = Engine()
    worker.llm = SimpleNamespace(llm_engine=engine, request_counter=iter(range(9, 99)))  # 9 and 10: not by letters
    monkeypatch.setattr(worker, "_render", lambda ids, images: {"prompt_token_ids": ids})
    outputs = worker._run([[[0] * PROMPT_TOKENS] * NUM_PROMPTS, [[]] * NUM_PROMPTS], None)
    assert [int(output.request_id) for output in outputs] == list(range(9, 9 + NUM_PROMPTS))
    assert engine.events == ["9", "10", "step", "11", "12", "step", "13", "14", "step"]

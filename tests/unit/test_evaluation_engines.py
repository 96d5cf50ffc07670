import os
import signal
from types import SimpleNamespace

import pytest

from evaluation.engines import local as backends
from evaluation.engines.answering import journal_answers
from evaluation.engines.api import OpenAiBackend
from evaluation.engines.local import Answer, ModelOptions
from evaluation.engines.stopping import Stopped, StopSignal
from evaluation.journal import AnswerJournal, Record
from spatialthinker.clients.model_api import ApiStop


@pytest.mark.parametrize(("chosen", "expected"), [({}, "spawn"), ({"VLLM_WORKER_MULTIPROC_METHOD": "fork"}, "fork")])
def test_a_gpus_engine_is_spawned_unless_the_user_says_otherwise(monkeypatch, chosen, expected):
    monkeypatch.setattr(os, "environ", dict(chosen))
    backends._set_engine_environment(has_gpu=True)
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == expected


@pytest.mark.parametrize(("num_gpus", "is_plain"), [(1, False), (2, True), (4, True)])
def test_gpus_of_an_engine_talk_over_nccl_alone_without_multicast(monkeypatch, num_gpus, is_plain):
    """vLLM gets the arguments, and NCCL the variables, before it starts anything."""
    import vllm

    class Started(Exception):
        pass

    def start(*_, **arguments):
        raise Started(arguments, dict(os.environ))

    monkeypatch.setattr(os, "environ", {"NVSHMEM_DISABLE_NVLS": "0"})
    monkeypatch.setattr(vllm, "LLM", start)
    monkeypatch.setattr(backends, "load_processor", lambda options: None)
    monkeypatch.setattr(backends, "_cpu_type", lambda path: "float32")
    with pytest.raises(Started) as caught:
        backends.VllmBackend(ModelOptions("model", "reasoning", tensor_parallel_size=num_gpus))
    arguments, environment = caught.value.args
    assert arguments["tensor_parallel_size"] == num_gpus
    assert arguments.get("disable_custom_all_reduce", False) == is_plain
    passes = arguments.get("compilation_config", {}).get("pass_config", {})
    assert passes == ({"fuse_allreduce_rms": False, "fuse_gemm_comms": False} if is_plain else {})
    chosen = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "VLLM_ALLREDUCE_USE_SYMM_MEM": "0"}
    assert chosen.items() <= environment.items()
    assert environment["NVSHMEM_DISABLE_NVLS"] == "0"  # the user's


@pytest.mark.parametrize("fault", [ValueError("the template is odd"), RuntimeError("the engine died"), KeyError("x")])
def test_a_fault_after_a_signal_is_named_and_the_answers_are_kept(tmp_path, fault):
    stop = StopSignal()

    def answer(samples):
        yield next(samples), Answer(text="A")
        stop.signum = signal.SIGTERM
        raise fault

    samples = [SimpleNamespace(id=name) for name in "ab"]
    with AnswerJournal(tmp_path / "run.jsonl", {"dataset": "x"}, False) as journal:
        with pytest.raises(Stopped, match=type(fault).__name__) as caught:
            journal_answers(
                samples,
                SimpleNamespace(answer=answer),
                journal,
                lambda sample, answer: Record("", "", answer.text, "", 0, None, id=sample.id),
                stop,
            )
    assert caught.value.__cause__ is fault and list(journal.records) == ["a"]


def test_answers_under_way_are_kept_when_the_account_ends_the_run(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "")
    options = ModelOptions("gpt-4o", "reasoning", base_url="http://[::1]:9", concurrency=3)
    backend = OpenAiBackend(options)

    async def ask(sample):
        if sample == "a":
            raise ApiStop("no credit left")
        await backend.api.throttle.stopped.wait()
        return sample, Answer(text="B", error=None if sample == "b" else "the run was stopped before an answer")

    monkeypatch.setattr(backend, "_ask", ask)
    answered = []
    with pytest.raises(ApiStop, match="no credit left"):
        for sample, _ in backend.answer("abcd"):
            answered.append(sample)
    assert answered == ["b"]

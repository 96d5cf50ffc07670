"""Arguments that the engines are started with."""

from pathlib import Path

import pytest

from verl.config.loading import load_config
from verl.data.processor import load_run_processor
from verl.model import internals
from verl.trainer.engine_arguments import cudagraph_sizes, rollout_arguments

CONFIGS = Path(__file__).parents[2] / "configs"


def engine_of(device: str, *overrides: str) -> dict:
    files = ["data.train_files=owner/name", "data.val_files=owner/name"]
    model = f"worker.actor.model.model_path={CONFIGS / 'toy_model'}"
    config = load_config([f"config={CONFIGS / 'toy_cpu.yaml'}", model, *files, *overrides])
    return rollout_arguments(config, device, load_run_processor(config))["engine"]


@pytest.mark.parametrize(("device", "num_gpus"), [("cuda", 1), ("cuda", 2), ("cpu", 2)])
def test_engines_of_several_gpus_have_processes_of_their_own_and_talk_over_nccl_alone(device, num_gpus):
    engine = engine_of(device, "trainer.n_gpus_per_node=2", f"worker.rollout.tensor_parallel_size={num_gpus}")
    assert engine["tensor_parallel_size"] == num_gpus
    assert engine.get("distributed_executor_backend") == ("mp" if num_gpus > 1 else None)
    is_shared = (device, num_gpus) == ("cuda", 2)
    assert engine.get("disable_custom_all_reduce", False) == is_shared
    assert ("compilation_config" in engine) == (device == "cuda")
    assert engine.get("compilation_config", {}).get("cudagraph_mode") == (
        "FULL_DECODE_ONLY" if device == "cuda" else None
    )
    fusions = engine.get("compilation_config", {}).get("pass_config", {})
    assert fusions == ({"fuse_allreduce_rms": False, "fuse_gemm_comms": False} if is_shared else {})


@pytest.mark.parametrize(("device", "is_shared"), [("cuda", True), ("cuda", False), ("cpu", True)])
def test_engines_of_gpus_read_prompts_once_unless_they_shall_not(device, is_shared):
    engine = engine_of(device, *[] if is_shared else ["worker.rollout.shared_prompt=false"])
    assert ("worker_extension_cls" in engine) == (is_shared and device == "cuda")


@pytest.mark.parametrize(("device", "name"), [("cuda", "DecodeScheduler"), ("cpu", "SyncDecodeScheduler")])
def test_steps_are_scheduled_by_vllm_where_that_is_chosen(device, name):
    assert engine_of(device)["scheduler_cls"] == f"verl.workers.decode_scheduler.{name}"
    assert "scheduler_cls" not in engine_of(device, "worker.rollout.fast_scheduler=false")


def test_another_vllm_runs_without_what_changes_it(monkeypatch, capsys):
    monkeypatch.setattr(internals, "version", lambda package: "0.0")
    internals.is_usable.cache_clear()
    engine = engine_of("cuda")
    internals.is_usable.cache_clear()
    assert not {"scheduler_cls", "worker_extension_cls"} & engine.keys()
    said = capsys.readouterr().out
    assert "worker.rollout.fast_scheduler" in said and "worker.rollout.shared_prompt" in said


@pytest.mark.parametrize("most", [1, 3, 8, 16, 17, 100, 256, 300, 1024])
def test_a_step_of_any_size_has_a_graph_that_is_little_larger(most):
    sizes = cudagraph_sizes(most)
    assert sizes == sorted(set(sizes)) and sizes[0] == 1 and sizes[-1] == most and len(sizes) <= 36
    for size, smaller in zip(sizes[1:], sizes, strict=False):
        assert size <= 128 or size <= 9 / 8 * (smaller + 1) + 1

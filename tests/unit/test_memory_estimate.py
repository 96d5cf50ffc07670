"""The memory estimate by hand-worked numbers and by what moves it."""

import dataclasses

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from verl.config.loading import load_config
from verl.config.records import Config
from verl.trainer.dry_run import advise_budget, describe_memory, host_memory_warning
from verl.trainer.memory_estimate import (
    GB,
    GPU_ALLOWANCE_GB,
    DataShape,
    ModelShape,
    Phase,
    estimate_memory,
    measure_data,
    measure_model,
)
from verl.trainer.model_checks import measure_checked_model

# A thousand million parameters, 100 million of them in a tower, layers of 20 million, 200 million outside of layers.
MODEL = ModelShape(1000 * 10**6, 100 * 10**6, 20 * 10**6, 200 * 10**6, 30, 1000, 4000, 512, 10, 500, 1176, 4)
DATA = DataShape(100_000.0, 1000.0, 2000)
EXISTING = ["data.train_files=owner/name", "data.val_files=owner/name"]
GRADIENTS_OFF = ["worker.actor.fsdp.torch_dtype=fp32", "worker.actor.optim.strategy=adamw"]


def device_gb(phase: str, *arguments: str, model: ModelShape = MODEL) -> float:
    phases = {item.name: item for item in estimate_memory(load_config(list(arguments)), model, DATA)}
    return phases[phase].device_gb


def host_gb(phase: str, *arguments: str, data: DataShape = DATA) -> float:
    phases = {item.name: item for item in estimate_memory(load_config(list(arguments)), MODEL, data)}
    return phases[phase].host_gb


def test_what_a_rank_keeps_is_its_share_of_policy_reference_and_states():
    # Four ranks, bf16: policy 2 GB, reference 2 GB, three states 6 GB; the whole model of 2 GB while loading.
    assert device_gb("load") == pytest.approx((10 / 4 + 2) * 1e9 / GB)
    assert device_gb("load", "algorithm.disable_kl=true") == pytest.approx((8 / 4 + 2) * 1e9 / GB)
    # float32: policy and reference 4 GB each, two states 8 GB, the whole model 4 GB.
    assert device_gb("load", *GRADIENTS_OFF) == pytest.approx((16 / 4 + 4) * 1e9 / GB)
    frozen = device_gb("load", "worker.actor.model.freeze_vision_tower=true")
    assert device_gb("load") - frozen == pytest.approx(3 * 0.1e9 * 2 / 4 / GB)


def test_what_is_streamed_never_lies_on_the_device_as_a_whole():
    """Policy 2 GB and states 6 GB over four ranks, and gradients of 2 GB / 4 in the update."""
    streamed = "worker.actor.fsdp.enable_cpu_offload=true"
    assert device_gb("load") - device_gb("load", streamed) == pytest.approx((8e9 / 4 + 2e9) / GB)
    assert device_gb("log-probs") - device_gb("log-probs", streamed) == pytest.approx(8e9 / 4 / GB)
    assert device_gb("update") - device_gb("update", streamed) == pytest.approx(10e9 / 4 / GB)
    assert host_gb("update", streamed) - host_gb("update") == pytest.approx(8e9 / GB)


def test_adapters_have_small_states_and_no_reference_and_offloading_moves_to_the_host():
    adapters = 64 * 30 * (9 * 1000 + 3 * 4000 + 512)
    assert device_gb("load", "worker.actor.model.lora.rank=64") == pytest.approx(
        (2e9 + 3 * adapters * 2) / 4 / GB + 2e9 / GB
    )
    away = ["worker.actor.offload.offload_params=true", "worker.actor.offload.offload_optimizer=true"]
    moved = (2e9 + 6e9) / 4 / GB
    assert device_gb("rollout") - device_gb("rollout", *away) == pytest.approx(moved)
    assert host_gb("rollout", *away) - host_gb("rollout") == pytest.approx(4 * moved)


def test_what_a_checkpoint_holds_is_copied_to_the_host():
    without = ["trainer.save_freq=-1"]

    def copied(*choices: str) -> float:
        return host_gb("update", *choices) - host_gb("update", *choices, *without)

    assert copied() == pytest.approx((2e9 + 6e9) / GB)  # policy and three states, of all four ranks of the machine
    assert copied("trainer.save_model_only=true") == pytest.approx(2e9 / GB)
    adapters = 64 * 30 * (9 * 1000 + 3 * 4000 + 512)
    assert copied("worker.actor.model.lora.rank=64") == pytest.approx(4 * adapters * 2 / GB)
    critic = ["algorithm.adv_estimator=gae"]
    assert copied(*critic) == pytest.approx(2 * (2e9 + 6e9) / GB)
    assert copied(*critic, "trainer.save_model_only=true") == pytest.approx(2 * 2e9 / GB)
    assert host_gb("load") == host_gb("load", *without)


def test_an_update_keeps_one_hidden_state_per_token_and_layer():
    one, two = (device_gb("update", f"worker.actor.micro_batch_size_per_device_for_update={size}") for size in (1, 2))
    tokens = 6144 + 2048
    passing, kept = tokens * (8 * 1000 + 4 * 4000) * 2, tokens * 30 * 1000 * 2
    assert two - one == pytest.approx((passing + kept) / GB)
    everything = device_gb(
        "update",
        "worker.actor.micro_batch_size_per_device_for_update=1",
        "worker.actor.model.enable_gradient_checkpointing=false",
    )
    assert everything > one


def test_the_host_holds_images_once_per_prompt_whatever_n_is():
    def images(n: int) -> float:
        heavy = dataclasses.replace(DATA, mean_image_bytes=2e6)
        argument = f"worker.rollout.n={n}"
        return host_gb("rollout", argument, data=heavy) - host_gb("rollout", argument)

    assert images(2) == pytest.approx(images(16)) == pytest.approx(3 * 512 * 1.9e6 / GB)
    patches = host_gb("update") - host_gb("rollout")
    assert patches == pytest.approx(512 * 1000 * 1176 * 4 / GB)


def test_a_model_is_measured_without_its_weights():
    shape = measure_checked_model(load_config(["config=configs/toy_cpu.yaml", *EXISTING]))
    stored = load_file("configs/toy_model/model.safetensors")
    assert shape.parameters == sum(value.numel() for value in stored.values())
    assert shape.vision_parameters == sum(v.numel() for name, v in stored.items() if name.startswith("visual"))
    assert (shape.layers, shape.hidden, shape.kv_width, shape.patch_numbers) == (4, 192, 2 * 2 * 32, 1176)


@pytest.fixture(scope="module")
def papers_model() -> ModelShape:
    text = {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2}
    text |= {"intermediate_size": 11008, "vocab_size": 151_936, "tie_word_embeddings": True}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048}
    settings = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    with torch.device("meta"):
        return measure_model(Qwen2_5_VLForConditionalGeneration(settings))


def test_the_papers_run_fits_its_gpus(papers_model):
    assert papers_model.parameters == pytest.approx(3.75e9, rel=0.01)
    phases = estimate_memory(Config(), papers_model, DATA)
    assert all(phase.device_gb + GPU_ALLOWANCE_GB < 80 for phase in phases)


def test_an_update_measured_on_one_gpu_is_met(papers_model):
    """28.5 GiB: 8 groups of 1,586 prompt tokens (2,436 patches) and 8 x 400, without optimizer and reference."""
    arguments = ["trainer.n_gpus_per_node=1", "data.max_prompt_length=1586", "data.max_response_length=400"]
    arguments += ["algorithm.disable_kl=true", "worker.actor.micro_batch_size_per_device_for_update=20"]
    data = DataShape(100_000.0, 2436.0, 2436)
    phases = {phase.name: phase for phase in estimate_memory(load_config(arguments), papers_model, data)}
    states = 3 * papers_model.parameters * 2 / GB
    sharding = (3 * papers_model.largest_block + 2 * papers_model.root) * 2 / GB
    sharding += (papers_model.largest_block + papers_model.root) * 4 / GB
    alone = phases["update"].device_gb - states - sharding
    assert alone == pytest.approx(28.5, rel=0.15)


@pytest.mark.parametrize(
    ("num_gpus", "passes_gib", "update_gib"), [(1, 47.0, 72.6), (4, 23.3, 42.2)], ids=["one", "four"]
)
def test_a_benchmark_measured_on_gpus_is_met(papers_model, num_gpus, passes_gib, update_gib):
    """Highest use of a GPU as the driver saw it in `verl.bench step` with bench_3b_h100.yaml."""
    arguments = ["config=configs/bench_3b_h100.yaml", *EXISTING, "worker.actor.model.model_path=owner/name"]
    arguments += [f"trainer.n_gpus_per_node={num_gpus}", "worker.actor.global_batch_size=128"]
    config, data = load_config(arguments), DataShape(100_000.0, 2436.0, 2436)
    phases = {phase.name: phase.device_gb for phase in estimate_memory(config, papers_model, data)}
    assert phases["log-probs"] + GPU_ALLOWANCE_GB == pytest.approx(passes_gib, rel=0.08)
    assert phases["update"] + GPU_ALLOWANCE_GB == pytest.approx(update_gib, rel=0.03)


def test_what_an_update_leaves_of_a_gpu_is_offered_to_activations():
    phases = [Phase("log-probs", 70.0, 0.0), Phase("update", 50.0, 0.0)]

    def advice(*arguments: str, gpu_gb: float = 80.0) -> list[str]:
        config = load_config([*EXISTING, *(f"worker.actor.model.{argument}" for argument in arguments)])
        return advise_budget(config, phases, gpu_gb)

    said = "The update leaves 22.0 GiB: worker.actor.model.activation_budget_gb={} would"  # 80 - 50 - 8
    assert advice()[0].startswith(said.format(18))  # 0.95 x 80 - 58
    assert advice("activation_budget_gb=7")[0].startswith(said.format(25))
    assert not advice("enable_gradient_checkpointing=false")
    assert not advice(gpu_gb=61.0) and not advice(gpu_gb=40.0)


@pytest.mark.parametrize(
    ("device", "allowance"), [("cpu", 0.0), ("cuda", GPU_ALLOWANCE_GB), ("auto", GPU_ALLOWANCE_GB)]
)
def test_a_dry_run_counts_what_a_gpu_needs_beside_tensors_and_says_what_it_leaves(monkeypatch, device, allowance):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70 * GB, 80 * GB))
    config = load_config([*EXISTING, f"trainer.device={device}"])
    lines = describe_memory(config, [Phase("update", 50.0, 3.0)])
    assert lines[1].split()[:2] == ["update", f"{50 + allowance:.1f}"]
    assert any("activation_budget_gb=18" in line for line in lines) == (device != "cpu")
    assert any("80.0 GiB, 70.0 GiB of them free" in line for line in lines) == (device != "cpu")


def test_data_are_measured_over_all_prompts():
    grids = [[(1, 8, 8)], [], [(1, 4, 4), (1, 8, 8)]]
    assert measure_data(grids, [100, 300]) == DataShape(200.0, 48.0, 80)


def test_too_little_host_memory_is_said_with_what_to_lower():
    phases = estimate_memory(Config(), MODEL, dataclasses.replace(DATA, mean_image_bytes=1e9))
    warning = host_memory_warning(phases, False, 4)
    assert warning is not None and "data.rollout_batch_size" in warning


def test_ranks_without_gpus_share_the_machines_memory_and_need_nothing_else():
    half = psutil.virtual_memory().total / GB / 2
    assert host_memory_warning([Phase("update", half - 0.1, 0.0)], True, 2) is None
    assert host_memory_warning([Phase("update", half + 0.1, 0.0)], True, 2) is not None
    assert host_memory_warning([Phase("update", half + 0.1, 0.0)], False, 2) is None

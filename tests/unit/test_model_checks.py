"""Limits of a model are named from its config.json, before a weight is read."""

import pytest
from transformers import CONFIG_MAPPING, PretrainedConfig, Qwen3_5Config

from tests.support.tiny_model_folder import save_tiny_model
from verl.config.loading import load_config
from verl.config.records import ConfigError
from verl.data.processor import load_processor
from verl.model.families import read_config
from verl.trainer import model_checks
from verl.trainer.engine_arguments import rollout_arguments
from verl.trainer.model_checks import measure_checked_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        family: save_tiny_model(tmp_path_factory.mktemp(family), family=family)
        for family in ("qwen2_5_vl", "qwen3", "qwen3_vl_moe", "qwen3_5", "qwen3_5_text")
    }


def faults(folder, *overrides) -> list[str]:
    lengths = ["data.max_prompt_length=1024", "data.max_response_length=512", "trainer.n_gpus_per_node=4"]
    config = load_config([f"worker.actor.model.model_path={folder}", *lengths, *overrides])
    try:
        measure_checked_model(config)
    except ConfigError as error:
        return error.faults
    return []


ADAPTERS = "worker.actor.model.lora.rank=4"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([ADAPTERS, "worker.actor.model.lora.target_modules=nothing"], "lora.target_modules = 'nothing'"),
        ([ADAPTERS, "worker.actor.model.lora.target_modules=lm_head"], "lm_head cannot carry an adapter"),
        ([ADAPTERS, "worker.actor.model.lora.exclude_modules='*visual'"], "is no regular expression"),
        (["worker.rollout.tensor_parallel_size=4"], "must divide the model's 2 attention heads"),
        (["data.max_response_length=4000"], "max_response_length = 5024: the model has positions for 4096 tokens"),
        (["worker.rollout.max_model_len=5000"], "worker.rollout.max_model_len = 5000: the model has positions"),
        (["worker.actor.model.override_config={rope_thet: 1}"], "override_config.rope_thet = 1: Qwen2_5_VLConfig has"),
        (["worker.actor.model.override_config={text_config: {hidden: 1}}"], "did you mean hidden_"),
    ],
)
def test_what_the_model_cannot_do_is_said(folders, overrides, words):
    (fault,) = faults(folders["qwen2_5_vl"], *overrides)
    assert words in fault


def test_engines_share_experts_evenly(folders):
    more = "worker.actor.model.override_config={text_config: {num_attention_heads: 3, num_key_value_heads: 3}}"
    (fault,) = faults(
        folders["qwen3_vl_moe"],
        "worker.rollout.tensor_parallel_size=3",
        more,
        "trainer.n_gpus_per_node=3",
        "data.rollout_batch_size=510",
        "worker.actor.global_batch_size=102",
    )
    assert "worker.rollout.tensor_parallel_size = 3: must divide the model's 8 experts" in fault


def test_what_only_experts_have_is_refused_to_a_dense_model(folders):
    chosen = ["worker.actor.routing_replay=true", ADAPTERS, "worker.actor.model.lora.experts=true"]
    found = faults(folders["qwen2_5_vl"], *chosen)
    assert any("worker.actor.routing_replay = true: the model has no experts" in fault for fault in found)
    assert any("worker.actor.model.lora.experts = true: the model has no experts" in fault for fault in found)
    assert not faults(folders["qwen3_vl_moe"], *chosen)


def test_an_engine_without_the_family_is_named(folders, monkeypatch):
    monkeypatch.setattr(model_checks, "_engine_classes", lambda: '"Qwen2_5_VLForConditionalGeneration"')
    (fault,) = faults(folders["qwen3_vl_moe"])
    assert "the installed vLLM has no Qwen3VLMoeForConditionalGeneration" in fault
    assert not faults(folders["qwen2_5_vl"])


def test_all_faults_of_a_model_come_together(folders):
    critic = ["algorithm.adv_estimator=gae", f"worker.critic.model.model_path={folders['qwen3']}"]
    found = faults(folders["qwen2_5_vl"], *critic, "worker.rollout.tensor_parallel_size=4", ADAPTERS)
    assert len(found) == 2 and "its image_token_id is None and the actor's is" in found[1]
    assert not faults(folders["qwen3"], *critic)


def test_positions_may_be_stretched(folders):
    rope = "{text_config: {rope_parameters: {rope_type: yarn, factor: 2.0, original_max_position_embeddings: 4096}}}"
    longer = ["data.max_response_length=4000", f"worker.actor.model.override_config={rope}"]
    assert not faults(folders["qwen2_5_vl"], *longer)


def test_overrides_reach_sections_and_leave_the_rest(folders):
    changes = {"text_config": {"attention_dropout": 0.5, "rope_parameters": {"rope_theta": 5.0}}}
    changed, plain = (read_config(str(folders["qwen2_5_vl"]), overrides=which) for which in (changes, None))
    assert (changed.text_config.attention_dropout, plain.text_config.attention_dropout) == (0.5, 0.0)
    assert changed.text_config.rope_parameters == plain.text_config.rope_parameters | {"rope_theta": 5.0}
    assert changed.text_config.hidden_size == plain.text_config.hidden_size


def test_an_engine_is_told_what_its_model_can_use(folders):
    chosen = ["worker.rollout.limit_images=2", "worker.actor.model.override_config={rms_norm_eps: 0.5}"]
    for family, limit in (("qwen2_5_vl", {"image": 2}), ("qwen3", None)):  # a text model has no images to limit
        config = load_config([f"worker.actor.model.model_path={folders[family]}", *chosen])
        engine = rollout_arguments(config, "cpu", load_processor(str(folders[family])))["engine"]
        assert engine.get("limit_mm_per_prompt") == limit
    assert engine["hf_overrides"](read_config(str(folders["qwen3"]))).rms_norm_eps == 0.5
    engine["hf_overrides"](PretrainedConfig())  # vLLM asks with one, too


def test_a_config_has_the_class_of_its_model_also_after_another_took_its_place(folders, monkeypatch):
    class Other(PretrainedConfig):
        model_type = "qwen3_5"

    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "qwen3_5", Other)
    config = read_config(str(folders["qwen3_5"]), overrides={"text_config": {"rms_norm_eps": 0.5}})
    assert isinstance(config, Qwen3_5Config) and config.text_config.rms_norm_eps == 0.5


def test_linear_attention_wants_an_engine_that_can(folders):
    """vLLM has no text model of the family, and computes it on a CPU in bf16 alone."""
    pieces = "worker.rollout.enable_chunked_prefill=true"
    on_cpu, on_gpu = ["trainer.device=cpu", "trainer.n_gpus_per_node=1", pieces], ["trainer.device=cuda", pieces]
    (fault,) = faults(folders["qwen3_5"], "trainer.device=cuda")
    assert "worker.rollout.enable_chunked_prefill = false: vLLM hands a prompt's states" in fault
    (fault,) = faults(folders["qwen3_5"], *on_cpu, "worker.rollout.dtype=fp32")
    assert "worker.rollout.dtype = 'fp32': on a CPU vLLM computes the linear attention" in fault
    assert not faults(folders["qwen3_5"], *on_cpu, "worker.rollout.dtype=bf16")
    assert not faults(folders["qwen3_5"], *on_gpu, "worker.rollout.dtype=fp32")
    (fault,) = faults(folders["qwen3_5_text"], *on_gpu)
    assert "the installed vLLM has no Qwen3_5ForCausalLM" in fault
    found = faults(folders["qwen3_5"], *on_gpu, "worker.rollout.tensor_parallel_size=4")
    assert any("must divide the model's 2 key heads of linear attention" in fault for fault in found)

"""Adapters: the model without them is the reference, with them merged it is the policy; nothing else is trained."""

import shutil

import model_merger
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForImageTextToText

from tests.support.tiny_model_folder import save_tiny_model
from tests.support.updates import make_groups, one_update, settings
from verl.config.records import AdapterConfig, ConfigError
from verl.distributed import checkpoint
from verl.distributed.fsdp import full_weights
from verl.model.lora import (
    ADAPTER_FOLDER,
    _merge,
    adapted_layers,
    adapters_off,
    add_adapters,
    gather_adapters,
    load_merged,
    save_adapters,
)
from verl.model.qwen_vl import ResponseLogProbs, attend_packed, load_model
from verl.workers.actor import Actor

CONFIG = AdapterConfig(rank=4, alpha=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"), family="qwen3_vl")


def adapted(folder, seed=None, config=CONFIG):
    """The model with adapters, at their start or, with a seed, as if trained."""
    model = load_model(str(folder), torch.float32)
    add_adapters(model, config, torch.float32, seed=3)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def log_probs(model):
    groups, _, _ = make_groups("qwen3_vl")
    for prompt in groups.prompts:  # the token ids of the folder's tokenizer
        prompt[prompt == 90] = model.config.image_token_id
    return Actor(ResponseLogProbs(model), torch.device("cpu")).compute_log_probs(groups, 10_000, True, 0.9)[0]


def test_the_policy_starts_as_the_base_and_is_the_base_without_its_adapters(folder):
    base = log_probs(load_model(str(folder), torch.float32))
    assert torch.equal(log_probs(adapted(folder)), base)
    model = adapted(folder, seed=1)
    trained = log_probs(model)
    assert (trained - base).abs().max() > 1e-2
    with adapters_off(model):
        assert torch.equal(log_probs(model), base)
    assert torch.equal(log_probs(model), trained)


def test_merged_weights_have_the_bases_names_and_the_policys_values(folder):
    model, base = adapted(folder, seed=1), load_model(str(folder), torch.float32)
    expected = log_probs(model)
    merged = dict(full_weights(model))
    assert list(merged) == list(base.state_dict())
    base.load_state_dict(merged)
    torch.testing.assert_close(log_probs(base), expected, rtol=1e-5, atol=1e-5)


def test_only_adapters_are_trained_also_after_a_pass_of_the_reference(folder):
    model = adapted(folder)
    groups, advantages, reference = make_groups("qwen2")  # rows without images
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scorer = ResponseLogProbs(model)
    with adapters_off(model), torch.no_grad():
        Actor(scorer, torch.device("cpu")).compute_log_probs(groups, 10_000, True, 0.9)
    one_update(scorer, groups, advantages, reference, settings(len(groups), 10_000, True))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(".lora_B." in name for name in changed)  # A has no gradient while B is 0


def test_adapters_are_the_same_on_every_rank_and_where_they_are_wanted(folder):
    first, again = adapted(folder), adapted(folder)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert any("visual" in name for name, _ in adapted_layers(first))
    model = adapted(folder, config=AdapterConfig(4, 8, "q_proj, v_proj", ".*layers.1.*"))
    names = [name.rpartition("model.language_model.")[2] for name, _ in adapted_layers(model)]
    assert names == [f"layers.{i}.self_attn.{kind}" for i in (0, 2) for kind in ("q_proj", "v_proj")]


@pytest.mark.parametrize("targets", ["nothing_here", "lm_head", "embed_tokens"])
def test_layers_that_cannot_carry_adapters_are_named(folder, targets):
    with pytest.raises(ConfigError, match=f"lora.target_modules = '{targets}'"):
        adapted(folder, config=AdapterConfig(4, 8, targets))


def test_checkpoints_hold_the_adapters_alone_and_bring_them_back(folder, tmp_path):
    model = adapted(folder, seed=1)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable)
    sum(p.sum() for p in trainable).backward()
    optimizer.step()
    writer = checkpoint.ShardWriter()
    writer.start(tmp_path / "actor", model, optimizer)
    assert writer.fault(blocking=True) == ""
    stored = FileSystemReader(tmp_path / "actor").read_metadata().state_dict_metadata
    names = {name for name in stored if name.startswith("model.")}
    assert names == {f"model.{name}" for name, p in model.named_parameters() if p.requires_grad}
    other = adapted(folder)
    fresh = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad])
    checkpoint.load_shards(tmp_path / "actor", other, fresh)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_merger_writes_the_policy_and_keeps_the_adapters(folder, tmp_path):
    model, actor_dir = adapted(folder, seed=1), tmp_path / "actor"
    save_adapters(model, gather_adapters(model, lambda tensor: tensor), actor_dir / ADAPTER_FOLDER)
    shutil.copytree(folder, actor_dir / "huggingface", ignore=shutil.ignore_patterns("*.safetensors"))
    kept = (actor_dir / "huggingface" / "generation_config.json").read_bytes()
    assert model_merger.main(["--local_dir", str(actor_dir)]) == 0
    merged = AutoModelForImageTextToText.from_pretrained(actor_dir / "huggingface", dtype="auto")
    attend_packed(merged)
    torch.testing.assert_close(log_probs(merged), log_probs(model), rtol=1e-5, atol=1e-5)
    assert (actor_dir / "huggingface" / "generation_config.json").read_bytes() == kept
    assert (actor_dir / ADAPTER_FOLDER / "adapter_model.safetensors").is_file()

    from peft import PeftModel

    plain = PeftModel.from_pretrained(load_model(str(folder), torch.float32), str(actor_dir / ADAPTER_FOLDER))
    torch.testing.assert_close(log_probs(plain.merge_and_unload()), log_probs(model), rtol=1e-5, atol=1e-5)


def test_adapters_of_another_model_are_refused(folder, tmp_path):
    model = adapted(folder)
    model.peft_config["default"].base_model_name_or_path = str(save_tiny_model(tmp_path / "other", family="qwen2"))
    save_adapters(model, gather_adapters(model, lambda tensor: tensor), tmp_path / "adapters")
    with pytest.raises(ValueError, match="fits no layer of"):
        load_merged(tmp_path / "adapters")


@pytest.mark.parametrize("size", [1e-7, 1e-6, 1e-4])
def test_merged_weights_in_bfloat16_carry_small_adapters(size):
    """Nearest rounding would lose changes below half of the spacing, 4e-3 of a weight."""
    generator = torch.Generator().manual_seed(0)
    weight = (0.02 * torch.randn(512, 512, generator=generator)).bfloat16()
    a, b = torch.randn(4, 512, generator=generator), size * torch.randn(512, 4, generator=generator)
    merged = _merge(weight, a, b, 2.0)
    assert merged.dtype == torch.bfloat16 and torch.equal(merged, _merge(weight, a, b, 2.0))
    change, moved = 2.0 * (b @ a), merged.float() - weight.float()
    share = float((moved * change).sum() / change.square().sum())
    assert share == pytest.approx(1, abs=0.15)
    assert torch.equal(_merge(weight, a, 0 * b, 2.0), weight)


@torch.no_grad()
def expert_log_probs(model):
    groups, _, _ = make_groups("qwen2")  # rows without images
    return Actor(ResponseLogProbs(model), torch.device("cpu")).compute_log_probs(groups, 10_000, True, 0.9)[0]


@pytest.mark.parametrize(
    ("family", "with_experts"),
    [("qwen3_vl_moe", False), ("qwen3_vl_moe", True), ("qwen3_5", False), ("qwen3_5_moe", True)],
)
def test_adapters_of_experts_are_trained_merged_and_written_as_peft_does(tmp_path, family, with_experts):
    base = save_tiny_model(tmp_path / "base", family=family)
    config = AdapterConfig(4, 8, exclude_modules=".*visual.*", experts=with_experts)
    assert torch.equal(expert_log_probs(adapted(base, config=config)), expert_log_probs(adapted(base)))
    model = adapted(base, seed=1, config=config)
    trained = {name.rpartition(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert any("experts" in name for name in trained) == with_experts
    assert any("linear_attn" in name for name in trained) == family.startswith("qwen3_5")
    expected = expert_log_probs(model)
    with adapters_off(model):
        torch.testing.assert_close(expert_log_probs(model), expert_log_probs(adapted(base)))
    plain = load_model(str(base), torch.float32)
    names = list(plain.state_dict())
    merged = dict(full_weights(model))
    assert list(merged) == names
    plain.load_state_dict(merged)
    torch.testing.assert_close(expert_log_probs(plain), expected, rtol=1e-5, atol=1e-5)

    folder = tmp_path / "actor" / ADAPTER_FOLDER
    save_adapters(model, gather_adapters(model, lambda tensor: tensor), folder)
    for name, weight in load_merged(folder).state_dict().items():
        torch.testing.assert_close(weight, merged[name], rtol=1e-5, atol=1e-6)

    from peft import PeftModel

    theirs = PeftModel.from_pretrained(load_model(str(base), torch.float32), str(folder)).merge_and_unload()
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(weight, merged[name], rtol=1e-5, atol=1e-6)

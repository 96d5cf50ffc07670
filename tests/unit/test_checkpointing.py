"""Activation checkpointing changes no gradient, and only how much is recomputed."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from tests.support.packed_rows import make_rows, packed_log_probs, packed_model
from tests.support.tiny_qwen import FAMILIES
from verl.model.checkpointing import CHECKPOINTING, LEVELS, measure_layers, set_checkpointing

TOKENS, PATCHES = 100, 64
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attention_flop(query, key, value, *_, **__):
    """Operation counts that FlopCounterMode lacks for a CPU."""
    return sdpa_flop_count(query, key, value)


def backward(family, budget_bytes):
    """Gradient of a pass, its operations, and what each layer kept."""
    model = packed_model(family).train()
    model.gradient_checkpointing_enable(CHECKPOINTING)
    kept = set_checkpointing(model, TOKENS, PATCHES, budget_bytes)
    counter = FlopCounterMode(display=False, custom_mapping={CPU_ATTENTION: attention_flop})
    with counter:
        log_probs, _ = packed_log_probs(model, make_rows(family), 1.0, 10_000, True)
        log_probs.square().sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return gradient, counter.get_total_flops(), kept


@pytest.mark.parametrize("family", FAMILIES)
def test_the_more_is_kept_the_less_is_computed_again(family):
    layers = measure_layers(packed_model(family), TOKENS, PATCHES)
    tower = [layer for layer in layers if layer.is_vision]
    decoder = [layer for layer in layers if not layer.is_vision]
    nothing, most, kept = backward(family, 0)
    assert kept == ["nothing"] * len(layers)
    steps = [(level, 0) for level in range(1, len(LEVELS))]
    steps += [(len(LEVELS) - 1, level) for level in range(1, len(LEVELS)) if tower]
    for level, tower_level in steps:
        budget_bytes = sum(layer.bytes[level] for layer in decoder) + sum(layer.bytes[tower_level] for layer in tower)
        gradient, operations, kept = backward(family, budget_bytes)
        assert kept == [LEVELS[level]] * len(decoder) + [LEVELS[tower_level]] * len(tower)
        assert operations < most
        torch.testing.assert_close(gradient, nothing, rtol=1e-5, atol=1e-7)
        most = operations


def test_a_budget_for_one_layer_keeps_the_first():
    model = packed_model("qwen2_5_vl")
    first, *others = measure_layers(model, TOKENS, PATCHES)
    assert set_checkpointing(model, TOKENS, PATCHES, first.bytes[1]) == ["attention"] + ["nothing"] * len(others)
    assert first.module.gradient_checkpointing


def test_bytes_are_those_of_attention_and_both_gated_products():
    """The decoder's heads together, then gate and up: 2 I numbers of 4 bytes for each token."""
    model = packed_model("qwen2_5_vl")
    config = model.config.get_text_config()
    nothing, attention, matmuls, _ = measure_layers(model, TOKENS, PATCHES)[0].bytes
    assert nothing == 0
    assert attention == TOKENS * config.hidden_size * 4
    assert matmuls == attention + TOKENS * 2 * config.intermediate_size * 4

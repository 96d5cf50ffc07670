"""What is kept of a pass changes no gradient, and how much is computed again."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.packed_rows import make_rows, packed_log_probs, packed_model
from tests.tiny_qwen import FAMILIES
from verl.activations import CHECKPOINTING, keep_activations, measure_layers

TOKENS, PATCHES = 100, 64


def backward(family, budget_bytes):
    """Gradient of a pass, its operations, and the layers that kept their wide products and all."""
    model = packed_model(family).train()
    model.gradient_checkpointing_enable(CHECKPOINTING)
    kept = keep_activations(model, TOKENS, PATCHES, budget_bytes)
    counter = FlopCounterMode(display=False)
    with counter:
        log_probs, _ = packed_log_probs(model, make_rows(family), 1.0, 10_000, True)
        log_probs.square().sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return gradient, counter.get_total_flops(), kept


@pytest.mark.parametrize("family", FAMILIES)
def test_the_more_is_kept_the_less_is_computed_again(family):
    layers = measure_layers(packed_model(family), TOKENS, PATCHES)
    wide, whole = (sum(getattr(layer, name) for layer in layers) for name in ("wide_bytes", "whole_bytes"))
    nothing, most, kept = backward(family, 0)
    assert kept == (0, 0)
    for budget, expected in ((wide, (len(layers), 0)), (whole, (0, len(layers)))):
        gradient, operations, kept = backward(family, budget)
        assert kept == expected
        assert operations < most
        torch.testing.assert_close(gradient, nothing, rtol=1e-5, atol=1e-7)
        most = operations


def test_a_budget_for_one_layer_keeps_the_first():
    model = packed_model("qwen2_5_vl")
    first, *_ = measure_layers(model, TOKENS, PATCHES)
    assert keep_activations(model, TOKENS, PATCHES, first.wide_bytes) == (1, 0)
    assert first.module.gradient_checkpointing


def test_wide_bytes_are_those_of_both_gated_products():
    """The decoder's gate and up: 2 I numbers of 4 bytes for each token."""
    model = packed_model("qwen2_5_vl")
    first = measure_layers(model, TOKENS, PATCHES)[0]
    assert first.wide_bytes == TOKENS * 2 * model.config.get_text_config().intermediate_size * 4

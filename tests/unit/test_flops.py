"""Operations by hand: a model whose numbers multiply in one's head, and the 3B shape against its parameters."""

from types import SimpleNamespace

import pytest
import torch

from tests.support.tiny_qwen import tiny_model
from verl.bench.random_models import RANDOM_MODELS
from verl.model.families import decoder
from verl.model.flops import rollout_bytes, text_flops

TINY = SimpleNamespace(
    hidden_size=4, num_attention_heads=2, num_key_value_heads=1, intermediate_size=8, num_hidden_layers=1
)


def test_text_by_hand():
    """Weights 4 x (8 + 4) + 3 x 4 x 8 = 144; 3 prompt and 2 x 2 response tokens; pairs 4.5 + 2 x 2 x 4 = 20.5."""
    assert text_flops(TINY, 3, 2, 2, is_shared=True) == 2 * 7 * 144 + 4 * 20.5 * 4
    assert text_flops(TINY, 3, 2, 2, is_shared=False) == 2 * 10 * 144 + 4 * 25 * 4


def test_sharing_saves_what_the_arithmetic_says():
    """At 1,586 prompt and 400 response tokens, 8 samples: 15,888 tokens against 4,786."""
    config = SimpleNamespace(**RANDOM_MODELS["random_qwen2_5_vl_3b"]["text_config"])
    ratio = text_flops(config, 1586, 400, 8, False) / text_flops(config, 1586, 400, 8, True)
    assert ratio == pytest.approx(3.3, abs=0.1)


def test_bytes_of_a_rollout_by_hand():
    """A step: weights 144 + 5 x 4 = 164, keys and values 2 x 1 x 2 = 4 of 3 x (6 + 1) tokens; 2 steps, 2 bytes."""
    config = SimpleNamespace(**vars(TINY), vocab_size=5)
    lengths = {"prompt_tokens": 6, "response_tokens": 2}
    assert rollout_bytes(config, **lengths, num_sequences=3, num_prompts=3) == 2 * 2 * (164 + 4 * 21)
    assert rollout_bytes(config, **lengths, num_sequences=3, num_prompts=1) == 2 * 2 * (164 + 4 * 9)


HYBRID = SimpleNamespace(
    **vars(TINY) | {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "vocab_size": 5},
    linear_num_key_heads=1,
    linear_num_value_heads=2,
    linear_key_head_dim=2,
    linear_value_head_dim=3,
)


def test_linear_attention_by_hand():
    """Weights: full 4 (3 x 2 + 2) 2 = 64, linear 4 (2 x 2 + 3 x 6 + 2 x 2) = 104, MLPs 192; scan 6 x 12 + 128 x 10."""
    assert text_flops(HYBRID, 3, 2, 2, is_shared=True) == 2 * 7 * 360 + 4 * 20.5 * 4 + 7 * (72 + 1280)
    lengths = {"prompt_tokens": 6, "response_tokens": 2, "num_sequences": 3, "num_prompts": 3}
    # A step: weights 360 + 20, keys and values 4 of 21 tokens in one layer, 3 states of 12 numbers read and written.
    assert rollout_bytes(HYBRID, **lengths) == 2 * (2 * (380 + 4 * 21) + 2 * 4 * 3 * 12)


@pytest.mark.parametrize("family", ["qwen3_5_text", "qwen3_5_moe_text", "qwen3"])
def test_operations_of_weights_are_two_for_each(family):
    """With one token and no pairs the rest is the scan's."""
    model = tiny_model(family=family)
    config = model.config
    linear = [m for m in decoder(model).layers.modules() if isinstance(m, torch.nn.Linear)]
    weights = sum(m.weight.numel() for m in linear)
    if "moe" in family:
        layers = config.num_hidden_layers
        chosen = 3 * config.moe_intermediate_size * config.num_experts_per_tok + config.num_experts
        weights += (
            layers * config.hidden_size * (chosen - 1)
        )  # the shared expert's gate, one number a layer, is left out
    operations = text_flops(config, 1, 0, 1, True) - 4 * 0.5 * config.num_attention_heads * config.head_dim * sum(
        kind == "full_attention" for kind in config.layer_types
    )
    scan = 6 * 4 * 32 * 32 + 2 * 64 * 4 * 64
    num_linear = sum(kind == "linear_attention" for kind in config.layer_types)
    assert operations == pytest.approx(2 * weights + num_linear * scan, rel=1e-12)

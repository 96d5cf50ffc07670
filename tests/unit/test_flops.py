"""Operations by hand: a model whose numbers multiply in one's head, and the 3B shape against its parameters."""

from types import SimpleNamespace

import pytest

from verl.bench.inputs import RANDOM_MODELS
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

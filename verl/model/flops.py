"""FLOPs of Qwen-VL forward passes and memory traffic of rollouts, from the config: for MFU and the roofline.

A matmul of [a, b] and [b, c] counts 2abc. Norms, RoPE and activation functions are left out: they are memory-bound.
Layers with linear attention have H heads of values, with states of K x D numbers each.
"""

from dataclasses import dataclass
from typing import Any

SCAN_CHUNK = 64
"""C: tokens whose corrections linear attention solves together, as in linear_attention.py."""


@dataclass(frozen=True)
class PassFlops:
    """FLOPs of one forward pass: vision encoder, decoder, output head."""

    vision: float
    text: float
    head: float

    @property
    def total(self) -> float:
        return self.vision + self.text + self.head


def _attention(num_pairs: float, num_heads: int, head_dim: int) -> float:
    """FLOPs of scores and weighted sums over (query, key) pairs."""
    return 4.0 * num_pairs * num_heads * head_dim


def head_dim(config: Any) -> int:
    """Elements of one attention head, which need not be hidden_size / num_attention_heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def count_linear(config: Any) -> int:
    """Decoder layers with linear attention; 0 in most families."""
    return (getattr(config, "layer_types", None) or []).count("linear_attention")


def state_numbers(config: Any) -> int:
    """H K D: numbers of the state of one sequence in one layer with linear attention."""
    return config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim


def _attention_weights(config: Any) -> int:
    """Parameters of the matmuls of attention in all decoder layers, whether linear or not."""
    heads = 2 * config.num_attention_heads  # of queries and outputs
    num_linear, linear = count_linear(config), 0
    if num_linear:
        heads += config.num_attention_heads  # of gates, which this family has
        keys = 2 * config.linear_num_key_heads * config.linear_key_head_dim
        values = 3 * config.linear_num_value_heads * config.linear_value_head_dim  # with gates and outputs
        linear = keys + values + 2 * config.linear_num_value_heads
    full = (heads + 2 * config.num_key_value_heads) * head_dim(config)
    return config.hidden_size * ((config.num_hidden_layers - num_linear) * full + num_linear * linear)


def _decoder_weights(config: Any, count: str) -> int:
    """Parameters of the decoder's matmuls; of experts as many as `count` names."""
    mlps = config.num_hidden_layers * config.hidden_size * _mlp_width(config, count)
    return _attention_weights(config) + mlps


def _scan(config: Any, tokens: int) -> float:
    """FLOPs of linear attention in one layer: three products with the state, and C (2 K + 2 D) within chunks of C."""
    if not count_linear(config):
        return 0.0
    sizes = config.linear_key_head_dim + config.linear_value_head_dim
    return tokens * (6.0 * state_numbers(config) + 2.0 * SCAN_CHUNK * config.linear_num_value_heads * sizes)


def _mlp_width(config: Any, count: str) -> int:
    """Numbers per hidden one in a layer's MLP: three times its width; of experts `count` times, with the router."""
    if not getattr(config, "num_experts", 0):
        return 3 * config.intermediate_size
    shared = getattr(config, "shared_expert_intermediate_size", 0)
    return 3 * (config.moe_intermediate_size * getattr(config, count) + shared) + config.num_experts


def rollout_bytes(
    config: Any, prompt_tokens: int, response_tokens: int, num_sequences: int, num_prompts: int, num_bytes: int = 2
) -> float:
    """Bytes that an engine reads to decode num_sequences responses in one batch, one token of each per step.

    Each step reads the decoder's weights and the KV cache of prompts and of tokens decoded so far; it reads and writes
    each sequence's states of linear attention, which are in float32.

    Args:
        config: of the decoder.
        num_prompts: prompt KV caches read per step: num_sequences, or fewer with cascade (shared-prefix) attention.
        num_bytes: of a number.
    """
    num_linear = count_linear(config)
    per_token = 2 * (config.num_hidden_layers - num_linear) * config.num_key_value_heads * head_dim(config)
    # A large batch reads all experts.
    weights = _decoder_weights(config, "num_experts") + config.vocab_size * config.hidden_size
    seen = num_prompts * prompt_tokens + num_sequences * response_tokens / 2
    states = 2 * 4 * num_sequences * num_linear * state_numbers(config) if num_linear else 0
    return float(response_tokens * (num_bytes * (weights + per_token * seen) + states))


def text_flops(config: Any, prompt_tokens: int, response_tokens: int, num_samples: int, is_shared: bool) -> float:
    """FLOPs of the decoder for one group; an unshared prompt is computed once per response."""
    num_prompts = 1 if is_shared else num_samples
    tokens = num_prompts * prompt_tokens + num_samples * response_tokens
    pairs = num_prompts * prompt_tokens**2 / 2
    pairs += num_samples * response_tokens * (prompt_tokens + response_tokens / 2)
    num_linear = count_linear(config)
    attention = _attention(pairs, config.num_attention_heads, head_dim(config))
    mixed = (config.num_hidden_layers - num_linear) * attention + num_linear * _scan(config, tokens)
    return 2.0 * tokens * _decoder_weights(config, "num_experts_per_tok") + mixed


def vision_flops(config: Any, patches: int) -> float:
    """FLOPs of the vision encoder for one image; blocks outside fullatt_block_indexes use window attention."""
    hidden = config.hidden_size
    is_windowed = hasattr(config, "window_size")  # with gated MLPs; Qwen3-VL's encoder has neither
    weights = 4 * hidden * hidden + (3 if is_windowed else 2) * hidden * config.intermediate_size
    window = (config.window_size // config.patch_size) ** 2 if is_windowed else 0
    num_full = len(config.fullatt_block_indexes) if is_windowed else config.depth
    pairs = num_full * patches**2 + (config.depth - num_full) * patches * min(window, patches)
    attention = _attention(pairs, config.num_heads, hidden // config.num_heads)
    patch_dim = config.in_channels * config.temporal_patch_size * config.patch_size**2
    merged = hidden * config.spatial_merge_size**2
    ends = 2.0 * patches * patch_dim * hidden
    ends += 2.0 * patches / config.spatial_merge_size**2 * merged * (merged + config.out_hidden_size)
    return config.depth * 2.0 * patches * weights + attention + ends


def group_flops(
    config: Any,
    patches: int,
    prompt_tokens: int,
    response_tokens: int,
    num_samples: int,
    is_shared: bool = True,
    num_images: int = 1,
) -> PassFlops:
    """FLOPs of one forward pass over one group; the output head runs on response tokens only.

    Args:
        config: of the model, with `text_config` and `vision_config`.
        patches: of each image, before merging.
        is_shared: True when prompt and images are computed once for all samples.
        num_images: of the prompt; two frames of a video count as one.
    """
    text = config.get_text_config()
    return PassFlops(
        vision=vision_flops(config.vision_config, patches) * num_images * (1 if is_shared else num_samples),
        text=text_flops(text, prompt_tokens, response_tokens, num_samples, is_shared),
        head=2.0 * num_samples * response_tokens * text.hidden_size * text.vocab_size,
    )

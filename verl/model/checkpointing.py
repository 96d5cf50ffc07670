"""Selective activation checkpointing: which outputs each layer saves for the backward pass within a byte budget.

Letters: T tokens (or patches) of a pass; D hidden size, I intermediate size, b bytes of a number.

Outputs are saved in the order of recomputation avoided per byte: attention outputs (work grows with the sequence),
then matmul outputs of width I (most of a layer's work, half of its memory), then whole layers without recomputation.
The decoder comes before the vision encoder, whose layers are so short on a GPU that selecting among their outputs
costs the host more time than recomputing them costs the GPU.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from verl.model.families import decoder, vision_encoder
from verl.model.fused_layers import aligned_width

CHECKPOINTING: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
"""Keyword arguments of torch's checkpoint; no pass draws random numbers."""
MATMUL_OPS = ("aten::mm", "aten::addmm", "aten::_grouped_mm")
ATTENTION_OPS = (
    "verl::shared_attention",
    "torch_attn::_varlen_attn",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
)
LEVELS = ("nothing", "attention", "matmuls", "everything")
"""Outputs that a layer saves; each level includes those before it."""


@dataclass(frozen=True)
class Layer:
    """A layer under activation checkpointing and the bytes of what it can save.

    Attributes:
        module: the transformer layer.
        is_vision: True in the vision encoder, False in the decoder.
        width: I.
        bytes: of each of LEVELS. Attention output: T heads head_dim b; matmul outputs: T I b each; everything:
            T (8D + 3I) b, for 8 hidden vectors (two normalised inputs, residuals, query, keys, values, attention
            output) and 3 intermediate ones per token.
    """

    module: GradientCheckpointingLayer
    is_vision: bool
    width: int
    bytes: tuple[int, ...]


def measure_layers(model: PreTrainedModel, num_tokens: int, num_patches: int) -> list[Layer]:
    """The layers of decoder and vision encoder, measured for a pass over so many tokens and patches."""
    size = next(model.parameters()).element_size()
    encoder = vision_encoder(model)
    stacks: list[tuple[Any, Any, int]] = [(decoder(model), model.config.get_text_config(), num_tokens)]
    if encoder is not None:
        stacks.append((encoder, model.config.vision_config, num_patches))
    layers = []
    for stack, config, count in stacks:
        for module in (each for each in stack.modules() if isinstance(each, GradientCheckpointingLayer)):
            is_sparse = hasattr(getattr(module, "mlp", None), "experts")
            width, numbers = (_measure_sparse if is_sparse else _measure_dense)(module, config)
            layers.append(Layer(module, stack is encoder, width, (0, *(count * size * n for n in numbers))))
    return layers


def _measure_dense(module: GradientCheckpointingLayer, config: Any) -> tuple[int, tuple[int, int, int]]:
    """I, and numbers per token that the levels keep."""
    hidden = getattr(config, "embed_dim", config.hidden_size)  # the width of Qwen2-VL's encoder
    width = int(getattr(config, "intermediate_size", None) or hidden * config.mlp_ratio)
    matmuls = [m for m in module.modules() if isinstance(m, nn.Linear) and m.out_features == width]
    attention, inside = _measure_mixer(module, config, hidden)
    return width, (attention, attention + width * len(matmuls), 7 * hidden + inside + 3 * width)


def _measure_mixer(module: Any, config: Any, hidden: int) -> tuple[int, int]:
    """Numbers per token of attention's output, and of all in attention beyond hidden vectors.

    The output of linear attention is none of the operators that are saved. Inside are, besides, the inputs and
    outputs of its convolution, queries, keys and values apart from each other, and output, gate and their product.
    """
    if hasattr(module, "linear_attn"):
        mixer = module.linear_attn
        return 0, 3 * mixer.conv_dim + 4 * mixer.value_dim
    heads = getattr(config, "num_attention_heads", 1) * (getattr(config, "head_dim", None) or 0)
    return heads or hidden, heads or hidden


def _measure_sparse(module: GradientCheckpointingLayer, config: Any) -> tuple[int, tuple[int, int, int]]:
    """2 I of an expert, and numbers per token: K 2 I of gate and up products, 3 (D + I) K for everything of experts.

    An expert that all tokens meet adds 3 of its widths.
    """
    hidden, top_k, width = config.hidden_size, config.num_experts_per_tok, 2 * config.moe_intermediate_size
    attention, inside = _measure_mixer(module, config, hidden)
    everything = 8 * hidden + inside + 3 * top_k * (hidden + width // 2)
    everything += 3 * getattr(config, "shared_expert_intermediate_size", 0)
    return width, (attention, attention + top_k * width, everything)


def set_checkpointing(model: PreTrainedModel, num_tokens: int, num_patches: int, budget_bytes: float) -> list[str]:
    """Sets the outputs that each layer saves, within the budget, and returns its level: one of LEVELS."""
    layers = measure_layers(model, num_tokens, num_patches)
    levels = [0] * len(layers)
    steps = itertools.product((False, True), range(1, len(LEVELS))) if budget_bytes > 0 else ()
    for is_vision, level in steps:
        for index, layer in enumerate(layers):
            more = layer.bytes[level] - layer.bytes[level - 1]
            if layer.is_vision == is_vision and levels[index] == level - 1 and more <= budget_bytes:
                levels[index] = level
                budget_bytes -= more
    for layer, level in zip(layers, levels, strict=True):
        widths = (layer.width, aligned_width(layer.width)) if LEVELS[level] == "matmuls" else ()
        contexts = {"context_fn": save_outputs(*widths)} if layer.bytes[level] else {}  # linear attention keeps none
        function: Any = partial(checkpoint, **CHECKPOINTING, **contexts)
        layer.module.gradient_checkpointing = LEVELS[level] != "everything"  # type: ignore[assignment]
        layer.module._gradient_checkpointing_func = function
    return [LEVELS[level] for level in levels]


def save_outputs(*widths: int) -> Callable[[], tuple[Any, Any]]:
    """A context_fn for checkpoint: saves outputs of attention and of matmuls of these widths, recomputes the rest."""

    def policy(_: Any, operation: Any, *args: Any, **__: Any) -> CheckpointPolicy:
        name = operation.name()
        is_matmul = name in MATMUL_OPS
        matrix = args[1 if name == "aten::_grouped_mm" else -1] if is_matmul else None
        is_saved = name in ATTENTION_OPS or (matrix is not None and matrix.shape[-1] in widths)
        return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE

    return partial(create_selective_checkpoint_contexts, policy)

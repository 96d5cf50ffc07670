"""Which activations wait for the backward pass, and which it computes again.

Letters: T tokens (or patches) of a pass; D hidden size, I intermediate size, b bytes of a number.

What saves the most work for its bytes is kept first: attention's outputs (work with the length of what is seen),
then the products to width I (most of a layer's work and half of its memory), then whole layers. The tower comes after
the decoder: its layers are so short on a GPU that to choose among their outputs keeps the host longer than to compute
them again keeps the GPU.
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

from verl.fused_layers import aligned
from verl.model_families import decoder, vision_tower

CHECKPOINTING: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
"""Nothing in a pass is random."""
PRODUCTS = ("aten::mm", "aten::addmm")
ATTENTION = (
    "verl::shared_attention",
    "torch_attn::_varlen_attn",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
)
LEVELS = ("nothing", "attention", "products", "everything")
"""What a layer keeps, each with all before it."""


@dataclass(frozen=True)
class Layer:
    """A layer that may compute its activations again.

    Attributes:
        module: of the model.
        is_in_tower: not in the decoder.
        width: I.
        bytes: that each of LEVELS takes. Attention's output is as wide as its heads together; products to width I
            T I b each; and all that a backward pass needs about 8 hidden vectors (two normalised inputs, residuals,
            query, keys, values, attention output) and 3 intermediate ones a token: about T (8D + 3I) b.
    """

    module: GradientCheckpointingLayer
    is_in_tower: bool
    width: int
    bytes: tuple[int, ...]


def measure_layers(model: PreTrainedModel, num_tokens: int, num_patches: int) -> list[Layer]:
    """The layers of decoder and tower for a pass over so many tokens and patches."""
    size = next(model.parameters()).element_size()
    tower = vision_tower(model)
    stacks: list[tuple[Any, Any, int]] = [(decoder(model), model.config.get_text_config(), num_tokens)]
    if tower is not None:
        stacks.append((tower, model.config.vision_config, num_patches))
    layers = []
    for stack, config, count in stacks:
        hidden = getattr(config, "embed_dim", config.hidden_size)  # Qwen2-VL's tower names its width so
        width = int(getattr(config, "intermediate_size", None) or hidden * config.mlp_ratio)
        for module in stack.modules():
            if isinstance(module, GradientCheckpointingLayer):
                products = [m for m in module.modules() if isinstance(m, nn.Linear) and m.out_features == width]
                heads = getattr(config, "num_attention_heads", 1) * (getattr(config, "head_dim", None) or 0)
                attention = heads or hidden
                numbers = attention, attention + width * len(products), 7 * hidden + attention + 3 * width
                layers.append(Layer(module, stack is tower, width, (0, *(count * size * n for n in numbers))))
    return layers


def keep_activations(model: PreTrainedModel, num_tokens: int, num_patches: int, budget_bytes: float) -> list[str]:
    """Sets for each layer what it keeps, as far as the budget goes, and returns it: one of LEVELS."""
    layers = measure_layers(model, num_tokens, num_patches)
    kept = [0] * len(layers)
    for is_in_tower, level in itertools.product((False, True), range(1, len(LEVELS))):
        for index, layer in enumerate(layers):
            more = layer.bytes[level] - layer.bytes[level - 1]
            if layer.is_in_tower == is_in_tower and kept[index] == level - 1 and more <= budget_bytes:
                kept[index] = level
                budget_bytes -= more
    for layer, level in zip(layers, kept, strict=True):
        widths = (layer.width, aligned(layer.width)) if LEVELS[level] == "products" else ()
        contexts = {"context_fn": keep_outputs(*widths)} if level else {}
        function: Any = partial(checkpoint, **CHECKPOINTING, **contexts)
        layer.module.gradient_checkpointing = LEVELS[level] != "everything"  # type: ignore[assignment]
        layer.module._gradient_checkpointing_func = function
    return [LEVELS[level] for level in kept]


def keep_outputs(*widths: int) -> Callable[[], tuple[Any, Any]]:
    """The contexts under which a checkpointed layer keeps the outputs of attention and of products to these widths."""

    def policy(_: Any, operation: Any, *args: Any, **__: Any) -> CheckpointPolicy:
        name = operation.name()
        is_kept = name in ATTENTION or (name in PRODUCTS and args[-1].shape[-1] in widths)
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE

    return partial(create_selective_checkpoint_contexts, policy)

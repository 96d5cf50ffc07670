"""Which activations wait for the backward pass, and which it computes again.

Letters: T tokens (or patches) of a pass; D hidden size, I intermediate size, b bytes of a number.

In a layer that computes again, the products to width I are most of the work and their outputs half of the memory: they
are kept first, then whole layers. The decoder's come before the tower's, whose bytes save less work.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from verl.fused_layers import aligned
from verl.model_families import vision_tower

CHECKPOINTING: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
"""Nothing in a pass is random."""
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


@dataclass(frozen=True)
class Layer:
    """A layer that may compute its activations again.

    Attributes:
        module: of the model.
        width: I.
        wide_bytes: of the outputs of its products to width I: T I b each.
        whole_bytes: of all that its backward pass needs. A token leaves about 8 hidden vectors (two normalised inputs,
            residuals, query, keys, values, attention output) and 3 intermediate ones: T (8D + 3I) b.
    """

    module: GradientCheckpointingLayer
    width: int
    wide_bytes: int
    whole_bytes: int


def measure_layers(model: PreTrainedModel, num_tokens: int, num_patches: int) -> list[Layer]:
    """The layers of decoder and tower for a pass over so many tokens and patches."""
    size = next(model.parameters()).element_size()
    tower = vision_tower(model)
    stacks: list[tuple[Any, Any, int]] = [
        (getattr(model.model, "language_model", model.model), model.config.get_text_config(), num_tokens)
    ]
    if tower is not None:
        stacks.append((tower, model.config.vision_config, num_patches))
    layers = []
    for stack, config, count in stacks:
        hidden = getattr(config, "embed_dim", config.hidden_size)  # Qwen2-VL's tower names its width so
        width = int(getattr(config, "intermediate_size", None) or hidden * config.mlp_ratio)
        for module in stack.modules():
            if isinstance(module, GradientCheckpointingLayer):
                products = [m for m in module.modules() if isinstance(m, nn.Linear) and m.out_features == width]
                wide = count * size * width * len(products)
                layers.append(Layer(module, width, wide, count * size * (8 * hidden + 3 * width)))
    return layers


def keep_activations(
    model: PreTrainedModel, num_tokens: int, num_patches: int, budget_bytes: float
) -> tuple[int, int]:
    """Sets for each layer what it keeps, as far as the budget goes.

    Returns:
        Layers whose wide products are kept, and layers of which everything is kept.
    """
    layers = measure_layers(model, num_tokens, num_patches)
    kept: dict[int, str] = {}
    for index, layer in enumerate(layers):
        if layer.wide_bytes <= budget_bytes:
            kept[index] = "wide"
            budget_bytes -= layer.wide_bytes
    for index, layer in enumerate(layers):
        if index in kept and (more := layer.whole_bytes - layer.wide_bytes) <= budget_bytes:
            kept[index] = "whole"
            budget_bytes -= more
    for index, layer in enumerate(layers):
        contexts = {"context_fn": keep_products(layer.width)} if kept.get(index) == "wide" else {}
        function: Any = partial(checkpoint, **CHECKPOINTING, **contexts)
        layer.module.gradient_checkpointing = kept.get(index) != "whole"  # type: ignore[assignment]
        layer.module._gradient_checkpointing_func = function
    counts = list(kept.values())
    return counts.count("wide"), counts.count("whole")


def keep_products(width: int) -> Callable[[], tuple[Any, Any]]:
    """The contexts under which a checkpointed layer keeps the outputs of its products to this width, padded or not."""
    widths = {width, aligned(width)}

    def policy(_: Any, operation: Any, *args: Any, **__: Any) -> CheckpointPolicy:
        is_wide = operation in PRODUCTS and args[-1].shape[-1] in widths
        return CheckpointPolicy.MUST_SAVE if is_wide else CheckpointPolicy.PREFER_RECOMPUTE

    return partial(create_selective_checkpoint_contexts, policy)

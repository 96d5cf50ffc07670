"""Fused kernels in the place of a model's own layers on a GPU; what they compute stays the same up to rounding."""

import sys
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear, pad
from transformers import PreTrainedModel

from verl.model_families import vision_tower

ALIGNMENT = 64
"""Widths that are no multiple of 8 leave the fast bf16 products; a multiple of a tile's side wastes nothing."""


def fuse_layers(model: PreTrainedModel) -> bool:
    """Puts Liger's RMSNorm, SwiGLU and rotary kernels into the model, in place; whether that package knows the model.

    The tower's products of an unaligned width (3,420 in Qwen2.5-VL) are padded. The rotary kernels replace functions
    of the model's module, and so count for every model of its kind in this process.
    """
    try:
        from liger_kernel.ops import LigerSiLUMulFunction
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError:
        return False
    fuse = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model.config.model_type)
    if fuse is None:
        return False
    # Its own choice of rotary kernels may split positions that arrive combined; the log-probs have their own kernels.
    fuse(model=model, rope=False, cross_entropy=False, fused_linear_cross_entropy=False, rms_norm=True, swiglu=True)
    module = sys.modules[type(model).__module__]
    for name, rotate in (("apply_rotary_pos_emb", rotate_text), ("apply_rotary_pos_emb_vision", rotate_patches)):
        if hasattr(module, name):
            setattr(module, name, rotate)
    if (tower := vision_tower(model)) is not None:
        align_products(tower, LigerSiLUMulFunction.apply)
    return True


def rotate_text(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Rotated [1, heads, T, size] queries and keys; cos and sin [1, T, size]."""
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    return liger_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)


def rotate_patches(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated [patches, heads, size] queries and keys, computed in float32; cos and sin [patches, size]."""
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    heads_first = (states.transpose(0, 1).unsqueeze(0) for states in (q, k))
    rotated = liger_rotary_pos_emb(*heads_first, cos.float(), sin.float())
    return rotated[0][0].transpose(0, 1), rotated[1][0].transpose(0, 1)


def align_products(tower: nn.Module, silu_times: Callable[[Tensor, Tensor], Any]) -> int:
    """Pads the products of the tower's gated layers whose width is not aligned, in place; the number of such layers.

    Args:
        silu_times: silu of the first argument, times the second.
    """
    layers = [m for m in tower.modules() if type(getattr(m, "gate_proj", None)) is nn.Linear]
    unaligned = [layer for layer in layers if layer.gate_proj.out_features % 8]  # type: ignore[union-attr, operator]
    for layer in unaligned:
        own_forward = layer.forward

        def forward(self: Any, states: Tensor, own_forward: Callable[[Tensor], Tensor] = own_forward) -> Tensor:
            if type(self.gate_proj) is not nn.Linear:  # adapters have come between
                return own_forward(states)
            return padded_mlp(self, states, silu_times)

        layer.forward = MethodType(forward, layer)
    return len(unaligned)


def aligned(width: int) -> int:
    """The width that products to `width` have where this module pads them."""
    return width + (-width % ALIGNMENT if width % 8 else 0)


def padded_mlp(layer: Any, states: Tensor, silu_times: Callable[[Tensor, Tensor], Any]) -> Tensor:
    """down(silu(gate(x)) * up(x)) at the next aligned width; the columns of zeros change no sum."""
    missing = aligned(layer.gate_proj.out_features) - layer.gate_proj.out_features

    def widened(projection: nn.Linear) -> Tensor:
        bias = None if projection.bias is None else pad(projection.bias, (0, missing))
        return linear(states, pad(projection.weight, (0, 0, 0, missing)), bias)

    product = silu_times(widened(layer.gate_proj), widened(layer.up_proj))
    return linear(product, pad(layer.down_proj.weight, (0, missing)), layer.down_proj.bias)

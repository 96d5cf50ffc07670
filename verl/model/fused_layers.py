"""Faster layers for a model on a GPU, equal to its own up to rounding: Liger's fused RMSNorm, SwiGLU and RoPE kernels,
and the patch embedding as a product.
"""

import sys
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear, pad
from transformers import PreTrainedModel

from verl.model.families import vision_encoder
from verl.model.internals import is_usable

ALIGNMENT = 64
"""Multiple to which matmul widths are padded: bf16 matmuls are slow at widths that 8 does not divide."""


def fuse_layers(model: PreTrainedModel) -> bool:
    """Puts Liger's RMSNorm, SwiGLU and RoPE kernels into the model, in place; returns False if it cannot.

    Unaligned widths in the vision encoder (3,420 in Qwen2.5-VL) are padded. The RoPE kernels replace functions of the
    model's module, and so apply to every model of its class in this process.
    """
    if not is_usable("fused layers"):
        return False
    from liger_kernel.ops import LigerSiLUMulFunction
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    fuse = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model.config.model_type)
    if fuse is None:
        return False
    # Liger's RoPE may split M-RoPE positions that arrive combined; log-probs have their own kernels.
    fuse(model=model, rope=False, cross_entropy=False, fused_linear_cross_entropy=False, rms_norm=True, swiglu=True)
    module = sys.modules[type(model).__module__]
    functions = {"apply_rotary_pos_emb_vision": apply_vision_rope}
    if not rotates_in_part(model):
        functions["apply_rotary_pos_emb"] = apply_rope
    for name, rope in functions.items():
        if hasattr(module, name):
            setattr(module, name, rope)
    if (encoder := vision_encoder(model)) is not None:
        pad_mlp_widths(encoder, LigerSiLUMulFunction.apply)
    return True


def embed_by_products(model: PreTrainedModel) -> int:
    """Computes the patch embedding of the vision encoder as a matrix product, in place; returns the number of layers.

    It is a convolution whose kernel is one patch, for which cuDNN has no fast algorithm at some numbers of patches.
    """
    encoder = vision_encoder(model)
    layers = [] if encoder is None else [layer for layer in encoder.modules() if _is_one_patch(layer)]
    for layer in layers:
        layer.forward = MethodType(_embed_patches, layer)
    return len(layers)


def _is_one_patch(layer: nn.Module) -> bool:
    """True for a convolution that could be given patches of its kernel's size."""
    if type(layer) not in (nn.Conv2d, nn.Conv3d):
        return False
    return layer.stride == layer.kernel_size and not any(layer.padding) and layer.groups == 1  # type: ignore[arg-type]


def _embed_patches(self: Any, patches: Tensor) -> Tensor:
    """Embeddings [patches, width, 1, ...] of patches [patches, channels, ...], each as large as the kernel."""
    if patches.shape[2:] != self.kernel_size:
        return type(self).forward(self, patches)
    embedded = linear(patches.flatten(1), self.weight.flatten(1), self.bias)
    return embedded.reshape(*embedded.shape, *(1 for _ in self.kernel_size))


def rotates_in_part(model: PreTrainedModel) -> bool:
    """True if RoPE leaves a part of each head as it is, as in Qwen3.5; Liger's kernel rotates heads as wholes."""
    return (getattr(model.config.get_text_config(), "rope_parameters", None) or {}).get(
        "partial_rotary_factor", 1.0
    ) < 1


def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Queries and keys [1, heads, T, size] after RoPE; cos and sin [1, T, size].

    By Liger's own kernel: what Liger would choose in passes with gradients, where nvidia-cutlass-dsl is installed, is
    compiled anew for every T (2.3 s a pass on an H200).
    """
    from liger_kernel.ops.rope import LigerRopeFunction

    return LigerRopeFunction.apply(q, k, cos, sin, None, unsqueeze_dim)  # type: ignore[return-value]


def apply_vision_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys [patches, heads, size] after RoPE in float32; cos and sin [patches, size]."""
    of_q, of_k = (states.transpose(0, 1).unsqueeze(0) for states in (q, k))
    rotated = apply_rope(of_q, of_k, cos.float(), sin.float())
    return rotated[0][0].transpose(0, 1), rotated[1][0].transpose(0, 1)


def pad_mlp_widths(encoder: nn.Module, silu_mul: Callable[[Tensor, Tensor], Any]) -> int:
    """Pads the gated MLPs of the vision encoder whose width is not aligned, in place; returns their number.

    Args:
        silu_mul: silu(first argument) * second.
    """
    layers = [m for m in encoder.modules() if type(getattr(m, "gate_proj", None)) is nn.Linear]
    unaligned = [layer for layer in layers if layer.gate_proj.out_features % 8]  # type: ignore[union-attr, operator]
    for layer in unaligned:
        own_forward = layer.forward

        def forward(self: Any, states: Tensor, own_forward: Callable[[Tensor], Tensor] = own_forward) -> Tensor:
            if type(self.gate_proj) is not nn.Linear:  # LoRA wraps the projections
                return own_forward(states)
            return padded_mlp(self, states, silu_mul)

        layer.forward = MethodType(forward, layer)
    return len(unaligned)


def aligned_width(width: int) -> int:
    """The matmul width after padding by this module."""
    return width + (-width % ALIGNMENT if width % 8 else 0)


def padded_mlp(layer: Any, states: Tensor, silu_mul: Callable[[Tensor, Tensor], Any]) -> Tensor:
    """down(silu(gate(x)) * up(x)) at the next aligned width; zero padding leaves the result unchanged."""
    missing = aligned_width(layer.gate_proj.out_features) - layer.gate_proj.out_features

    def widened(projection: nn.Linear) -> Tensor:
        bias = None if projection.bias is None else pad(projection.bias, (0, missing))
        return linear(states, pad(projection.weight, (0, 0, 0, missing)), bias)

    product = silu_mul(widened(layer.gate_proj), widened(layer.up_proj))
    return linear(product, pad(layer.down_proj.weight, (0, missing)), layer.down_proj.bias)

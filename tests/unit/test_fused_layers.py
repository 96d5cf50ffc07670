"""Fused layers: what can be checked without a GPU. Their kernels are checked in tests/gpu."""

import sys
from types import ModuleType

import pytest
import torch
from torch.nn.functional import silu
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLMLP,
    apply_rotary_pos_emb_vision,
    rotate_half,
)

from tests.support.tiny_qwen import tiny_model
from verl.model.families import vision_encoder
from verl.model.fused_layers import apply_rope, apply_vision_rope, embed_by_products, pad_mlp_widths, rotates_in_part


def gradients(layer, states):
    out = layer(states)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [states, *layer.parameters()])]


def make_layer(width):
    torch.manual_seed(0)
    config = Qwen2_5_VLVisionConfig(hidden_size=16, intermediate_size=width, hidden_act="silu")
    return Qwen2_5_VLMLP(config, bias=True).double()


def test_padded_products_change_neither_value_nor_gradient():
    layer, states = make_layer(20), torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    wanted = gradients(layer, states)
    assert pad_mlp_widths(torch.nn.ModuleList([layer]), lambda gate, up: silu(gate) * up) == 1
    for got, expected in zip(gradients(layer, states), wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_aligned_products_are_left_alone():
    assert pad_mlp_widths(torch.nn.ModuleList([make_layer(24)]), lambda gate, up: silu(gate) * up) == 0


def test_adapters_put_in_later_are_heard():
    layer, states = make_layer(20), torch.randn(5, 16, dtype=torch.float64)
    pad_mlp_widths(torch.nn.ModuleList([layer]), lambda gate, up: silu(gate) * up)
    before = layer(states)

    class Doubled(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return 2 * self.base(x)

    layer.gate_proj = Doubled(layer.gate_proj)
    assert not torch.allclose(layer(states), before)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_patches_are_embedded_by_a_product_as_by_the_convolution(family):
    model = tiny_model(family=family).double()
    embedding = vision_encoder(model).patch_embed
    patches = torch.randn(12, embedding.proj.weight[0].numel(), dtype=torch.float64, requires_grad=True)
    wanted = gradients(embedding, patches)
    calls = []
    embedding.proj.register_forward_hook(lambda _, arguments, out: calls.append((*arguments, out)))
    assert embed_by_products(model) == 1
    for got, expected in zip(gradients(embedding, patches), wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    ((shown, out),) = calls
    assert out.grad_fn.name().startswith(("View", "Reshape", "UnsafeView")) and out.shape[2:] == (1, 1, 1)
    larger = torch.cat([shown, shown], dim=-1)
    assert embedding.proj(larger).shape[-1] == 2  # a convolution, where the kernel is not all of the input


def test_a_model_without_pictures_has_no_patch_embedding():
    assert embed_by_products(tiny_model(family="qwen2")) == 0


def test_rope_of_a_part_of_each_head_is_not_left_to_a_kernel_of_whole_heads():
    assert rotates_in_part(tiny_model(family="qwen3_5")) and rotates_in_part(tiny_model(family="qwen3_5_moe_text"))
    assert not rotates_in_part(tiny_model(family="qwen3_vl")) and not rotates_in_part(tiny_model(family="qwen2"))


class Rope(torch.autograd.Function):
    """As Liger's, over heads first."""

    @staticmethod
    def forward(ctx, q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
        assert position_ids is None
        cos, sin = (part.expand(1, -1, -1).unsqueeze(unsqueeze_dim) for part in (cos, sin))
        ctx.save_for_backward(cos, sin)
        return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin

    @staticmethod
    def backward(ctx, *grads):
        cos, sin = ctx.saved_tensors
        return *(grad * cos - rotate_half(grad) * sin for grad in grads), None, None, None, None


def test_rope_is_ligers_own_kernel_whatever_else_is_installed(monkeypatch):
    """Its choice among kernels, in liger_kernel.transformers, takes one that is compiled for every length."""
    rope = ModuleType("liger_kernel.ops.rope")
    rope.LigerRopeFunction = Rope  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", ModuleType("liger_kernel.ops"))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.rope", rope)
    angles = torch.randn(7, 4).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    q, k = torch.randn(7, 3, 8, requires_grad=True), torch.randn(7, 2, 8, requires_grad=True)
    wanted = apply_rotary_pos_emb_vision(q, k, cos, sin)
    of_vision = apply_vision_rope(q, k, cos, sin)
    of_text = [
        states[0].transpose(0, 1)
        for states in apply_rope(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None])
    ]
    for got in (of_vision, of_text):
        torch.testing.assert_close(tuple(got), wanted)
        upstream = [torch.randn_like(part) for part in wanted]
        grads = [torch.autograd.grad(parts, (q, k), upstream, retain_graph=True) for parts in (got, wanted)]
        torch.testing.assert_close(*grads)

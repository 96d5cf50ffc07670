"""FSDP: parameters that are gathered whole, and the norm of gradients."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.support.tiny_qwen import FAMILIES, VISION_FAMILIES, tiny_model
from verl.distributed import fsdp
from verl.distributed.fsdp import clip_grad_norm
from verl.model.qwen_vl import ResponseLogProbs


def model_with_gradients(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 300), nn.Linear(300, 2)).to(dtype)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
    return model


def norm_of(model):
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None))


def test_the_norm_of_bf16_gradients_is_a_float32_one():
    model = model_with_gradients()
    expected = norm_of(model)
    assert clip_grad_norm(model, 1e9) == pytest.approx(expected, rel=1e-5)
    assert norm_of(model) == expected


def test_large_gradients_are_scaled_down():
    model = model_with_gradients()
    before = [p.grad.clone() for p in model.parameters()]
    norm = clip_grad_norm(model, 3.0)
    assert norm_of(model) == pytest.approx(3.0, rel=1e-3)
    for gradient, parameter in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient * (3.0 / norm), rtol=2**-7, atol=0)


def test_parameters_without_gradients_have_no_part():
    model = model_with_gradients(torch.float32)
    model[0].weight.grad = None
    assert clip_grad_norm(model, 1.0) == pytest.approx(math.sqrt(300 + 600 + 2), rel=0.1)
    assert clip_grad_norm(nn.Linear(2, 2), 1.0) == 0.0


def test_a_gradient_that_is_not_finite_shows():
    model = model_with_gradients()
    model[1].bias.grad[0] = math.inf
    assert not math.isfinite(clip_grad_norm(model, 1.0))


@pytest.mark.parametrize("family", FAMILIES)
def test_units_are_the_layers_of_the_decoder_and_the_tower_as_one(family, monkeypatch):
    model = tiny_model(family=family)
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    unsplittable = [module for module in model.modules() if type(module).__name__ in names]
    tower = [model.model.visual] if family in VISION_FAMILIES else []
    layers = [module for module in unsplittable if not any(module in part.modules() for part in tower)]
    sharded = []
    monkeypatch.setattr(fsdp, "fully_shard", lambda module, **_: sharded.append(module))
    scorer = ResponseLogProbs(model)
    fsdp.shard(scorer, SimpleNamespace(device_type="cpu", size=lambda: 2), torch.bfloat16, torch.float32)
    assert layers
    assert sharded == [*tower, *layers, scorer]


@pytest.mark.parametrize(
    ("device", "num_ranks", "dtype", "choices", "is_sharded"),
    [
        ("cuda", 1, torch.float32, {}, False),
        ("cuda", 2, torch.float32, {}, True),
        ("cuda", 1, torch.bfloat16, {}, True),
        ("cuda", 1, torch.float32, {"cpu_offload": True}, True),
        ("cuda", 1, torch.float32, {"is_moved": True}, True),
        ("cpu", 1, torch.float32, {}, True),
    ],
    ids=["alone", "two ranks", "stored in float32", "always in host memory", "between passes", "without a GPU"],
)
def test_a_model_stays_whole_on_a_single_gpu_that_computes_with_what_it_stores(
    monkeypatch, device, num_ranks, dtype, choices, is_sharded
):
    sharded = []
    monkeypatch.setattr(fsdp, "fully_shard", lambda module, **_: sharded.append(module))
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_: tensor)
    fsdp.shard(
        ResponseLogProbs(tiny_model()),
        SimpleNamespace(device_type=device, size=lambda: num_ranks),
        dtype,
        torch.float32,
        **choices,
    )
    assert bool(sharded) == is_sharded

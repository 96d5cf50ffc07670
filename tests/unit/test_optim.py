"""adamw_bf16 against AdamW in float32 and float64, over many steps, and over ranks."""

from types import SimpleNamespace

import pytest
import torch

from tests.support.optimizers import gradients, layer_and_optimizer, weights_of
from tests.support.ranks import run_ranks
from verl.config.records import OptimConfig
from verl.distributed.optim import (
    OPTIMIZERS,
    STRIDES,
    KahanAdamW,
    _add_rounded,
    _round_to_bf16,
    _thresholds,
    allocate_states,
    build_optimizer,
    join_bits,
    state_tensors,
)

AdamW = torch.optim.AdamW


def train(kind, dtype, given, scale=0.02, device="cpu", **settings):
    """Movement of weights from a bfloat16 start, and the optimizer's state."""
    start = scale * torch.randn(given[0].shape, generator=torch.Generator().manual_seed(0))
    start = start.bfloat16()
    weight = torch.nn.Parameter(start.to(device, dtype, copy=True))
    optimizer = kind([weight], **settings)
    for gradient in given:
        weight.grad = gradient.to(device, dtype)
        optimizer.step()
    return weights_of(optimizer, weight).cpu().double() - start.double(), optimizer.state[weight]


def apart(actual, expected):
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("tails", ["gauss", "drift", "student", "cauchy"])
@pytest.mark.parametrize("settings", [{"lr": 1e-6, "weight_decay": 1e-2}, {"lr": 1e-5, "weight_decay": 0.1}])
def test_bf16_moves_as_float32_does(tails, settings):
    given = list(gradients(tails))
    moved, _ = train(KahanAdamW, torch.bfloat16, given, **settings)
    expected, _ = train(AdamW, torch.float32, given, **settings)
    assert apart(moved, expected) < 0.02
    assert float(moved.norm() / expected.norm()) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("gradient", [0.0, 1e-3])
def test_weight_decay_is_not_lost(gradient):
    """The defaults take 3e-5 of a weight in 3,000 steps, 1e-8 at a time: bfloat16 holds 4e-3, float32 6e-8."""
    given = [torch.full((512,), gradient).bfloat16()] * 3000
    settings = {"lr": 1e-6, "scale": 1.0}
    decayed, plain = (train(KahanAdamW, torch.bfloat16, given, weight_decay=d, **settings)[0] for d in (1e-2, 0.0))
    exact, without = (train(AdamW, torch.float64, given, weight_decay=d, **settings)[0] for d in (1e-2, 0.0))
    assert float((decayed - plain).norm()) == pytest.approx(float((exact - without).norm()), rel=0.2)
    signs = torch.nn.functional.cosine_similarity(decayed - plain, exact - without, dim=0)
    assert signs > 0.9


@pytest.mark.parametrize(("spike", "gradient"), [(100.0, 1.0), (1e-2, 1e-4), (3.0, 0.0)])
def test_the_second_moment_decays_after_a_spike(spike, gradient):
    given = [torch.full((512,), value).bfloat16() for value in [spike, *[gradient] * 3000]]
    _, state = train(KahanAdamW, torch.bfloat16, given, lr=1e-6)
    _, exact = train(AdamW, torch.float64, given, lr=1e-6)
    ratio = state["exp_avg_sq"].double() / exact["exp_avg_sq"]
    assert float(ratio.mean()) == pytest.approx(1, abs=0.01)
    assert float((ratio - 1).abs().max()) < 0.15


def test_the_first_moment_reaches_a_constant_gradient():
    given = [torch.full((512,), 1.7).bfloat16()] * 200
    _, state = train(KahanAdamW, torch.bfloat16, given, lr=1e-6)
    assert float(state["exp_avg"].double().mean()) == pytest.approx(float(given[0][0]), rel=2e-3)


def test_parameters_count_their_own_steps():
    """One without a gradient in every other step moves as one that was alone."""
    given = list(gradients("drift", 40))
    pair = [torch.nn.Parameter(torch.ones(512).bfloat16()) for _ in range(2)]
    single = torch.nn.Parameter(torch.ones(512).bfloat16())
    together, alone = KahanAdamW(pair, lr=1e-3), KahanAdamW([single], lr=1e-3)
    for step, gradient in enumerate(given):
        pair[1].grad = gradient
        pair[0].grad = single.grad = gradient if step % 2 else None
        together.step()
        alone.step()
    assert [int(together.state[p]["step"]) for p in pair] == [20, 40]
    assert torch.equal(weights_of(together, pair[0]), weights_of(alone, single))
    assert not torch.equal(pair[0], pair[1])


@pytest.mark.parametrize("strategy", OPTIMIZERS)
def test_in_float32_both_are_adamw(strategy):
    layer = torch.nn.Linear(4, 3)
    optimizer = build_optimizer(layer, OptimConfig(strategy=strategy))
    assert type(optimizer) is AdamW and optimizer.param_groups[0]["weight_decay"] == 1e-2
    half = build_optimizer(layer.bfloat16(), OptimConfig(strategy=strategy))
    assert type(half) is OPTIMIZERS[strategy]


@pytest.mark.parametrize("strategy", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_made_beforehand_change_no_step(strategy, dtype):
    def train(is_beforehand):
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 3, dtype=dtype)
        optimizer = build_optimizer(layer, OptimConfig(strategy=strategy, lr=0.1, weight_decay=0.1))
        if is_beforehand:
            start = [p.detach().clone() for p in layer.parameters()]
            allocate_states(optimizer)
            assert all(map(torch.equal, layer.parameters(), start))
            assert all(p.grad is None and len(optimizer.state[p]) > 1 for p in layer.parameters())
        for _ in range(3):
            layer(torch.randn(5, 4, dtype=dtype)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in layer.parameters()]

    assert all(map(torch.equal, train(True), train(False)))


def weights_of_a_rank(mesh, rank, num_ranks):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 5, dtype=torch.bfloat16)  # 5 rows: the last rank of 2 has fewer
    if mesh is not None:
        fully_shard(layer, mesh=mesh)
    optimizer = KahanAdamW(layer.parameters(), lr=1e-3)
    for pair in zip(gradients("gauss", 30, (5, 6)), gradients("gauss", 30, (5,)), strict=True):
        for p, gradient in zip(layer.parameters(), pair, strict=True):
            p.grad = torch.distributed.tensor.distribute_tensor(gradient, mesh, p.placements) if mesh else gradient
        optimizer.step()
    whole = SimpleNamespace(full=lambda t: t.full_tensor() if mesh else t)
    return [join_bits(whole.full(p.data), whole.full(optimizer.state[p]["low_bits"])) for p in layer.parameters()]


@pytest.mark.integration
@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.nightly)])
def test_ranks_round_as_one_does(tmp_path, num_ranks):
    together = run_ranks(weights_of_a_rank, num_ranks, tmp_path)
    assert all(map(torch.equal, together[0], weights_of_a_rank(None, 0, 1)))


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_few_large_steps_are_those_of_adamw(num_steps):
    """Large rates and decay, so that each term of the formula shows."""
    given = [1e4 * gradient for gradient in gradients("gauss", num_steps)]
    settings = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.5, "weight_decay": 0.3, "scale": 1.0}
    moved, _ = train(KahanAdamW, torch.bfloat16, given, **settings)
    expected, _ = train(AdamW, torch.float64, given, **settings)
    assert apart(moved, expected) < 5e-3


def test_the_defaults_are_those_of_adamw():
    weight = torch.nn.Parameter(torch.ones(1).bfloat16())
    ours, theirs = (kind([weight], lr=1e-3).param_groups[0] for kind in (KahanAdamW, AdamW))
    assert all(ours[key] == theirs[key] for key in ("lr", "betas", "eps", "weight_decay"))


def test_states_to_move_are_all_but_the_step():
    layer, optimizer = layer_and_optimizer()
    wanted = [optimizer.state[p][key] for p in layer.parameters() for key in ("exp_avg", "exp_avg_sq", "low_bits")]
    assert {id(t) for t in state_tensors(optimizer)} == {id(t) for t in wanted}


def test_thresholds_are_even_and_of_the_element_alone():
    whole, part = _thresholds(0, torch.Size([4096, 2]), 7), _thresholds(2048, torch.Size([3072, 2]), 7)
    for one, other in zip(whole, part, strict=True):
        assert torch.equal(one[1024:], other)
        assert one.min() >= 0 and one.max() < 2**32
        counts = torch.histc(one.double(), bins=16, min=0, max=2**32)
        assert float((counts / 512 - 1).abs().max()) < 0.2


def test_rounding_goes_up_as_often_as_the_rest_is_large():
    value = torch.full((4096,), 1 + 2**-9)  # a quarter of bfloat16's step of 2^-7
    thresholds = torch.arange(4096) << 20
    rounded = _round_to_bf16(value, thresholds)
    assert set(rounded.tolist()) == {1.0, 1 + 2**-7} and float((rounded > 1).float().mean()) == pytest.approx(0.25)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("change", [2**-26, -(2**-26), 3 * 2**-26])
def test_small_changes_are_kept_on_average(sign, change):
    w, thresholds = torch.full((4096,), 1.5 * sign), torch.arange(4096) << 20
    moved = _add_rounded(w, torch.full((4096,), change), thresholds).double() - w.double()
    assert float(moved.mean()) == pytest.approx(change, rel=1e-2)


@pytest.mark.parametrize("w", [2**-26, 0.75])
def test_what_a_sum_cuts_off_is_kept_on_average(w):
    change, thresholds = 1.5 if w < 0.5 else 2**-27, torch.arange(4096) << 20
    moved = _add_rounded(torch.full((4096,), w), torch.full((4096,), change), thresholds).double() - max(w, change)
    assert float(moved.mean()) == pytest.approx(min(w, change), rel=1e-2)


def test_thresholds_by_whole_numbers():
    for number, stride in enumerate(STRIDES):
        h = 3 * 0x9E3779B1 % 2**32
        expected = ((h ^ (h >> 15)) * 0x85EBCA77 + 7 * stride) % 2**32
        assert int(_thresholds(0, torch.Size([4]), 7)[number][3]) == expected

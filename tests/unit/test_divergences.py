"""Divergences by hand-worked numbers, by expectation and by limits; the adaptive weight by hand."""

import math
import typing

import pytest
import torch

from verl.algos.divergences import (
    FULL_KL,
    KL_ESTIMATORS,
    MAX_CHI2,
    MAX_LOW_VAR_KL,
    adapt_kl_coef,
    clamp_log_ratio,
    compute_full_kl,
    compute_kl,
)
from verl.config.records import AlgorithmConfig

P = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
Q = torch.tensor([0.4, 0.2, 0.3, 0.1], dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("kl", math.log(2)),
        ("abs", math.log(2)),
        ("mse", math.log(2) ** 2 / 2),
        ("low_var_kl", math.log(2) - 0.5),
        ("chi2", 0.25),
    ],
)
def test_by_hand_with_twice_the_reference_probability(kind, value):
    result = compute_kl(torch.tensor(math.log(0.5)), torch.tensor(math.log(0.25)), kind)
    assert result.item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("kind", KL_ESTIMATORS)
def test_equal_policies_give_zero(kind):
    log_probs = torch.log(torch.tensor([0.1, 0.5, 0.9]))
    assert compute_kl(log_probs, log_probs, kind).tolist() == [0.0, 0.0, 0.0]


def test_expectations_over_the_whole_vocabulary_are_the_divergences():
    divergence = (P * (P / Q).log()).sum().item()
    chi2 = ((Q - P) ** 2 / P).sum().item()
    for kind, expected in (("kl", divergence), ("low_var_kl", divergence), ("chi2", chi2)):
        assert (P * compute_kl(P.log(), Q.log(), kind)).sum().item() == pytest.approx(expected, rel=1e-5)


def test_the_low_variance_estimate_is_never_negative_and_exact_for_tiny_differences():
    difference = torch.linspace(-5, 5, 1001)
    assert (compute_kl(difference, torch.zeros(1001), "low_var_kl") >= 0).all()
    tiny = compute_kl(torch.tensor(1e-3, dtype=torch.float64), torch.tensor(0.0), "low_var_kl").item()
    assert tiny == pytest.approx(1e-6 / 2, rel=1e-2)


@pytest.mark.parametrize("kind", KL_ESTIMATORS)
@pytest.mark.parametrize("log_prob", [-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4])
def test_extreme_differences_keep_value_and_gradient_finite(kind, log_prob):
    log_probs = torch.tensor([log_prob], requires_grad=True)
    value = compute_kl(log_probs, torch.zeros(1), kind)
    value.sum().backward()
    assert log_probs.grad is not None
    assert value.isfinite().all() and log_probs.grad.isfinite().all()
    if kind in ("low_var_kl", "chi2"):
        assert value.item() <= {"low_var_kl": MAX_LOW_VAR_KL, "chi2": MAX_CHI2}[kind]


def test_half_precision_is_computed_in_float32():
    assert compute_kl(torch.zeros(2, dtype=torch.bfloat16), torch.ones(2), "kl").dtype == torch.float32


def test_the_full_divergence_by_hand_and_its_gradient():
    # p = (1/2, 1/2), q = (1/4, 3/4): (ln 2 + ln 2/3) / 2 = ln(4/3) / 2. With logits a, -a the gradient at a = 0 is
    # the sum over v of dp(v) log(p(v) / q(v)), dp = (1/2, -1/2): (ln 2 - ln 2/3) / 2 = ln(3) / 2.
    logit = torch.zeros(1, requires_grad=True)
    log_probs = torch.cat([logit, -logit]).log_softmax(-1).unsqueeze(0)
    divergence = compute_full_kl(log_probs, torch.tensor([[0.25, 0.75]]).log())
    divergence.sum().backward()
    assert divergence.item() == pytest.approx(math.log(4 / 3) / 2)
    assert logit.grad is not None and logit.grad.item() == pytest.approx(math.log(3) / 2)


def test_log_ratios_are_clamped_on_both_sides():
    assert clamp_log_ratio(torch.tensor([-21.0, -20.0, 0.5, 20.0, 21.0])).tolist() == [-20.0, -20.0, 0.5, 20.0, 20.0]


def test_the_full_divergence_is_one_number_per_token():
    log_probs, reference = torch.stack([P, Q, P]).log(), torch.stack([Q, Q, P]).log()
    expected = [(P * (P / Q).log()).sum().item(), 0.0, 0.0]
    assert compute_full_kl(log_probs, reference).tolist() == pytest.approx(expected)


def test_the_full_divergence_is_what_the_estimates_expect():
    expected = (P * compute_kl(P.log(), Q.log(), "kl")).sum().item()
    assert compute_full_kl(P.log().unsqueeze(0), Q.log().unsqueeze(0)).item() == pytest.approx(expected)


def test_the_names_are_those_of_the_configuration():
    assert typing.get_args(typing.get_type_hints(AlgorithmConfig)["kl_penalty"]) == (*KL_ESTIMATORS, FULL_KL)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (0.1, 0.01),  # on target: stays
        (0.11, 0.01 * (1 + 0.1 * 64 / 1000)),  # a tenth above
        (5.0, 0.01 * (1 + 0.2 * 64 / 1000)),  # far above: bounded
        (0.0, 0.01 * (1 - 0.2 * 64 / 1000)),  # far below: bounded
        (math.nan, 0.01),  # not measured: stays
    ],
)
def test_the_adaptive_weight_by_hand(kl, expected):
    assert adapt_kl_coef(0.01, kl, target=0.1, horizon=1000, num_responses=64) == pytest.approx(expected)


def test_the_adaptive_weight_grows_by_about_a_fifth_over_its_horizon():
    coef = 1.0
    for _ in range(100):
        coef = adapt_kl_coef(coef, 9.0, target=0.1, horizon=1000, num_responses=10)
    assert coef == pytest.approx(math.exp(0.2), rel=1e-3)

"""The mathematics by hand-worked numbers, by invariance and by limits."""

import math
import typing

import pytest
import torch

from verl.config import AlgorithmConfig
from verl.core_algos import (
    KL_ESTIMATORS,
    MAX_CHI2,
    MAX_LOW_VAR_KL,
    compute_grpo_advantages,
    compute_kl,
    compute_policy_loss,
    masked_mean,
)

CLIP = {"clip_low": 0.2, "clip_high": 0.3, "clip_dual": 3.0}


def loss_of(ratio: float, advantage: float) -> tuple[float, float, dict[str, float]]:
    """Loss, its gradient with respect to the log-prob, and the indicators, of one token."""
    log_probs = torch.tensor([-1.0 + math.log(ratio)], dtype=torch.float64, requires_grad=True)
    loss, indicators = compute_policy_loss(log_probs, torch.tensor([-1.0]), torch.tensor([advantage]), **CLIP)
    loss.sum().backward()
    assert log_probs.grad is not None
    return loss.item(), log_probs.grad.item(), {name: value.item() for name, value in indicators.items()}


class TestAdvantages:
    def test_by_hand(self):
        # Mean 2, deviations -1 0 1, variance (1 + 0 + 1) / 2 = 1; then mean 0.5, variance (4 * 0.25) / 3.
        assert compute_grpo_advantages(torch.tensor([[1.0, 2.0, 3.0]]), eps=0.0).tolist() == [[-1.0, 0.0, 1.0]]
        four = compute_grpo_advantages(torch.tensor([[0.0, 1.0, 1.0, 0.0]]), eps=0.0)
        assert four.tolist()[0] == pytest.approx(
            [-math.sqrt(0.75), math.sqrt(0.75)] * 1 + [math.sqrt(0.75)] + [-math.sqrt(0.75)]
        )

    def test_eps_is_added_to_the_deviation(self):
        assert compute_grpo_advantages(torch.tensor([[1.0, 2.0, 3.0]]), eps=1.0).tolist() == [[-0.5, 0.0, 0.5]]

    @pytest.mark.parametrize("score", [0.0, 0.1, 1 / 3, 0.7, 1e6 + 0.1])
    @pytest.mark.parametrize("n", [2, 3, 7, 8])
    def test_a_flat_group_is_exactly_zero(self, score, n):
        assert compute_grpo_advantages(torch.full((2, n), score)).tolist() == [[0.0] * n] * 2

    def test_groups_do_not_see_each_other_and_order_does_not_matter(self):
        scores = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
        together = compute_grpo_advantages(scores)
        alone = torch.cat([compute_grpo_advantages(group) for group in scores.split(1)])
        order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
        assert torch.equal(together, alone)
        torch.testing.assert_close(compute_grpo_advantages(scores[:, order]), together[:, order])

    def test_shift_and_scale_of_the_reward_change_nothing(self):
        scores = torch.rand(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        expected = compute_grpo_advantages(scores, eps=0.0)
        torch.testing.assert_close(compute_grpo_advantages(3.0 * scores - 7.0, eps=0.0), expected)
        torch.testing.assert_close(expected.sum(dim=-1), torch.zeros(5, dtype=torch.float64))

    def test_a_group_of_one_names_the_knob(self):
        with pytest.raises(ValueError, match="got a group of 1; raise worker.rollout.n"):
            compute_grpo_advantages(torch.ones(4, 1))


class TestKL:
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
    def test_by_hand_with_twice_the_reference_probability(self, kind, value):
        result = compute_kl(torch.tensor(math.log(0.5)), torch.tensor(math.log(0.25)), kind)
        assert result.item() == pytest.approx(value, rel=1e-6)

    @pytest.mark.parametrize("kind", KL_ESTIMATORS)
    def test_equal_policies_give_zero(self, kind):
        log_probs = torch.log(torch.tensor([0.1, 0.5, 0.9]))
        assert compute_kl(log_probs, log_probs, kind).tolist() == [0.0, 0.0, 0.0]

    def test_expectations_over_the_whole_vocabulary_are_the_divergences(self):
        p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
        q = torch.tensor([0.4, 0.2, 0.3, 0.1], dtype=torch.float64)
        divergence = (p * (p / q).log()).sum().item()
        chi2 = ((q - p) ** 2 / p).sum().item()
        for kind, expected in (("kl", divergence), ("low_var_kl", divergence), ("chi2", chi2)):
            assert (p * compute_kl(p.log(), q.log(), kind)).sum().item() == pytest.approx(expected, rel=1e-5)

    def test_the_low_variance_estimate_is_never_negative_and_exact_for_tiny_differences(self):
        difference = torch.linspace(-5, 5, 1001)
        assert (compute_kl(difference, torch.zeros(1001), "low_var_kl") >= 0).all()
        tiny = compute_kl(torch.tensor(1e-3, dtype=torch.float64), torch.tensor(0.0), "low_var_kl").item()
        assert tiny == pytest.approx(1e-6 / 2, rel=1e-2)

    @pytest.mark.parametrize("kind", KL_ESTIMATORS)
    @pytest.mark.parametrize("log_prob", [-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4])
    def test_extreme_differences_keep_value_and_gradient_finite(self, kind, log_prob):
        log_probs = torch.tensor([log_prob], requires_grad=True)
        value = compute_kl(log_probs, torch.zeros(1), kind)
        value.sum().backward()
        assert log_probs.grad is not None
        assert value.isfinite().all() and log_probs.grad.isfinite().all()
        if kind in ("low_var_kl", "chi2"):
            assert value.item() <= {"low_var_kl": MAX_LOW_VAR_KL, "chi2": MAX_CHI2}[kind]

    def test_half_precision_is_computed_in_float32(self):
        assert compute_kl(torch.zeros(2, dtype=torch.bfloat16), torch.ones(2), "kl").dtype == torch.float32

    def test_the_names_are_those_of_the_configuration(self):
        assert typing.get_args(typing.get_type_hints(AlgorithmConfig)["kl_penalty"]) == tuple(KL_ESTIMATORS)
        with pytest.raises(ValueError, match="algorithm.kl_penalty = 'full'"):
            compute_kl(torch.zeros(1), torch.zeros(1), "full")


class TestPolicyLoss:
    @pytest.mark.parametrize("advantage", [-2.0, 0.0, 1.5])
    def test_on_policy_the_loss_is_minus_the_advantage_and_so_is_its_gradient(self, advantage):
        loss, gradient, indicators = loss_of(1.0, advantage)
        assert (loss, gradient) == (-advantage, -advantage)
        assert list(indicators.values()) == [0.0, 0.0, 0.0]

    @pytest.mark.parametrize(
        ("ratio", "advantage", "loss", "gradient", "higher", "lower"),
        [
            (1.25, 2.0, -2.5, -2.5, 0, 0),  # inside the range
            (1.5, 2.0, -2.6, 0.0, 1, 0),  # better and already likelier: clamped at 1.3
            (0.5, 2.0, -1.0, -1.0, 0, 0),  # better and less likely: pulled back with its own ratio
            (0.5, -2.0, 1.6, 0.0, 1, 0),  # worse and already less likely: clamped at 0.8
            (1.5, -2.0, 3.0, 3.0, 0, 0),  # worse and likelier: pushed down with its own ratio
            (4.0, -2.0, 6.0, 0.0, 0, 1),  # worse and far likelier: bounded at 3
            (4.0, 2.0, -2.6, 0.0, 1, 0),  # the bound is for negative advantages only
        ],
    )
    def test_by_hand(self, ratio, advantage, loss, gradient, higher, lower):
        result = loss_of(ratio, advantage)
        assert result[:2] == (pytest.approx(loss), pytest.approx(gradient))
        assert result[2]["pg_clipfrac_higher"] == higher and result[2]["pg_clipfrac_lower"] == lower
        assert result[2]["ppo_kl"] == pytest.approx(-math.log(ratio))

    def test_infinitely_wide_clips_leave_the_plain_surrogate(self):
        ratio, advantages = torch.tensor([0.1, 0.9, 1.1, 5.0]), torch.tensor([1.0, -1.0, 2.0, -2.0])
        loss, indicators = compute_policy_loss(ratio.log(), torch.zeros(4), advantages, 1.0, 1e6, 1e6)
        torch.testing.assert_close(loss, -advantages * ratio)
        assert indicators["pg_clipfrac_higher"].sum() == 0 and indicators["pg_clipfrac_lower"].sum() == 0

    @pytest.mark.parametrize("advantage", [-1e3, -1.0, 0.0, 1.0, 1e3])
    @pytest.mark.parametrize("difference", [-1e4, -88.0, -20.0, 20.0, 88.0, 1e4])
    def test_extreme_ratios_keep_loss_and_gradient_finite(self, advantage, difference):
        log_probs = torch.tensor([difference], requires_grad=True)
        loss, _ = compute_policy_loss(log_probs, torch.zeros(1), torch.tensor([advantage]), **CLIP)
        loss.sum().backward()
        assert log_probs.grad is not None
        assert loss.isfinite().all() and log_probs.grad.isfinite().all()

    def test_it_is_elementwise_over_groups_and_over_packed_tokens(self):
        generator = torch.Generator().manual_seed(0)
        log_probs, old_log_probs = -torch.rand(2, 3, 4, 5, generator=generator)  # [G, n, R]
        advantages = torch.randn(3, 4, generator=generator)  # [G, n]
        grouped, _ = compute_policy_loss(log_probs, old_log_probs, advantages[..., None], **CLIP)
        spread = advantages[..., None].expand(3, 4, 5).flatten()
        packed, indicators = compute_policy_loss(log_probs.flatten(), old_log_probs.flatten(), spread, **CLIP)
        assert torch.equal(grouped.flatten(), packed)
        assert all(value.shape == packed.shape and not value.requires_grad for value in indicators.values())


class TestMaskedMean:
    def test_by_hand(self):
        values = torch.tensor([[1.0, 2.0], [3.0, 100.0]])
        assert masked_mean(values, torch.tensor([[1, 1], [1, 0]])).item() == 2.0

    def test_what_is_masked_may_be_anything(self):
        values = torch.tensor([1.0, float("nan"), float("inf")], requires_grad=True)
        mean = masked_mean(values, torch.tensor([1, 0, 0]))
        mean.backward()
        assert values.grad is not None
        assert mean.item() == 1.0 and values.grad.tolist() == [1.0, 0.0, 0.0]

    def test_an_empty_mask_gives_zero(self):
        assert masked_mean(torch.ones(3), torch.zeros(3)).item() == 0.0

"""Losses by hand-worked numbers, by their gradients, by invariance and by limits."""

import math
import typing

import pytest
import torch

from verl.algos.losses import (
    LOSS_AVG_MODES,
    POLICY_LOSSES,
    average_denominator,
    average_weights,
    compute_clipped_loss,
    compute_policy_loss,
    compute_rollout_weights,
    compute_value_loss,
    mean_per_response,
)
from verl.config.records import ActorConfig, CriticConfig

CLIP = {"clip_low": 0.2, "clip_high": 0.3, "clip_dual": 3.0}
TAU = {"tau_positive": 1.0, "tau_negative": 2.0}


def loss_of(ratio: float, advantage: float) -> tuple[float, float, dict[str, float]]:
    """Loss, its gradient with respect to the log-prob, and the indicators, of one token."""
    log_ratio = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    loss, indicators = compute_clipped_loss(log_ratio, torch.tensor([advantage]), **CLIP)
    loss.sum().backward()
    assert log_ratio.grad is not None
    return loss.item(), log_ratio.grad.item(), {name: value.item() for name, value in indicators.items()}


def policy_loss(loss_type: str, ratios: list[float], advantages: list[float], lengths: list[int], log_prob=-2.0):
    """Losses, the gradients of their sum by each log-prob, and the details, of packed tokens."""
    log_probs = torch.full((len(ratios),), log_prob, dtype=torch.float64, requires_grad=True)
    old = log_probs.detach() - torch.tensor(ratios, dtype=torch.float64).log()
    loss, details = compute_policy_loss(
        loss_type, log_probs, old, torch.tensor(advantages), torch.tensor(lengths), **CLIP, **TAU
    )
    (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
    return loss.tolist(), gradient.tolist(), details


class TestClipped:
    @pytest.mark.parametrize("advantage", [-2.0, 0.0, 1.5])
    def test_on_policy_the_loss_is_minus_the_advantage_and_so_is_its_gradient(self, advantage):
        loss, gradient, indicators = loss_of(1.0, advantage)
        assert (loss, gradient) == (-advantage, -advantage)
        assert list(indicators.values()) == [0.0, 0.0]

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
            (4.0, 0.5, -0.65, 0.0, 1, 0),  # small ones included
        ],
    )
    def test_by_hand(self, ratio, advantage, loss, gradient, higher, lower):
        result = loss_of(ratio, advantage)
        assert result[:2] == (pytest.approx(loss), pytest.approx(gradient))
        assert result[2]["pg_clipfrac_higher"] == higher and result[2]["pg_clipfrac_lower"] == lower

    def test_at_the_bound_itself_the_ratio_keeps_its_gradient(self):
        log_ratio = torch.zeros(1, requires_grad=True)
        loss, indicators = compute_clipped_loss(log_ratio, torch.tensor([-2.0]), 0.2, 0.3, 1.0)
        loss.sum().backward()
        assert log_ratio.grad is not None and loss.item() == log_ratio.grad.item() == 2.0
        assert indicators["pg_clipfrac_lower"].item() == 0

    def test_infinitely_wide_clips_leave_the_plain_surrogate(self):
        ratio, advantages = torch.tensor([0.1, 0.9, 1.1, 5.0]), torch.tensor([1.0, -1.0, 2.0, -2.0])
        loss, indicators = compute_clipped_loss(ratio.log(), advantages, 1.0, 1e6, 1e6)
        torch.testing.assert_close(loss, -advantages * ratio)
        assert indicators["pg_clipfrac_higher"].sum() == 0 and indicators["pg_clipfrac_lower"].sum() == 0

    @pytest.mark.parametrize("advantage", [-1e3, -1.0, 0.0, 1.0, 1e3])
    @pytest.mark.parametrize("difference", [-1e4, -88.0, -20.0, 20.0, 88.0, 1e4])
    def test_extreme_ratios_keep_loss_and_gradient_finite(self, advantage, difference):
        log_probs = torch.tensor([difference], requires_grad=True)
        loss, _ = compute_clipped_loss(log_probs, torch.tensor([advantage]), **CLIP)
        loss.sum().backward()
        assert log_probs.grad is not None
        assert loss.isfinite().all() and log_probs.grad.isfinite().all()


class TestByName:
    def test_the_names_are_those_of_the_configuration(self):
        hints = typing.get_type_hints(ActorConfig)
        assert typing.get_args(hints["loss_type"]) == tuple(POLICY_LOSSES)
        assert typing.get_args(hints["loss_avg_mode"]) == LOSS_AVG_MODES
        assert typing.get_args(typing.get_type_hints(CriticConfig)["loss_avg_mode"]) == LOSS_AVG_MODES

    @pytest.mark.parametrize("loss_type", POLICY_LOSSES)
    def test_on_policy_the_gradient_of_a_response_is_minus_its_advantage_per_token(self, loss_type):
        loss, gradient, details = policy_loss(loss_type, [1.0] * 5, [2.0] * 3 + [-1.0] * 2, [3, 2])
        assert gradient == pytest.approx([-2.0] * 3 + [1.0] * 2)
        assert details["ppo_kl"].tolist() == [0.0] * 5
        assert all(math.isfinite(value) for value in loss)

    @pytest.mark.parametrize("loss_type", POLICY_LOSSES)
    def test_responses_do_not_see_each_other_and_their_order_does_not_matter(self, loss_type):
        ratios, advantages = [1.5, 0.6, 1.1, 0.4, 1.3], [1.0, 1.0, 1.0, -2.0, -2.0]
        together = policy_loss(loss_type, ratios, advantages, [3, 2])
        alone = [
            policy_loss(loss_type, ratios[part], advantages[part], [n])
            for part, n in ((slice(3), 3), (slice(3, 5), 2))
        ]
        swapped = policy_loss(loss_type, ratios[3:] + ratios[:3], advantages[3:] + advantages[:3], [2, 3])
        for i in (0, 1):
            assert together[i] == pytest.approx(alone[0][i] + alone[1][i])
            assert swapped[i] == pytest.approx(together[i][3:] + together[i][:3])

    def test_default_is_the_clipped_loss_of_each_token(self):
        loss, gradient, details = policy_loss("default", [1.5, 0.5, 4.0], [2.0, 2.0, -2.0], [2, 1])
        assert loss == pytest.approx([-2.6, -1.0, 6.0]) and gradient == pytest.approx([0.0, -1.0, 0.0])
        assert details["pg_clipfrac_higher"].tolist() == [1, 0, 0] and details["pg_clipfrac_lower"].tolist() == [
            0,
            0,
            1,
        ]
        assert details["ppo_kl"].tolist() == pytest.approx([-math.log(1.5), math.log(2), -math.log(4)])

    def test_gspo_by_hand(self):
        # Ratios 2 and 1/2 have the geometric mean 1: loss -A and gradient -A for both tokens, where each token alone
        # would be clipped or not. Ratios 4 and 1 have 2: clamped at 1.3, no gradient.
        loss, gradient, details = policy_loss("gspo", [2.0, 0.5, 4.0, 1.0], [1.0, 1.0, 1.0, 1.0], [2, 2])
        assert loss == pytest.approx([-1.0, -1.0, -1.3, -1.3]) and gradient == pytest.approx([-1.0, -1.0, 0.0, 0.0])
        assert details["pg_clipfrac_higher"].tolist() == [0, 0, 1, 1]

    def test_gspo_token_has_gspos_values_and_each_tokens_own_gradient(self):
        # Advantages differ inside the response: gspo shares their gradients evenly, gspo_token does not.
        ratios, advantages = [2.0, 0.5], [1.0, 3.0]
        shared, own = policy_loss("gspo", ratios, advantages, [2]), policy_loss("gspo_token", ratios, advantages, [2])
        assert own[0] == pytest.approx([-1.0, -3.0]) and shared[0] == pytest.approx([-1.0, -3.0])
        assert shared[1] == pytest.approx([-2.0, -2.0]) and own[1] == pytest.approx([-1.0, -3.0])

    def test_cispo_by_hand(self):
        # The weight is clamped to [0.8, 1.3] and is a constant: -A w log p, gradient -A w, also where it is clamped.
        loss, gradient, _ = policy_loss("cispo", [2.0, 0.5, 1.1], [1.0, 1.0, -2.0], [3])
        assert loss == pytest.approx([1.3 * 2, 0.8 * 2, -2 * 1.1 * 2])
        assert gradient == pytest.approx([-1.3, -0.8, 2 * 1.1])

    def test_sapo_by_hand(self):
        # At r = 2 tau 1 gives 4 s, s = sigmoid(1), and tau 2 for A < 0 2 s, s = sigmoid(2); gradients 4 s (1 - s) r.
        loss, gradient, _ = policy_loss("sapo", [2.0, 2.0, 2.0], [1.0, -1.0, 0.5], [3])
        positive, negative = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-2))
        assert loss == pytest.approx([-4 * positive, 2 * negative, -2 * positive])
        slope = positive * (1 - positive)
        assert gradient == pytest.approx([-8 * slope, 8 * negative * (1 - negative), -4 * slope])

    @pytest.mark.parametrize("loss_type", POLICY_LOSSES)
    @pytest.mark.parametrize("difference", [-1e4, -20.0, 20.0, 1e4])
    def test_extreme_ratios_keep_loss_and_gradient_finite(self, loss_type, difference):
        log_probs = torch.full((2,), difference, requires_grad=True)
        advantages, lengths = torch.tensor([1e3, -1e3]), torch.tensor([1, 1])
        loss, _ = compute_policy_loss(loss_type, log_probs, torch.zeros(2), advantages, lengths, **CLIP, **TAU)
        loss.sum().backward()
        assert log_probs.grad is not None and loss.isfinite().all() and log_probs.grad.isfinite().all()


class TestValue:
    def test_by_hand(self):
        # Old 1, clip 0.5. V 1.2, R 2: 0.8^2 / 2. V 2, R 2: clamped to 1.5, 0.5^2 / 2, no gradient. V 3, R 0: its own.
        # V -1, R -1: clamped to 0.5, 1.5^2 / 2. V 0.75, R 0.5: 0.25^2 / 2.
        values = torch.tensor([1.2, 2.0, 3.0, -1.0, 0.75], requires_grad=True)
        returns = torch.tensor([2.0, 2.0, 0.0, -1.0, 0.5])
        loss, details = compute_value_loss(values, torch.ones(5), returns, clip=0.5)
        loss.sum().backward()
        assert loss.tolist() == pytest.approx([0.32, 0.125, 4.5, 1.125, 0.03125]) and values.grad is not None
        assert values.grad.tolist() == pytest.approx([-0.8, 0.0, 3.0, 0.0, 0.25])
        assert details["vf_clipfrac"].tolist() == [0, 1, 0, 1, 0] and details["vpred_mean"].tolist() == values.tolist()


class TestRolloutWeights:
    def test_by_hand(self):
        old, engine = torch.tensor([0.5, 0.9, 0.2]).log(), torch.tensor([0.5, 0.3, 0.4]).log()
        weights, details = compute_rollout_weights(old, engine, cap=2.0)
        assert weights.tolist() == details["tis_weight"].tolist() == pytest.approx([1.0, 2.0, 0.5])
        assert details["tis_truncated"].tolist() == [0, 1, 0]
        assert details["rollout_kl"].tolist() == pytest.approx([0.0, -math.log(3), math.log(2)], abs=1e-6)
        assert details["rollout_prob_gap"].tolist() == pytest.approx([0.0, 0.6, 0.2])

    def test_a_ratio_at_the_cap_is_whole(self):
        weights, details = compute_rollout_weights(torch.zeros(1), torch.zeros(1), cap=1.0)
        assert weights.item() == 1.0 and details["tis_truncated"].item() == 0.0

    def test_they_are_constants_of_the_loss_and_bounded(self):
        old = torch.tensor([100.0, -100.0], requires_grad=True)
        weights, details = compute_rollout_weights(old, torch.zeros(2), cap=2.0)
        assert not weights.requires_grad and not any(value.requires_grad for value in details.values())
        assert weights[0] == 2.0 and 0 < weights[1] < 1e-8


class TestAverages:
    LENGTHS = torch.tensor([1, 3])
    LOSSES = torch.tensor([8.0, 1.0, 2.0, 3.0])

    @pytest.mark.parametrize(
        ("mode", "expected"),
        [("token", 14 / 4), ("seq", (8 + 2) / 2), ("fixed_length", 14 / (2 * 10))],
    )
    def test_by_hand(self, mode, expected):
        weights = average_weights(mode, self.LENGTHS)
        assert weights.dtype == torch.float32
        total = (self.LOSSES * weights).sum()
        assert float(total) / average_denominator(mode, 4, 2, max_response_length=10) == pytest.approx(expected)

    def test_the_mean_of_each_response(self):
        assert mean_per_response(self.LOSSES, self.LENGTHS).tolist() == [8.0, 2.0]

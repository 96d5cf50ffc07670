"""Advantages by hand-worked numbers, by invariance and by limits."""

import math
import typing

import pytest
import torch

from verl.algos.advantages import (
    GROUP_ESTIMATORS,
    compute_advantages,
    compute_dr_grpo_advantages,
    compute_gae_advantages,
    compute_grpo_advantages,
    compute_grpo_passk_advantages,
    compute_reinforce_plus_plus_advantages,
    compute_remax_advantages,
    compute_rloo_advantages,
    spread_rewards,
    whiten,
)
from verl.config.records import AlgorithmConfig

# One group of two responses with 3 and 2 tokens.
MASK = torch.tensor([[[1, 1, 1], [1, 1, 0]]])


def near(values: torch.Tensor, expected: list) -> bool:
    torch.testing.assert_close(values.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    return True


class TestGroups:
    def test_grpo_by_hand(self):
        # Mean 2, deviations -1 0 1, variance (1 + 0 + 1) / 2 = 1; then mean 0.5, variance (4 * 0.25) / 3.
        assert compute_grpo_advantages(torch.tensor([[1.0, 2.0, 3.0]]), eps=0.0).tolist() == [[-1.0, 0.0, 1.0]]
        root = math.sqrt(0.75)
        assert near(compute_grpo_advantages(torch.tensor([[0.0, 1.0, 1.0, 0.0]])), [[-root, root, root, -root]])
        assert compute_grpo_advantages(torch.tensor([[1.0, 2.0, 3.0]]), eps=1.0).tolist() == [[-0.5, 0.0, 0.5]]

    def test_dr_grpo_by_hand(self):
        # Mean 2 and no deviation to divide by.
        assert compute_dr_grpo_advantages(torch.tensor([[1.0, 0.0, 5.0]])).tolist() == [[-1.0, -2.0, 3.0]]

    def test_rloo_by_hand(self):
        # 1 - (0 + 5) / 2, 0 - (1 + 5) / 2, 5 - (1 + 0) / 2.
        assert near(compute_rloo_advantages(torch.tensor([[1.0, 0.0, 5.0]])), [[-1.5, -3.0, 4.5]])

    def test_passk_by_hand(self):
        # Best 5, second 3, deviation of (1, 3, 5) is 2: only the best has an advantage; of a shared lead nobody.
        assert near(
            compute_grpo_passk_advantages(torch.tensor([[1.0, 5.0, 3.0], [5.0, 5.0, 3.0]])), [[0, 1, 0], [0] * 3]
        )
        assert compute_grpo_passk_advantages(torch.tensor([[1.0, 5.0, 3.0]]), eps=2.0).tolist() == [[0, 0.5, 0]]

    def test_remax_by_hand(self):
        rewards, greedy = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([0.25, 1.0])
        assert compute_remax_advantages(rewards, greedy).tolist() == [[0.75, -0.25], [-0.5, -0.5]]

    @pytest.mark.parametrize("score", [0.0, 0.1, 1 / 3, 1e6 + 0.1])
    @pytest.mark.parametrize("n", [2, 3, 7, 8])
    @pytest.mark.parametrize("estimator", GROUP_ESTIMATORS)
    def test_a_flat_group_is_exactly_zero(self, estimator, score, n):
        assert GROUP_ESTIMATORS[estimator](torch.full((2, n), score)).tolist() == [[0.0] * n] * 2

    @pytest.mark.parametrize("estimator", GROUP_ESTIMATORS)
    def test_flat_groups_of_other_rewards_are_exactly_zero_together(self, estimator):
        levels = torch.rand(50, 1, generator=torch.Generator().manual_seed(0))
        assert not GROUP_ESTIMATORS[estimator](levels.expand(50, 7)).any()

    @pytest.mark.parametrize("estimator", GROUP_ESTIMATORS)
    def test_groups_do_not_see_each_other_and_order_does_not_matter(self, estimator):
        estimate = GROUP_ESTIMATORS[estimator]
        scores = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
        together = estimate(scores)
        assert torch.equal(together, torch.cat([estimate(group) for group in scores.split(1)]))
        order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(estimate(scores[:, order]), together[:, order])
        torch.testing.assert_close(estimate(scores + 3.0), together, rtol=1e-4, atol=1e-5)

    def test_scale_of_the_reward_changes_only_what_is_not_divided(self):
        scores = torch.rand(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for estimator, factor in (("grpo", 1.0), ("grpo_passk", 1.0), ("dr_grpo", 3.0), ("rloo", 3.0)):
            expected = factor * GROUP_ESTIMATORS[estimator](scores)
            torch.testing.assert_close(GROUP_ESTIMATORS[estimator](3.0 * scores), expected, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("estimator", GROUP_ESTIMATORS)
    def test_a_group_of_one_names_the_knob(self, estimator):
        with pytest.raises(ValueError, match="got a group of 1; raise worker.rollout.n"):
            GROUP_ESTIMATORS[estimator](torch.ones(4, 1))


class TestTokens:
    def test_rewards_are_spread_by_hand(self):
        penalties = torch.full((1, 2, 3), 0.25)
        assert spread_rewards(torch.tensor([[1.0, 2.0]]), MASK).tolist() == [[[0, 0, 1], [0, 2, 0]]]
        assert spread_rewards(torch.tensor([[1.0, 2.0]]), MASK, penalties).tolist() == [
            [[-0.25, -0.25, 0.75], [-0.25, 1.75, 0]]
        ]

    def test_the_reward_of_a_response_of_one_token_is_at_that_token(self):
        mask = torch.tensor([[[1, 0, 0], [0, 0, 0]]])
        assert spread_rewards(torch.tensor([[1.0, 2.0]]), mask).tolist() == [[[1, 0, 0], [0, 0, 0]]]

    def test_two_tokens_are_enough_to_be_whitened(self):
        white = whiten(torch.tensor([1.0, 3.0]), torch.ones(2))  # mean 2, variance 2
        assert white.dtype == torch.float32 and white.tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)])

    def test_reinforce_plus_plus_by_hand(self):
        # gamma 0.5: returns 0.25 0.5 1 and 1 2; mean 0.95, squares 0.49 0.2025 0.0025 0.0025 1.1025 over 4 = 0.45.
        advantages, returns = compute_reinforce_plus_plus_advantages(
            spread_rewards(torch.tensor([[1.0, 2.0]]), MASK), MASK, gamma=0.5
        )
        assert near(returns, [[[0.25, 0.5, 1.0], [1.0, 2.0, 0.0]]])
        unit = math.sqrt(0.45)
        assert near(advantages * unit, [[[-0.7, -0.45, 0.05], [0.05, 1.05, 0.0]]])

    def test_gae_by_hand(self):
        # gamma 0.5, lam 0.5. Row 0: V 1 2 3, deltas 0.5*2-1=0, 0.5*3-2=-0.5, 1-3=-2; A -2, -0.5-0.5=-1, 0-0.25=-0.25.
        # Row 1: V 4 2, deltas 0.5*2-4=-3, 2-2=0; A 0, -3. The value 9 lies behind the response and counts nothing.
        values = torch.tensor([[[1.0, 2.0, 3.0], [4.0, 2.0, 9.0]]])
        token_rewards = spread_rewards(torch.tensor([[1.0, 2.0]]), MASK)
        advantages, returns = compute_gae_advantages(token_rewards, values, MASK, gamma=0.5, lam=0.5)
        assert near(returns, [[[0.75, 1.0, 1.0], [1.0, 2.0, 0.0]]])
        plain = torch.tensor([-0.25, -1.0, -2.0, -3.0, 0.0])
        white = (plain - plain.mean()) / plain.std()
        assert near(advantages[MASK.bool()], white.tolist()) and advantages[0, 1, 2] == 0

    def test_gae_with_lambda_one_learns_the_rewards_to_come(self):
        generator = torch.Generator().manual_seed(0)
        values, rewards = torch.randn(2, 3, 4, generator=generator), torch.randn(2, 3, generator=generator)
        mask = torch.arange(4) < torch.randint(1, 5, (2, 3, 1), generator=generator)
        token_rewards = spread_rewards(rewards, mask)
        _, returns = compute_gae_advantages(token_rewards, values, mask, gamma=0.9, lam=1.0)
        _, to_come = compute_reinforce_plus_plus_advantages(token_rewards, mask, gamma=0.9)
        torch.testing.assert_close(returns, to_come)

    def test_whitened_tokens_have_mean_zero_and_deviation_one_wherever_the_padding_is(self):
        values = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0))
        mask = torch.arange(5) < torch.tensor([[5, 1], [2, 3], [4, 4]]).unsqueeze(-1)
        white = whiten(values, mask)
        assert abs(float(white[mask].mean())) < 1e-6 and float(white[mask].std()) == pytest.approx(1, abs=1e-6)
        assert not white[~mask].any()
        wider = whiten(torch.nn.functional.pad(values, (0, 3), value=7.0), torch.nn.functional.pad(mask, (0, 3)))
        assert torch.equal(wider[..., :5], white)

    @pytest.mark.parametrize("value", [0.1, 1 / 3, 1e4])
    def test_equal_values_are_white_zeros(self, value):
        assert not whiten(torch.full((8, 4, 100), value), torch.ones(8, 4, 100)).any()
        assert not whiten(torch.full((1, 1, 1), value), torch.ones(1, 1, 1)).any()


class TestByName:
    @pytest.mark.parametrize("estimator", typing.get_args(typing.get_type_hints(AlgorithmConfig)["adv_estimator"]))
    def test_every_name_of_the_configuration_gives_finite_advantages(self, estimator):
        rewards = torch.tensor([[1.0, 0.0]])
        extra = {"baselines": torch.tensor([0.5]), "values": torch.zeros(1, 2, 3)}
        advantages, returns = compute_advantages(estimator, rewards, MASK, **extra)
        shape = (1, 2, 3) if estimator in ("gae", "reinforce_plus_plus") else (1, 2)
        assert advantages.shape == returns.shape == shape and advantages.isfinite().all()
        flat = advantages if advantages.dim() == 2 else advantages[..., 0]
        assert flat[0, 0] > flat[0, 1]

    def test_a_penalty_lowers_the_reward_of_its_response(self):
        penalties = torch.zeros(1, 2, 3)
        penalties[0, 0] = 0.5  # three tokens: the reward 1 becomes -0.5; what lies behind a response counts nothing
        penalties[0, 1, 2] = 9.0
        advantages, _ = compute_advantages("dr_grpo", torch.tensor([[1.0, 0.0]]), MASK, penalties=penalties)
        assert advantages.tolist() == [[-0.25, 0.25]]

    def test_a_response_without_tokens_keeps_its_reward(self):
        mask = torch.tensor([[[1, 1, 1], [0, 0, 0]]])
        advantages, _ = compute_advantages("dr_grpo", torch.tensor([[0.0, 1.0]]), mask)
        assert advantages.tolist() == [[-0.5, 0.5]]

    @pytest.mark.parametrize("estimator", ["gae", "reinforce_plus_plus"])
    def test_nothing_is_discounted_unless_asked(self, estimator):
        """Without a discount the return of every token is the reward to come, whatever the critic expects."""
        values = torch.tensor([[[1.0, 2.0, 3.0], [4.0, 2.0, 9.0]]])
        _, returns = compute_advantages(estimator, torch.tensor([[1.0, 2.0]]), MASK, values=values)
        assert returns.tolist() == [[[1.0, 1.0, 1.0], [2.0, 2.0, 0.0]]]
        _, halved = compute_advantages(estimator, torch.tensor([[1.0, 2.0]]), MASK, 0.5, values=values)
        assert halved.tolist() == [[[0.25, 0.5, 1.0], [1.0, 2.0, 0.0]]]


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo", "grpo_passk", "remax", "reinforce_plus_plus", "gae"])
def test_a_dropped_response_moves_nothing(estimator):
    """Groups with a dropped response have the advantages of groups that never held it."""
    generator = torch.Generator().manual_seed(3)
    rewards, lengths = torch.rand(3, 4, generator=generator), torch.tensor([[2, 3, 1, 3], [1, 1, 2, 3], [3, 2, 2, 1]])
    mask, values = torch.arange(3) < lengths.unsqueeze(-1), torch.rand(3, 4, 3, generator=generator)
    more = {"baselines": torch.tensor([0.2, 0.5, 0.1])} if estimator == "remax" else {}
    more |= {"values": values} if estimator == "gae" else {}
    dropped = rewards.clone()
    dropped[:, 1] = torch.nan
    found, returns = compute_advantages(estimator, dropped, mask, **more)
    rest = [0, 2, 3]
    more |= {"values": values[:, rest]} if estimator == "gae" else {}
    expected, _ = compute_advantages(estimator, rewards[:, rest], mask[:, rest], **more)
    assert torch.allclose(found[:, rest], expected, atol=1e-6)
    assert not found[:, 1].any() and not returns[:, 1].any()


def test_a_group_of_fewer_than_two_scores_has_no_advantage():
    nan = torch.nan
    rewards, mask = torch.tensor([[1.0, nan, nan], [nan, nan, nan], [1.0, 0.0, nan]]), torch.ones(3, 3, 2)
    found, _ = compute_advantages("dr_grpo", rewards, mask)
    assert found.tolist() == [[0, 0, 0], [0, 0, 0], [0.5, -0.5, 0]]
    found, _ = compute_advantages("remax", torch.ones(2, 2), mask[:2, :2], baselines=torch.tensor([0.5, nan]))
    assert found.tolist() == [[0.5, 0.5], [0, 0]]

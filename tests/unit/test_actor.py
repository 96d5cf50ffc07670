"""The gradient of a step: independent of micro-batches, sharing and ranks for every loss; on-policy ratio 1;
flat groups 0; the exact divergence; steps left out."""

from dataclasses import replace

import pytest
import torch

from tests.support.ranks import run_ranks
from tests.support.tiny_qwen import FAMILIES
from tests.support.updates import (
    CHOICES,
    CHOICES_OVER_RANKS,
    CUT,
    NUM_GROUPS,
    WIDTH,
    change,
    chosen_update,
    make_groups,
    one_update,
    one_value_update,
    scorer,
    settings,
    updates_of_a_rank,
)
from verl.config.records import AdapterConfig
from verl.distributed.fsdp import full_weights
from verl.model.lora import add_adapters
from verl.model.qwen_vl import ResponseValues
from verl.protocol import DataProto
from verl.workers.actor import Actor, Groups, MetricSums, PolicyBatch
from verl.workers.critic import Critic, ValueSettings


@pytest.fixture(scope="module")
def whole():
    return one_update(scorer(), *make_groups(), settings(NUM_GROUPS, 10_000, True))


@pytest.mark.parametrize("family", FAMILIES)
def test_micro_batches_do_not_change_any_familys_gradient(family):
    parts = make_groups(family)
    whole, _ = one_update(scorer(family=family), *parts, settings(NUM_GROUPS, 10_000, True))
    pieces, _ = one_update(scorer(True, family), *parts, settings(NUM_GROUPS, 25, False))
    assert whole.norm() > 0.1
    assert (pieces - whole).norm() / whole.norm() < 1e-5


@pytest.mark.parametrize("max_tokens", [1, 25, 70])
@pytest.mark.parametrize("shared_prompt", [True, False])
def test_micro_batches_do_not_change_the_gradient(whole, max_tokens, shared_prompt):
    gradient, metrics = one_update(scorer(), *make_groups(), settings(NUM_GROUPS, max_tokens, shared_prompt))
    assert whole[0].norm() > 0.1
    assert (gradient - whole[0]).norm() / whole[0].norm() < 1e-5
    for name in ("actor/pg_loss", "actor/kl_loss", "actor/entropy_loss"):
        assert metrics[name] == pytest.approx(whole[1][name], rel=1e-4)


def test_activation_checkpointing_does_not_change_the_gradient(whole):
    gradient, _ = one_update(scorer(checkpointing=True), *make_groups(), settings(NUM_GROUPS, 70, True))
    assert (gradient - whole[0]).norm() / whole[0].norm() < 1e-5


@pytest.mark.parametrize("choice", [choice for choice in CHOICES if choice != "default"])
def test_no_loss_depends_on_micro_batches(choice):
    whole, metrics = chosen_update(scorer(), *make_groups(), settings(NUM_GROUPS, 10_000, True, choice))
    assert whole.norm() > 0.01
    for max_tokens, shared_prompt in ((25, False), (40, True)):
        cut = settings(NUM_GROUPS, max_tokens, shared_prompt, choice)
        gradient, cut_metrics = chosen_update(scorer(), *make_groups(), cut)
        assert (gradient - whole).norm() / whole.norm() < 1e-5
        assert sorted(cut_metrics) == sorted(metrics)
        for name in ("actor/pg_loss", "actor/kl_loss", "actor/tis_weight", "actor/rollout_kl"):
            assert cut_metrics[name] == pytest.approx(metrics[name], rel=1e-4)


@pytest.mark.parametrize("mode", ["token", "seq", "fixed_length"])
def test_the_critic_does_not_depend_on_micro_batches(mode):
    whole, metrics = one_value_update(scorer(wrapper=ResponseValues), *make_groups(), mode=mode)
    gradient, _ = one_value_update(scorer(wrapper=ResponseValues), *make_groups(), max_tokens=25, mode=mode)
    assert whole.norm() > 0.01 and (gradient - whole).norm() / whole.norm() < 1e-5
    # A head of zeros expects nothing: each value is clamped to within 0.5 of half its return.
    groups, advantages, reference = make_groups()
    mask = torch.tensor([[[i < len(row) for i in range(WIDTH)] for row in rows] for rows in groups.responses])
    returns = (advantages.unsqueeze(-1) + reference)[mask]
    near = returns / 2 + (-returns / 2).clamp(-0.5, 0.5)
    total, weight = metrics["critic/vf_loss"]
    assert weight == mask.sum() and total / weight == pytest.approx(
        float(torch.maximum(returns.square(), (near - returns).square()).mean() / 2), rel=1e-5
    )


@pytest.mark.parametrize("choice", ["default", "gspo"])
@pytest.mark.parametrize("max_tokens", [25, 10_000])
def test_responses_without_tokens_are_left_out(choice, max_tokens):
    """One empty response of a group, and a group that has no others: what the groups give without them."""
    groups, advantages, reference = make_groups()
    chosen = settings(NUM_GROUPS, max_tokens, True, choice)
    nothing = torch.empty(0, dtype=torch.long)
    with_empty = replace(groups, responses=[list(rows) for rows in groups.responses])
    with_empty.responses[1][0], with_empty.responses[3] = nothing, [nothing] * 3
    fewer = replace(groups, responses=[list(rows) for rows in groups.responses])
    del fewer.responses[1][0], fewer.responses[3]
    for name in ("prompts", "positions", "images"):
        setattr(fewer, name, getattr(groups, name)[:3])
    shifted = [torch.stack([t[0], t[1].roll(-1, 0), t[2]]) for t in (advantages, reference)]
    gradient, metrics = chosen_update(scorer(), with_empty, advantages, reference, chosen)
    expected, expected_metrics = chosen_update(scorer(), fewer, *shifted, replace(chosen, num_groups_per_mini_batch=3))
    if choice == "gspo":  # a mean over responses: the four empty ones are of the mini-batch and say nothing
        expected = expected * 8 / 12
    assert (gradient - expected).norm() / expected.norm() < 1e-5
    assert metrics["actor/pg_loss"] == pytest.approx(expected_metrics["actor/pg_loss"], rel=1e-4)
    log_probs, _ = Actor(scorer(), torch.device("cpu")).compute_log_probs(with_empty, max_tokens, True, 0.9)
    assert not log_probs[3].any() and not log_probs[1, 0].any() and log_probs[1, 1].any()


def test_a_batch_without_any_token_changes_nothing():
    groups, advantages, reference = make_groups()
    groups.responses = [[torch.empty(0, dtype=torch.long)] * 3 for _ in range(NUM_GROUPS)]
    gradient, metrics = chosen_update(scorer(), groups, advantages, reference, settings(NUM_GROUPS, 70, True))
    assert not gradient.any() and metrics["actor/skipped_steps"] == (0.0, 1.0)


def test_the_critic_learns_its_returns_and_its_values_are_where_the_tokens_are():
    groups, advantages, reference = make_groups()
    model = scorer(wrapper=ResponseValues)
    critic = Critic(model, torch.device("cpu"), torch.optim.Adam(model.parameters(), lr=3e-3))
    returns = advantages.unsqueeze(-1) + 0 * reference
    chosen = ValueSettings(
        num_groups_per_mini_batch=4,
        max_tokens=10_000,
        shared_prompt=True,
        loss_avg_mode="token",
        cliprange_value=1e9,
        **CUT,
    )
    losses = []
    for _ in range(12):
        total, weight = critic.update(groups, torch.zeros_like(returns), returns, chosen)["critic/vf_loss"]
        losses.append(total / weight)
    assert losses[-1] < losses[0] / 4
    values = critic.compute_values(groups, 25, False)
    padding = torch.tensor([[[i >= len(row) for i in range(WIDTH)] for row in rows] for rows in groups.responses])
    assert not values[padding].any() and (values[~padding] != 0).all()


def test_the_full_divergence_is_that_of_the_whole_distributions():
    groups, _, _ = make_groups()
    policy, reference = scorer(), scorer(seed=1)
    actor, other = (Actor(model, torch.device("cpu")) for model in (policy, reference))
    kl = actor.compute_full_kl(other, groups, 40, True, 0.9)
    assert not actor.compute_full_kl(actor, groups, 40, True, 0.9).abs().max() > 1e-5
    prompt, response = groups.prompts[2], groups.responses[2][1]  # the group without an image, by plain transformers
    logits = []
    for model in (policy.model, reference.model):
        model.set_attn_implementation({"text_config": "sdpa", "vision_config": "sdpa"})
        row = torch.cat([prompt, response]).unsqueeze(0)
        logits.append((model(input_ids=row).logits[0, len(prompt) - 1 : -1].float() / 0.9).log_softmax(-1))
    expected = (logits[0].exp() * (logits[0] - logits[1])).sum(-1)
    torch.testing.assert_close(kl[2, 1, : len(response)], expected, rtol=1e-4, atol=1e-5)
    assert expected.min() > 0.1


@pytest.mark.parametrize("choice", ["default", "full"])
def test_importance_weights_are_of_the_policy_loss_alone(choice):
    """Without advantages the gradient is the divergence's, whatever the engine's log-probs are."""
    groups, advantages, reference = make_groups()
    other = scorer(seed=1) if choice == "full" else None
    chosen, old = settings(NUM_GROUPS, 70, True, choice), reference - 0.1
    gradients, metrics = [], []
    for rollout in (None, old + 0.7, old - 0.02):
        gradient, seen = one_update(scorer(), groups, 0 * advantages, reference, chosen, old, rollout, other)
        gradients.append(gradient)
        metrics.append(seen)
    assert gradients[0].norm() > 1e-2
    for gradient, seen in zip(gradients[1:], metrics[1:], strict=True):
        total, weight = seen["actor/tis_weight"]
        assert abs(total / weight - 1) > 0.01
        assert (gradient - gradients[0]).norm() / gradients[0].norm() < 1e-5
        assert seen["actor/kl_loss"] == pytest.approx(metrics[0]["actor/kl_loss"])


@pytest.mark.parametrize("max_tokens", [40, 10_000])
@pytest.mark.parametrize("has_own_reference", [True, False])
def test_the_exact_divergence_keeps_activation_checkpointing(max_tokens, has_own_reference):
    """Each layer computes twice with gradients, also where the reference is the policy without its adapters."""
    groups, advantages, reference = make_groups()
    chosen = settings(NUM_GROUPS, max_tokens, True, "full")
    gradients, runs = [], []
    for checkpointing in (True, False):
        model = scorer(checkpointing)
        add_adapters(model.model, AdapterConfig(4, 8), torch.float32, seed=1)
        other = Actor(scorer(seed=1) if has_own_reference else model, torch.device("cpu"))
        other.disables_adapters = not has_own_reference
        is_training = []
        model.model.model.language_model.layers[0].mlp.register_forward_pre_hook(
            lambda layer, _, seen=is_training: seen.append(layer.training) if torch.is_grad_enabled() else None
        )
        actor = Actor(model, torch.device("cpu"))
        actor.compute_log_probs(groups, max_tokens, True, 0.9)  # leaves the evaluation mode behind
        old = (reference + 0.4 * advantages.unsqueeze(-1)).clamp(max=-0.01)
        gradient, _ = change(
            model, actor, lambda actor, r=other, o=old: actor.update(groups, PolicyBatch(advantages, o), chosen, r)
        )
        gradients.append(gradient)
        runs.append(is_training)
    assert all(runs[0]) and len(runs[0]) == 2 * len(runs[1]) > 0
    assert gradients[0].norm() > 1e-3 and (gradients[0] - gradients[1]).norm() / gradients[1].norm() < 1e-5


@pytest.mark.integration
@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.nightly)])
def test_ranks_give_the_gradient_of_one(tmp_path, num_ranks):
    alone, together = updates_of_a_rank(None, 0, 1), run_ranks(updates_of_a_rank, num_ranks, tmp_path)
    assert len(together[0]) > len(CHOICES_OVER_RANKS) + len(FAMILIES)
    for name, gradient in together[0].items():
        assert alone[name].norm() > 0
        assert (gradient - alone[name]).norm() / alone[name].norm() < 1e-5, name


def test_on_policy_ratio_is_one_and_a_flat_group_has_no_gradient():
    groups, advantages, _ = make_groups()
    model = scorer()
    actor = Actor(model, torch.device("cpu"))
    old, entropy = actor.compute_log_probs(groups, 10_000, True, 0.9)
    assert (entropy[old != 0] > 0).all()
    _, metrics = one_update(model, groups, advantages, None, settings(NUM_GROUPS, 25, False), old=old)
    total, weight = metrics["actor/ppo_kl"]
    assert abs(total / weight) < 1e-4
    gradient, _ = one_update(scorer(), groups, torch.zeros_like(advantages), None, settings(NUM_GROUPS, 70, True))
    assert gradient.abs().max() == 0


@pytest.mark.parametrize("choice", ["default", "gspo", "cispo"])
def test_the_first_update_needs_no_old_log_probs(choice):
    """Two updates of two groups each: from log-probs of all, of those that are read alone, and of all in vain."""
    groups, advantages, reference = make_groups()
    chosen = replace(settings(NUM_GROUPS // 2, 70, True, choice), kl_coef=0.1)
    sampled, _ = Actor(scorer(), torch.device("cpu")).compute_log_probs(groups, 10_000, True, 0.9)
    trained, metrics = {}, {}
    for start, num_on_policy in ((0, 0), (2, 2), (0, 2), (2, 0)):
        model = scorer()
        actor = Actor(model, torch.device("cpu"), torch.optim.SGD(model.parameters(), lr=0.3))
        old, _ = actor.compute_log_probs(groups, 10_000, True, 0.9, start)
        assert old[:start].isnan().all() and old[start:].isfinite().all()
        metrics[start, num_on_policy] = actor.update(
            groups, PolicyBatch(advantages, old, reference, sampled - 0.05, num_on_policy), chosen
        )
        trained[start, num_on_policy] = torch.cat([weight.flatten() for _, weight in full_weights(model)])
    moved = (trained[0, 0] - torch.cat([w.flatten() for _, w in full_weights(scorer())])).norm()
    for case in ((2, 2), (0, 2)):
        assert (trained[case] - trained[0, 0]).norm() / moved < 1e-5
        assert metrics[case]["actor/skipped_steps"] == (0.0, 1.0)
    total, weight = metrics[2, 2]["actor/ppo_kl"]
    assert abs(total / weight) > 1e-3  # the second update's policy has moved away
    assert not (trained[2, 0] - trained[0, 0]).norm() / moved < 1e-2  # what is left out would have been read


def test_a_non_finite_gradient_is_skipped_and_counted():
    groups, advantages, reference = make_groups()
    broken = advantages.clone()
    broken[0, 0] = float("nan")
    model = scorer()
    actor = Actor(model, torch.device("cpu"), torch.optim.SGD(model.parameters(), lr=1.0))
    before = torch.cat([w.flatten() for _, w in full_weights(model)])
    twice = settings(NUM_GROUPS // 2, 10_000, True)  # the first of two mini-batches holds the broken group
    for row in range(2):
        metrics = actor.update(
            groups, PolicyBatch(broken, None, reference), replace(twice, num_groups_per_mini_batch=4)
        )
        assert metrics["actor/skipped_steps"] == (1.0, 1.0) and metrics["actor/skipped_in_a_row"] == (row + 1, 1.0)
        assert "actor/grad_norm" not in metrics
    assert torch.equal(before, torch.cat([w.flatten() for _, w in full_weights(model)]))
    metrics = actor.update(groups, PolicyBatch(broken, None, reference), twice)
    assert metrics["actor/skipped_steps"] == (1.0, 1.0) and metrics["actor/skipped_in_a_row"] == (0, 1.0)
    after = torch.cat([w.flatten() for _, w in full_weights(model)])
    assert after.isfinite().all() and not torch.equal(before, after)


def test_groups_of_a_padded_batch_are_cut_to_their_tokens():
    tensors = {
        "prompt_ids": torch.tensor([[0, 5, 6], [7, 8, 9]]),
        "prompt_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        "prompt_position_ids": torch.arange(18).reshape(2, 3, 3),
        "responses": torch.tensor([[[1, 2, 0, 0], [3, 0, 0, 0]], [[4, 5, 6, 0], [0, 0, 0, 0]]]),
        "response_mask": torch.tensor([[[1, 1, 0, 0], [1, 0, 0, 0]], [[1, 1, 1, 0], [0, 0, 0, 0]]]),
    }
    data = DataProto.from_dict(tensors, {"images": [["a", "b"], ["c"]]})
    pixels, grids = [torch.zeros(1)] * 3, [(1, 2, 2)] * 3
    groups = Groups.from_proto(data, pixels, grids)
    assert [ids.tolist() for ids in groups.prompts] == [[5, 6], [7, 8, 9]]
    assert groups.positions[0].tolist() == [[1, 2], [4, 5], [7, 8]]
    assert groups.positions[1].tolist() == [[9, 10, 11], [12, 13, 14], [15, 16, 17]]
    assert [[row.tolist() for row in rows] for rows in groups.responses] == [[[1, 2], [3]], [[4, 5, 6], []]]
    assert groups.images == [[0, 1], [2]] and groups.pixels is pixels and groups.grids is grids
    assert (groups.num_samples, groups.width, len(groups)) == (2, 4, 2)


def test_the_divergence_enters_the_loss_with_its_weight():
    groups, advantages, reference = make_groups()
    gradients = [
        one_update(scorer(), groups, 0 * advantages, reference, replace(settings(NUM_GROUPS, 70, True), kl_coef=coef))[
            0
        ]
        for coef in (0.1, 0.2)
    ]
    assert gradients[0].norm() > 1e-3 and (gradients[1] - 2 * gradients[0]).norm() / gradients[1].norm() < 1e-5


def test_dropped_responses_are_in_no_micro_batch_and_in_no_count():
    responses = [[torch.zeros(3), torch.zeros(5)], [torch.zeros(2), torch.zeros(4)]]
    prompts, positions = [torch.zeros(2)] * 2, [torch.zeros(3, 2)] * 2
    groups = Groups(prompts, positions, responses, [[], []], [], [], 2, 5)
    assert groups.count(range(2)) == (14, 4)
    groups.kept = torch.tensor([[True, False], [False, False]])
    assert groups.count(range(2)) == (3, 1) and groups.count([1]) == (0, 0)
    planned = [piece for pieces in groups.plan(100, True) for piece in pieces]
    assert [(piece.group, tuple(piece.samples)) for piece in planned] == [(0, (0,))]


@pytest.mark.parametrize("max_tokens", [1, 70, 10_000])
def test_replay_is_compared_on_one_group_with_it_and_without(max_tokens, monkeypatch):
    groups, *_ = make_groups()
    groups = replace(groups, experts=[torch.zeros(1)] * NUM_GROUPS)
    actor, seen, metrics = Actor(scorer(), torch.device("cpu")), [], MetricSums()

    def forward(given, pieces, temperature):
        seen.append((given.experts is None, [piece.group for piece in pieces]))
        return torch.full((int(given.lengths(pieces).sum()),), -2.0 if given.experts is None else -1.0), None

    monkeypatch.setattr(actor, "forward", forward)
    rollout = torch.full((NUM_GROUPS, groups.num_samples, WIDTH), -1.25)
    actor._compare_replay(groups, rollout, settings(NUM_GROUPS, max_tokens, True), metrics)
    assert [without for without, _ in seen] == [False, True]
    assert seen[0][1] == seen[1][1] and len(seen[0][1]) == 1
    means = {name: total / weight for name, (total, weight) in metrics.as_pairs().items()}
    assert means == pytest.approx({"actor/engine_gap/replayed": 0.25, "actor/engine_gap/own_routing": 0.75})

"""The gradient of a step: independent of micro-batches, sharing and ranks for every loss; on-policy ratio 1;
flat groups 0; the exact divergence; steps left out."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from tests.ranks import leave
from tests.tiny_qwen import (
    FAMILIES,
    IMAGE_TOKEN,
    VISION_END,
    VISION_FAMILIES,
    VISION_START,
    patch_dim,
    tiny_model,
)
from verl.batching import balanced_order
from verl.config import AdapterConfig
from verl.fsdp import full_weights, init_mesh, join_store, open_store, shard
from verl.lora import adapters_off, add_adapters
from verl.qwen_vl import ResponseLogProbs, ResponseValues, attend_packed, expand_image_tokens, mrope_positions
from verl.workers.actor import Actor, Groups, PolicyBatch, UpdateSettings
from verl.workers.critic import Critic, ValueSettings

NUM_GROUPS, NUM_SAMPLES, WIDTH, GRID = 4, 3, 9, (1, 4, 4)
NUM_IMAGES = (1, 2, 0, 1)


def make_groups(family: str = "qwen2_5_vl") -> tuple[Groups, torch.Tensor, torch.Tensor]:
    """Four groups of uneven lengths with advantages and reference log-probs; images as in NUM_IMAGES, if any."""
    generator = torch.Generator().manual_seed(3)
    prompts, positions, responses, images = [], [], [], []
    for group in range(NUM_GROUPS):
        text = torch.randint(0, 80, (3 + group,), generator=generator).tolist()
        grids = [GRID] * (NUM_IMAGES[group] if family in VISION_FAMILIES else 0)
        ids = text + [VISION_START, IMAGE_TOKEN, VISION_END] * len(grids) + text[:2]
        ids = expand_image_tokens(ids, grids, IMAGE_TOKEN, 2)
        prompts.append(torch.tensor(ids))
        positions.append(mrope_positions(ids, grids, IMAGE_TOKEN, 2))
        lengths = torch.randint(1, WIDTH + 1, (NUM_SAMPLES,), generator=generator).tolist()
        responses.append([torch.randint(0, 80, (length,), generator=generator) for length in lengths])
        num_before = sum(map(len, images))
        images.append(list(range(num_before, num_before + len(grids))))
    num_images = sum(map(len, images))
    pixels = [torch.randn(16, patch_dim(family), generator=generator) for _ in range(num_images)]
    grids = [GRID] * num_images
    groups = Groups(prompts, positions, responses, images, pixels, grids, NUM_SAMPLES, WIDTH)
    advantages = torch.randn(NUM_GROUPS, NUM_SAMPLES, generator=generator)
    reference = -3 - torch.rand(NUM_GROUPS, NUM_SAMPLES, WIDTH, generator=generator)
    return groups, advantages, reference


def share_of(groups: Groups, order: list[int]) -> Groups:
    return Groups(
        *[[getattr(groups, key)[g] for g in order] for key in ("prompts", "positions", "responses", "images")],
        groups.pixels,
        groups.grids,
        groups.num_samples,
        groups.width,
    )


CUT = {"max_grad_norm": 1e9, "ppo_epochs": 1, "max_response_length": 20, "temperature": 0.9}
CHOICES = {
    "default": {},
    "seq": {"loss_avg_mode": "seq"},
    "gspo": {"loss_type": "gspo", "loss_avg_mode": "seq"},
    "gspo_token": {"loss_type": "gspo_token"},
    "cispo": {"loss_type": "cispo", "loss_avg_mode": "fixed_length"},
    "sapo": {"loss_type": "sapo"},
    "full": {"kl_penalty": "full"},
}


def settings(mini_batch: int, max_tokens: int, shared_prompt: bool, choice: str = "default") -> UpdateSettings:
    base = UpdateSettings(
        num_groups_per_mini_batch=mini_batch,
        max_tokens=max_tokens,
        shared_prompt=shared_prompt,
        loss_avg_mode="token",
        loss_type="default",
        clip_ratio_low=0.2,
        clip_ratio_high=0.3,
        clip_ratio_dual=3.0,
        tau_positive=1.0,
        tau_negative=1.05,
        tis_imp_ratio_cap=1.1,
        kl_penalty="low_var_kl",
        kl_coef=0.1,
        **CUT,
    )
    return replace(base, **CHOICES[choice])


def scorer(
    checkpointing: bool = False, family: str = "qwen2_5_vl", seed: int = 0, wrapper=ResponseLogProbs
) -> ResponseLogProbs:
    model = tiny_model(seed, family=family)
    attend_packed(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return wrapper(model)


def change(model, learner, update) -> tuple[torch.Tensor, dict]:
    """Gradient of one mini-batch as the change that plain SGD with lr 1 makes, and the metrics."""
    before = torch.cat([w.flatten() for _, w in full_weights(model)])
    learner.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    metrics = update(learner)
    return before - torch.cat([w.flatten() for _, w in full_weights(model)]), metrics


def one_update(model, groups, advantages, reference, chosen: UpdateSettings, old=None, rollout=None, other=None):
    """Of the policy; `other` is the reference model where the divergence is computed in full."""
    batch = PolicyBatch(advantages, old, None if other is not None else reference, rollout)
    actor = Actor(model, torch.device("cpu"))
    other = Actor(other, torch.device("cpu")) if other is not None else None
    return change(model, actor, lambda actor: actor.update(groups, batch, chosen, other))


def chosen_update(model, groups, advantages, reference, chosen: UpdateSettings, other=None):
    """An update off the policy, so that ratios, weights and clips matter: old and engine's are made up."""
    old = (reference + 0.4 * advantages.unsqueeze(-1)).clamp(max=-0.01)
    other = other or (scorer(seed=1) if chosen.kl_penalty == "full" else None)
    return one_update(model, groups, advantages, reference, chosen, old, old - 0.05, other)


def one_value_update(model, groups, advantages, reference, max_tokens=10_000, mini_batch=4, mode="seq"):
    chosen = ValueSettings(
        num_groups_per_mini_batch=mini_batch,
        max_tokens=max_tokens,
        shared_prompt=True,
        loss_avg_mode=mode,
        cliprange_value=0.5,
        **CUT,
    )
    returns = advantages.unsqueeze(-1) + reference
    return change(
        model,
        Critic(model, torch.device("cpu")),
        lambda critic: critic.update(groups, returns / 2, returns, chosen),
    )


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


CHOICES_OVER_RANKS = ("gspo", "cispo", "full")  # one per way of averaging, and a pass of the reference inside
CASES = [("qwen2_5_vl", 2, 0), *((family, NUM_GROUPS, 0) for family in FAMILIES), ("qwen3_vl", NUM_GROUPS, 4)]
"""Family, mini-batch and rank of adapters."""


def case_update(family, mini_batch, lora_rank, prepare, share_parts, max_tokens, num_ranks):
    """The gradient of an update; with adapters, after a pass of the reference, which must not disturb it."""
    model = scorer(family=family)
    if lora_rank:
        add_adapters(model.model, AdapterConfig(lora_rank, 8), torch.float32, seed=1)
    prepare(model)
    groups, advantages, reference = share_parts
    if lora_rank:
        with adapters_off(model):
            reference, _ = Actor(model, torch.device("cpu")).compute_log_probs(groups, max_tokens, True, 0.9)
    gradient, _ = one_update(model, groups, advantages, reference, settings(mini_batch // num_ranks, max_tokens, True))
    return gradient


def run_rank(rank: int, port: int, store_file: str, out: str) -> None:
    torch.set_num_threads(1)
    store = join_store("127.0.0.1", port) if rank else None
    if rank == 0:
        store, port = open_store("127.0.0.1")
        Path(store_file).write_text(str(port))
    mesh = init_mesh(store, rank, 2, torch.device("cpu"))
    gradients = {}
    for case in CASES:
        family, mini_batch, _ = case
        groups, advantages, reference = make_groups(family)
        tokens = [len(p) + sum(map(len, r)) for p, r in zip(groups.prompts, groups.responses, strict=True)]
        order = balanced_order(tokens, mini_batch, 2)[rank * 2 : rank * 2 + 2]
        share = share_of(groups, order), advantages[order], reference[order]
        gradients[case] = case_update(
            *case, lambda model: shard(model, mesh, torch.float32, torch.float32), share, 25 if rank else 10_000, 2
        )
    groups, advantages, reference = make_groups()
    tokens = [len(p) + sum(map(len, r)) for p, r in zip(groups.prompts, groups.responses, strict=True)]
    order = balanced_order(tokens, 4, 2)[rank * 2 : rank * 2 + 2]
    share = share_of(groups, order), advantages[order], reference[order]
    for choice in CHOICES_OVER_RANKS:
        model, other = scorer(), scorer(seed=1) if choice == "full" else None
        for sharded in filter(None, (model, other)):
            shard(sharded, mesh, torch.float32, torch.float32)
        chosen = settings(2, 25 if rank else 10_000, True, choice)
        gradients[choice], _ = chosen_update(model, *share, chosen, other)
    model = scorer(wrapper=ResponseValues)
    shard(model, mesh, torch.float32, torch.float32)
    gradients["critic"], _ = one_value_update(model, *share, max_tokens=25 if rank else 10_000, mini_batch=2)
    if rank == 0:
        torch.save(gradients, out)
    leave()


def two_ranks(folder: Path) -> dict[tuple[str, int, int] | str, torch.Tensor]:
    store_file, out = folder / "port", folder / "out.pt"
    context = mp.get_context("fork")  # importing torch anew takes longer than the test
    first = context.Process(target=run_rank, args=(0, 0, str(store_file), str(out)))
    first.start()
    while not store_file.exists() or not store_file.read_text():
        assert first.is_alive()
        first.join(0.1)
    second = context.Process(target=run_rank, args=(1, int(store_file.read_text()), "", str(out)))
    second.start()
    for process in (first, second):
        process.join(60)
        assert process.exitcode == 0
    return torch.load(out, weights_only=True)


@pytest.mark.integration
def test_two_ranks_give_the_gradient_of_one(tmp_path):
    gradients = two_ranks(tmp_path)
    for case in CASES:
        expected = case_update(*case, lambda model: None, make_groups(case[0]), 10_000, 1)
        assert expected.norm() > 0
        assert (gradients[case] - expected).norm() / expected.norm() < 1e-5
    for choice in CHOICES_OVER_RANKS:
        expected, _ = chosen_update(scorer(), *make_groups(), settings(4, 10_000, True, choice))
        assert (gradients[choice] - expected).norm() / expected.norm() < 1e-5, choice
    expected, _ = one_value_update(scorer(wrapper=ResponseValues), *make_groups())
    assert (gradients["critic"] - expected).norm() / expected.norm() < 1e-5


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

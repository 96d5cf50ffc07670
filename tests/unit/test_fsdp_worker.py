"""The worker's choices around an update: learning rates, temperature, old log-probs, banned tokens.

Models, optimizers and groups are small real ones; nothing is sharded.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.updates import NUM_GROUPS, TOY, make_groups, scorer
from verl.bench.inputs import random_picture
from verl.config.loading import load_config
from verl.config.records import OptimConfig
from verl.data.processor import load_run_processor
from verl.distributed.fsdp import full_weights, lr_factor
from verl.model.qwen_vl import ResponseValues, image_patches, load_model
from verl.protocol import DataProto
from verl.workers import fsdp_worker
from verl.workers.actor import Actor
from verl.workers.critic import Critic
from verl.workers.fsdp_worker import FSDPWorker, _images_of

TOY_CPU = [
    "config=configs/toy_cpu.yaml",
    "data.train_files=owner/name",
    "data.val_files=owner/name",
    "trainer.n_gpus_per_node=1",
    f"data.rollout_batch_size={NUM_GROUPS}",
    f"worker.actor.global_batch_size={NUM_GROUPS}",
    f"worker.critic.global_batch_size={NUM_GROUPS}",
    "worker.rollout.temperature=0.7",
    "worker.actor.optim.lr_warmup_steps=0",
]
GAE = ["algorithm.adv_estimator=gae"]
CPU = torch.device("cpu")


def make_worker(*arguments, lr=0.0, num_steps=10):
    """A worker with policy, reference and critic, its groups loaded; their advantages and reference log-probs."""
    config = load_config([*TOY_CPU, *arguments])
    worker = FSDPWorker(0, 1, config, "cpu", num_steps)
    worker.policy, reference, values = scorer(), scorer(seed=1), scorer(wrapper=ResponseValues)
    worker.optimizer = torch.optim.SGD(worker.policy.parameters(), lr=lr)
    worker.actor, worker.reference = Actor(worker.policy, CPU, worker.optimizer), Actor(reference, CPU)
    worker.critic = Critic(values, CPU, torch.optim.SGD(values.parameters(), lr=lr))
    worker.groups, advantages, log_probs = make_groups()
    worker.shared_prompt = True
    return worker, advantages, log_probs


def request(step=1, kl_coef=0.0, **tensors):
    data = DataProto.from_dict(tensors or {"response_mask": torch.ones(NUM_GROUPS, 3, 9)})
    data.meta_info |= {"step": step, "kl_coef": kl_coef}
    return data


def mean(metrics, name):
    total, weight = metrics[name]
    return total / weight


def rate(optimizer):
    return optimizer.param_groups[0]["lr"]


def test_the_warm_up_rises_from_its_first_step_to_the_peak():
    assert [lr_factor(step, 10, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [lr_factor(step, 10, 1) for step in range(3)] == [1.0] * 3
    assert [lr_factor(step, 10, 0) for step in range(3)] == [1.0] * 3


@pytest.mark.parametrize(("num_warmup_steps", "floor"), [(0, 0.0), (2, 0.0), (2, 0.1), (5, 0.5)])
def test_the_cosine_falls_from_the_peak_to_its_floor(num_warmup_steps, floor):
    num_steps = 12
    factors = [lr_factor(step, num_steps, num_warmup_steps, "cosine", floor) for step in range(num_steps + 3)]
    decay = factors[num_warmup_steps:num_steps]
    assert decay[0] == 1.0 and all(a > b for a, b in zip(decay, decay[1:], strict=False))
    assert factors[num_steps:] == pytest.approx([floor] * 3)
    middle = lr_factor(num_warmup_steps + 3, num_warmup_steps + 6, num_warmup_steps, "cosine", floor)
    assert middle == pytest.approx((1 + floor) / 2)
    sixth = lr_factor(num_warmup_steps + 1, num_warmup_steps + 6, num_warmup_steps, "cosine", floor)
    assert sixth == pytest.approx(floor + (1 - floor) * (1 + math.cos(math.pi / 6)) / 2)


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_a_training_step_has_the_rate_of_its_own_number(role):
    """The first of 4 warm-up steps a quarter; the share of warm-up is one of the run's 10 steps."""
    prefix = f"worker.{role}.optim."
    schedule = [
        f"{prefix}lr_warmup_steps=null",
        f"{prefix}lr=1.0e-3",
        f"{prefix}lr_warmup_ratio=0.4",
        f"{prefix}lr_scheduler_type=cosine",
    ]
    worker, advantages, log_probs = make_worker(*GAE, *schedule)
    rates, applied = [], []
    for step in (1, 2, 4, 5, 10):
        if role == "actor":
            metrics, learner = worker.update_actor(request(step, advantages=advantages)), worker.actor
        else:
            returns = advantages.unsqueeze(-1) + log_probs
            metrics, learner = worker.update_critic(request(step, values=returns, returns=returns)), worker.critic
        rates.append(metrics[f"{role}/lr"][0])
        applied.append(rate(learner.optimizer))
    last = 1e-3 * (1 + math.cos(math.pi * 5 / 6)) / 2
    assert rates == applied == pytest.approx([2.5e-4, 5e-4, 1e-3, 1e-3, last])


def test_warm_up_steps_win_over_the_ratio():
    worker, *_ = make_worker()
    optim = OptimConfig(lr=1e-2, lr_warmup_ratio=0.5, lr_warmup_steps=2)
    assert [worker._set_lr(worker.optimizer, optim, step) for step in (1, 2, 3)] == [5e-3, 1e-2, 1e-2]


def test_actor_and_critic_have_rates_of_their_own():
    worker, advantages, log_probs = make_worker(*GAE, "worker.actor.optim.lr=1.0e-3", "worker.critic.optim.lr=5.0e-3")
    returns = advantages.unsqueeze(-1) + log_probs
    assert worker.update_critic(request(values=returns, returns=returns))["critic/lr"] == (5e-3, 1.0)
    assert rate(worker.critic.optimizer) == 5e-3 and rate(worker.optimizer) == 0.0
    assert worker.update_actor(request(advantages=advantages))["actor/lr"] == (1e-3, 1.0)
    assert rate(worker.critic.optimizer) == 5e-3 and rate(worker.optimizer) == 1e-3


@pytest.mark.parametrize("key", ["old_log_probs", "ref_log_probs"])
def test_log_probs_are_those_of_the_sampling_temperature(key):
    """Of plain logits, for the group without an image."""
    worker, *_ = make_worker()
    call = worker.compute_log_probs if key == "old_log_probs" else worker.compute_ref_log_probs
    got = call(request()).batch[key]
    prompt, response = worker.groups.prompts[2], worker.groups.responses[2][1]
    model = (worker.actor if key == "old_log_probs" else worker.reference).model.model
    model.set_attn_implementation({"text_config": "sdpa", "vision_config": "sdpa"})
    row = torch.cat([prompt, response]).unsqueeze(0)
    logits = model(input_ids=row).logits[0, len(prompt) - 1 : -1].float()
    expected, other = ((logits / t).log_softmax(-1).gather(-1, response.unsqueeze(-1)).squeeze(-1) for t in (0.7, 1.0))
    torch.testing.assert_close(got[2, 1, : len(response)], expected, rtol=1e-4, atol=1e-5)
    assert (expected - other).abs().max() > 0.01


def test_the_exact_divergence_is_of_the_sampling_temperature():
    worker, *_ = make_worker("algorithm.kl_penalty=full", "algorithm.use_kl_loss=false")
    expected = worker.actor.compute_full_kl(worker.reference, worker.groups, 10_000, True, 0.7)
    torch.testing.assert_close(worker.compute_full_kl(request()).batch["kl"], expected)


@pytest.mark.parametrize("ppo_epochs", [1, 2, 3])
def test_an_update_on_its_own_samples_has_the_ratio_one_in_the_first_epoch_alone(ppo_epochs):
    """Old log-probs and those of the update are of one temperature; later epochs are compared to the old."""
    worker, advantages, _ = make_worker(f"worker.actor.ppo_epochs={ppo_epochs}", "worker.actor.optim.lr=0.3")
    old = worker.compute_log_probs(request()).batch["old_log_probs"]
    metrics = worker.update_actor(request(advantages=advantages, old_log_probs=old))
    clipped = mean(metrics, "actor/pg_clipfrac_higher") + mean(metrics, "actor/pg_clipfrac_lower")
    if ppo_epochs == 1:
        assert abs(mean(metrics, "actor/ppo_kl")) < 1e-5 and clipped == 0
        return
    assert clipped > 0.05
    other, *_ = make_worker("worker.actor.optim.lr=0.3")  # the first epoch alone, then the policy's log-probs
    other.update_actor(request(advantages=advantages, old_log_probs=old))
    moved = other.compute_log_probs(request()).batch["old_log_probs"]
    second = float((old - moved)[old != 0].mean())
    assert abs(second) > 1e-3
    if ppo_epochs == 2:
        assert mean(metrics, "actor/ppo_kl") == pytest.approx(second / 2, rel=1e-3)


def test_only_the_first_of_several_mini_batches_takes_its_own_log_probs_as_old():
    halves = f"worker.actor.global_batch_size={NUM_GROUPS // 2}"
    worker, advantages, _ = make_worker(halves, "worker.actor.optim.lr=0.3")
    old = worker.compute_log_probs(request()).batch["old_log_probs"]
    shifted = old.clone()
    shifted[: NUM_GROUPS // 2] -= 5  # not read
    metrics = worker.update_actor(request(advantages=advantages, old_log_probs=shifted))
    again, *_ = make_worker(halves, "worker.actor.optim.lr=0.3")
    expected = again.update_actor(request(advantages=advantages, old_log_probs=old))
    assert mean(metrics, "actor/ppo_kl") == mean(expected, "actor/ppo_kl") != 0


@pytest.mark.parametrize(("share", "has_old"), [(1, False), (2, True), (2, False), (1, True)])
def test_entropies_are_of_the_policy_that_sampled_and_cost_no_pass(share, has_old):
    """A first mini-batch has them of its own update, the others of the old log-probs' pass, or none."""
    size = NUM_GROUPS // share
    worker, advantages, _ = make_worker(f"worker.actor.global_batch_size={size}", "worker.actor.optim.lr=0.3")
    _, entropies = worker.actor.compute_log_probs(worker.groups, 10_000, True, 0.7)
    lengths = torch.tensor([[len(response) for response in rows] for rows in worker.groups.responses])
    expected = entropies.double().sum(-1) / lengths
    assert worker.mean_entropies(request()).batch["entropy_mean"].isnan().all()
    old = {}
    if has_old:
        first = request()
        first.meta_info["from_second_update"] = True
        old = {"old_log_probs": worker.compute_log_probs(first).batch["old_log_probs"]}
        worker.compute_ref_log_probs(request())  # another policy's
    kept = torch.ones(NUM_GROUPS, 3, dtype=torch.bool)
    kept[0, 1] = False
    worker.update_actor(request(advantages=advantages, kept=kept, **old))
    got = worker.mean_entropies(request()).batch["entropy_mean"]
    expected[0, 1] = math.nan  # no loss has seen it
    if not has_old:
        expected[size:] = math.nan
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    moved = worker.actor.compute_log_probs(worker.groups, 10_000, True, 0.7)[1].double().sum(-1) / lengths
    assert (moved - got).nan_to_num().abs().max() > 1e-2  # not of the policy after the update


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("adapters", [0, 4])
def test_policy_and_reference_leave_image_tokens_out_of_their_distributions(monkeypatch, trainable, adapters):
    from verl.data.processor import load_run_processor, vision_token_ids

    monkeypatch.chdir(Path(__file__).parents[2])
    worker = FSDPWorker(0, 1, load_config([*TOY_CPU, f"worker.actor.model.lora.rank={adapters}"]), "cpu", 10)
    worker.processor = load_run_processor(worker.config)
    wrapped = worker._read_model(trainable)
    banned = vision_token_ids(worker.processor)
    assert len(banned) == 2
    groups, *_ = make_groups(TOY)
    log_probs, entropies = Actor(wrapped, CPU).compute_log_probs(groups, 10_000, True, 1.0)
    prompt, response = groups.prompts[2], groups.responses[2][0]
    model = wrapped.model
    model.set_attn_implementation({"text_config": "sdpa", "vision_config": "sdpa"})
    with torch.no_grad():
        rows = model(input_ids=torch.cat([prompt, response]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1].float()
        rows[:, banned] = -math.inf
        allowed = rows.log_softmax(-1)
    expected = allowed.gather(-1, response.unsqueeze(-1)).squeeze(-1)
    # The toy gives image tokens little: what is left out shows in the tokens' own scores.
    assert wrapped.banned is not None and wrapped.banned.tolist() == banned
    torch.testing.assert_close(log_probs[2, 0, : len(response)], expected, rtol=1e-4, atol=1e-4)
    assert (entropies[2, 0, : len(response)] > 0).all()


def stop(*_):
    raise AssertionError("the GPU is not to be used yet")


@pytest.mark.parametrize("adapters", [0, 4])
def test_a_rank_reads_its_policy_without_the_gpu(monkeypatch, adapters):
    """Whose memory the engine is measuring meanwhile."""
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setattr("torch.cuda._lazy_init", stop)
    worker = FSDPWorker(0, 1, load_config([*TOY_CPU, f"worker.actor.model.lora.rank={adapters}"]), "cuda", 10)
    worker.read()
    assert worker.read_ahead is not None and {each.device.type for each in worker.read_ahead.parameters()} == {"cpu"}


def test_weights_that_are_drawn_on_the_gpu_wait_for_it(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setattr("torch.cuda._lazy_init", stop)
    worker = FSDPWorker(0, 1, load_config([*TOY_CPU, "worker.actor.model.random_weights=true"]), "cuda", 10)
    worker.read()
    assert worker.read_ahead is None and worker.processor is not None


@pytest.mark.parametrize("adapters", [0, 4])
def test_a_policy_that_was_read_ahead_is_the_same_and_no_model_is_read_twice(monkeypatch, adapters):
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setattr("verl.workers.fsdp_worker.init_mesh", lambda *_, **__: None)
    read: list[str] = []
    monkeypatch.setattr(
        "verl.workers.fsdp_worker.load_model", lambda path, *rest: read.append(path) or load_model(path, *rest)
    )
    policies = []
    for reads_ahead in (True, False):
        worker = FSDPWorker(0, 1, load_config([*TOY_CPU, f"worker.actor.model.lora.rank={adapters}"]), "cpu", 10)
        worker._shard = lambda *_: None  # type: ignore[method-assign]
        worker.store = None  # type: ignore[assignment]
        if reads_ahead:
            worker.read()
        worker.load("", 0)
        assert worker.read_ahead is None and len(read) == (1 if adapters else 2)  # with adapters it is the reference
        read.clear()
        policies.append(worker.policy.state_dict())
    torch.testing.assert_close(*policies, rtol=0, atol=0)


def test_weights_move_by_the_rate_of_the_step():
    """SGD's step is the rate times the gradient: the second warm-up step of two moves twice as far as the first."""
    moved = []
    for step in (1, 2):
        worker, advantages, _ = make_worker("worker.actor.optim.lr=0.02", "worker.actor.optim.lr_warmup_steps=2")
        before = torch.cat([w.flatten() for _, w in full_weights(worker.policy)])
        worker.update_actor(request(step, advantages=advantages))
        moved.append(torch.cat([w.flatten() for _, w in full_weights(worker.policy)]) - before)
    torch.testing.assert_close(moved[1], 2 * moved[0], rtol=1e-2, atol=1e-6)
    assert moved[0].norm() > 1e-4


def test_settings_of_an_update_are_those_of_its_role():
    worker, *_ = make_worker(*GAE, "worker.actor.max_grad_norm=0.5", "worker.critic.ppo_epochs=3")
    sections = worker.config.worker.actor, worker.config.worker.critic
    actor, critic = (worker._step_settings(section) for section in sections)
    assert (actor["max_grad_norm"], critic["max_grad_norm"]) == (0.5, 1.0)
    assert (actor["ppo_epochs"], critic["ppo_epochs"]) == (1, 3)
    assert dataclasses.asdict(worker.config)["worker"]["rollout"]["temperature"] == actor["temperature"]


def test_images_that_were_prepared_are_not_prepared_again(monkeypatch):
    rng = np.random.default_rng(0)
    pictures = [random_picture(rng, (56, 56 + 28 * number)) for number in range(3)]
    worker, *_ = make_worker()
    worker.processor = load_run_processor(worker.config)
    seen: list[Any] = []

    def count(images, *arguments, **size):
        seen.extend(images)
        return image_patches(images, *arguments, **size)

    def loaded(images):
        columns = {"images": np.array([[picture] for picture in images], dtype=object)}
        worker._prepare(_images_of(DataProto.from_dict(non_tensors=columns)))
        return [worker.prepared[picture] for picture in images]

    monkeypatch.setattr(fsdp_worker, "image_patches", count)
    first, second, third = pictures
    worker.prepare_images(DataProto.from_dict(non_tensors={"images": np.array([[first], [second]], dtype=object)}))
    ahead = loaded([second, third, second])
    assert seen == [first, second, third]
    worker.prepare_images(DataProto.from_dict(non_tensors={"images": np.array([[third], [first]], dtype=object)}))
    assert seen == [first, second, third] and list(worker.prepared) == [third, first]  # of one batch alone
    worker.prepared.clear()
    for (patches, grid), (expected, expected_grid) in zip(loaded([second, third, second]), ahead, strict=True):
        assert grid == expected_grid and torch.equal(patches, expected)

"""Choices of the algorithm in the real loop with real ranks, updates and checkpoints, over recorded rollouts."""

import json
import signal

import pytest
import torch

from tests.support.cpu_offload import RELEASED
from tests.support.forked_run import kill_at, make_config, make_inputs, run
from tests.support.training import learned, metrics
from verl.export.stored_weights import read_weights
from verl.model.qwen_vl import load_model

pytestmark = pytest.mark.integration

ONE_RANK = ["trainer.n_gpus_per_node=1", "trainer.val_freq=-1", "trainer.max_steps=3"]
CRITIC = ["algorithm.adv_estimator=gae", "worker.critic.global_batch_size=2", "worker.critic.optim.lr=1e-3"]
CRITIC += ["worker.critic.fsdp.torch_dtype=fp32", "worker.critic.fsdp.mp_param_dtype=fp32"]
CRITIC += ["worker.critic.optim.strategy=adamw", "trainer.critic_warmup=2"]
FILTERED = ["algorithm.adv_estimator=remax", "algorithm.online_filtering=true", "data.mini_rollout_batch_size=3"]
FILTERED += ["algorithm.filter_low=0.2", "algorithm.filter_high=0.7", "worker.actor.tis_imp_ratio_cap=2"]
FILTERED += ["algorithm.use_kl_loss=false", "algorithm.kl_type=adaptive", "algorithm.kl_horizon=50"]


PAPER = ["worker.actor.fsdp.torch_dtype=bf16", "worker.actor.fsdp.mp_param_dtype=bf16"]
PAPER += ["worker.actor.optim.strategy=adamw_bf16", "worker.actor.model.freeze_vision_tower=true"]
PAPER += ["worker.actor.model.enable_gradient_checkpointing=true", "worker.actor.ppo_epochs=2"]
PAPER += RELEASED


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


@pytest.mark.parametrize(
    "choices",
    [CRITIC, FILTERED, PAPER],
    ids=[
        "gae with its critic",
        "remax, filtered, penalised",
        "the paper's number formats and offloading, a frozen tower",
    ],
)
def test_a_killed_run_repeats_the_unbroken_one(inputs, tmp_path, choices):
    """Critic, surplus groups, place in the data and adaptive weight come back: every metric agrees bit for bit."""
    assert run(make_config(inputs, tmp_path / "whole", *ONE_RANK, *choices)) == 0
    killed = make_config(inputs, tmp_path / "killed", *ONE_RANK, *choices)
    assert run(killed, kill_at("load_groups", 3)) == -signal.SIGKILL
    assert run(killed) == 0
    expected, actual = (
        {step: learned(row) for step, row in metrics(tmp_path / name).items()} for name in ("whole", "killed")
    )
    assert sorted(expected) == [1, 2, 3] and actual == expected
    if choices is CRITIC:
        assert [("actor/pg_loss" in expected[step], "critic/vf_loss" in expected[step]) for step in (1, 2, 3)] == [
            (False, True),
            (True, True),
            (True, True),
        ]
    elif choices is PAPER:
        stored = read_weights(tmp_path / "killed" / "global_step_3" / "actor")
        base = load_model(str(inputs / "model"), torch.bfloat16).state_dict()
        trained = stored.load([name for name in base if name in stored.entries])
        moved = {name for name, value in trained.items() if not torch.equal(value, base[name])}
        assert any("embed_tokens" in name for name in moved) and not any("visual" in name for name in moved)
        assert any("visual" in name for name in trained)
    else:
        assert all(0.2 < expected[step]["reward/overall"] < 0.7 for step in expected)
        assert any(expected[step]["online_filtering/surplus"] > 0 for step in (1, 2))
        coefs = [expected[step]["actor/kl_coef"] for step in (1, 2, 3)]
        assert coefs[0] == 0.01 and len(set(coefs)) == 3
        assert all("actor/tis_weight" in expected[step] and "actor/kl_loss" not in expected[step] for step in expected)


@pytest.mark.parametrize("choices", [["worker.ref.offload.offload_params=true"], ["worker.actor.model.lora.rank=4"]])
def test_an_exact_divergence_of_a_policy_from_itself_is_zero(inputs, tmp_path, choices):
    """The reference waits in host memory, or is the policy without its adapters, and then the policy moves away."""
    chosen = ["algorithm.kl_penalty=full", "worker.actor.global_batch_size=4", "trainer.max_steps=2", *choices]
    assert run(make_config(inputs, tmp_path / "run", *ONE_RANK, *chosen)) == 0
    rows = metrics(tmp_path / "run")
    assert abs(rows[1]["actor/kl_loss"]) < 1e-6 < rows[2]["actor/kl_loss"]


def test_gradients_that_are_not_finite_end_the_run_and_leave_the_weights(inputs, tmp_path):
    """A learning rate of 1e30 breaks the weights in the first of two updates; all later ones are left out."""
    chosen = ["worker.actor.optim.lr=1e30", "trainer.max_skipped_updates=3", "trainer.max_steps=5"]
    assert run(make_config(inputs, tmp_path / "run", *ONE_RANK, *chosen)) == 2
    output = (tmp_path / "run.log").read_text()
    assert "Step 1: 1 optimizer steps of the actor were left out" in output
    assert "trainer.max_skipped_updates=3. Lower worker.actor.optim.lr" in output
    lines = (tmp_path / "run" / "experiment_log.jsonl").read_text().splitlines()
    assert [json.loads(line)["actor/skipped_steps"] for line in lines] == [1, 2]

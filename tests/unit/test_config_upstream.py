"""Files that were written for EasyR1 or for the release take its defaults, and say so."""

import logging

import pytest
import yaml

from spatialthinker.rewards import REWARDS
from verl.config.loading import load_config
from verl.config.records import Config, ConfigError
from verl.config.upstream import UPSTREAM_DEFAULTS

DATA = ["data.train_files=owner/name", "data.val_files=owner/name", "worker.rollout.n=5"]


@pytest.fixture
def load(tmp_path):
    def write_and_load(content: dict, *arguments: str) -> Config:
        path = tmp_path / "given.yaml"
        path.write_text(yaml.safe_dump(content))
        return load_config([f"config={path}", *DATA, *arguments], (*REWARDS, ""))

    return write_and_load


@pytest.mark.parametrize(
    ("content", "source"),
    [
        ({"worker": {"actor": {"padding_free": True}}}, "easyr1"),
        ({"worker": {"ref": {"fsdp": {"enable_full_shard": True}}}}, "easyr1"),
        ({"worker": {"reward": {"num_cpus": 1}}}, "easyr1"),
        ({"trainer": {"project_name": "easy_r1"}}, "easyr1"),
        ({"worker": {"hybrid_engine": True}, "data": {"text_only": False}}, "release"),
        ({"trainer": {"total_episodes": 3}}, "release"),
        ({"worker": {"reward": {"reward_type": "function", "score_function": "r1v"}}}, "release"),
        ({"defaults": "release"}, "release"),
        ({"defaults": "easyr1", "trainer": {"total_episodes": 3}}, "easyr1"),
    ],
)
def test_a_file_takes_the_defaults_of_the_program_that_it_was_written_for(load, caplog, content, source):
    config, defaults = load(content), UPSTREAM_DEFAULTS[source]
    assert config.algorithm.use_kl_loss is False and config.algorithm.kl_penalty == "kl"
    assert config.algorithm.kl_coef == 1e-3 and config.worker.actor.global_batch_size == 256
    assert config.worker.rollout.val_override_config == {} and config.worker.rollout.tensor_parallel_size == 2
    assert (config.trainer.save_limit, config.trainer.val_freq, config.trainer.save_freq) == (-1, -1, -1)
    assert config.trainer.max_steps is None and config.data.resize_first
    assert config.trainer.find_last_checkpoint is defaults.get("trainer.find_last_checkpoint", True)
    assert config.worker.actor.fsdp.torch_dtype == "fp32" and config.worker.actor.optim.strategy == "adamw"
    assert config.worker.actor.model.trust_remote_code is False
    said = [record.message for record in caplog.records if "defaults=paper takes those here" in record.message]
    assert len(said) == ("defaults" not in content) and all(f"of {source};" in message for message in said)


def test_what_is_given_wins_over_any_defaults(load):
    content = {"worker": {"actor": {"padding_free": True}}, "algorithm": {"kl_coef": 0.5}, "trainer": {"val_freq": 7}}
    config = load(content, "trainer.save_limit=2", "worker.rollout.n=3", "worker.rollout.val_override_config={n: 2}")
    assert (config.algorithm.kl_coef, config.trainer.val_freq, config.trainer.save_limit) == (0.5, 7, 2)
    assert config.worker.rollout.n == 3 and config.worker.rollout.val_override_config == {"n": 2}


@pytest.mark.parametrize("arguments", [["defaults=paper"], []])
def test_the_papers_defaults_hold_where_they_are_asked_for_or_nothing_is_foreign(load, arguments):
    content = {"trainer": {"total_episodes": 3}} if arguments else {"trainer": {"val_freq": 5}}
    config = load(content, *arguments)
    assert config.algorithm.use_kl_loss and config.worker.actor.global_batch_size == 128
    assert config.trainer.n_gpus_per_node == 4 and not config.data.resize_first


def test_the_command_line_chooses_over_the_file_and_needs_none(load):
    assert load({"defaults": "paper"}, "defaults=easyr1").trainer.n_gpus_per_node == 8
    assert load_config([*DATA, "defaults=release"], tuple(REWARDS)).worker.reward.score_function == "math"


@pytest.mark.parametrize("given", ["verl", "", "EasyR1"])
def test_unknown_defaults_are_a_fault(load, given):
    with pytest.raises(ConfigError, match=r"defaults = .*: must be one of paper, easyr1, release"):
        load({"defaults": given})


def test_what_upstream_leaves_to_the_user_is_asked_for(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_config(["defaults=easyr1"], tuple(REWARDS))
    for key in ("data.train_files", "data.val_files", "worker.reward.score_function", "worker.rollout.n = 1"):
        assert any(key in fault for fault in caught.value.faults), key


@pytest.mark.parametrize("name", ["total_epochs", "total_episodes"])
def test_given_epochs_are_not_overruled_by_a_default_number_of_steps(load, caplog, name):
    for config in (load_config([f"trainer.{name}=3"]), load({"trainer": {"total_epochs": 3}})):
        assert (config.trainer.total_epochs, config.trainer.max_steps) == (3, None)
    both = load({"trainer": {"total_epochs": 3, "max_steps": 9}})
    assert (both.trainer.total_epochs, both.trainer.max_steps) == (3, 9)
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        over = load({"trainer": {"max_steps": 9}, "worker": {}}, f"trainer.{name}=4", "defaults=paper")
    assert over.trainer.max_steps == 9
    assert any("trainer.max_steps = 9 ends the run" in record.message for record in caplog.records)


def test_the_type_of_the_reference_must_be_the_actors(load):
    same = load({"worker": {"ref": {"fsdp": {"torch_dtype": None, "mp_param_dtype": "bfloat16"}}}}, "defaults=paper")
    assert same.worker.ref.fsdp.mp_param_dtype == "bf16"
    load({"worker": {"ref": {"fsdp": {"torch_dtype": "fp32", "mp_reduce_dtype": "fp32", "mp_buffer_dtype": "fp32"}}}})
    with pytest.raises(ConfigError, match=r"worker.ref.fsdp.mp_param_dtype = fp32: must be .*bf16"):
        load({}, "worker.ref.fsdp.mp_param_dtype=fp32")


def test_a_warm_up_without_a_critic_is_said(caplog):
    load_config(["trainer.critic_warmup=2"])
    assert "trainer.critic_warmup = 2: grpo has no critic" in caplog.text
    caplog.clear()
    load_config(["trainer.critic_warmup=1"])
    load_config(["trainer.critic_warmup=2", "algorithm.adv_estimator=gae"])
    assert "critic_warmup" not in caplog.text

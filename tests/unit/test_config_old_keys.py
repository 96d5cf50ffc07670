"""Every key of EasyR1 and of SpatialThinker's release, and what becomes of it."""

import pytest

from verl.config.loading import load_config
from verl.config.old_keys import DERIVED_KEYS
from verl.config.records import ConfigError

# A value that the reference trainers accept for each key, as it is written on the command line.
KEYS = {
    "data": {
        "train_files": "owner/name@train",
        "val_files": "owner/name@val",
        "prompt_key": "question",
        "answer_key": "reply",
        "image_key": "image",
        "video_key": "videos",
        "image_dir": ".",
        "video_fps": "2.0",
        "mixed_data": "true",
        "text_only": "true",
        "max_prompt_length": "512",
        "max_response_length": "512",
        "rollout_batch_size": "256",
        "mini_rollout_batch_size": "256",
        "val_batch_size": "-1",
        "format_prompt": "<image> Think first.",
        "override_chat_template": "configs/toy_model/chat_template.jinja",
        "shuffle": "false",
        "seed": "2",
        "min_pixels": "null",
        "max_pixels": "null",
        "filter_overlong_prompts": "false",
        "filter_overlong_prompts_workers": "16",
    },
    "algorithm": {
        "gamma": "1.0",
        "lam": "1.0",
        "adv_estimator": "grpo",
        "disable_kl": "true",
        "use_kl_loss": "true",
        "kl_penalty": "low_var_kl",
        "kl_coef": "1e-3",
        "kl_type": "fixed",
        "kl_horizon": "10000.0",
        "kl_target": "0.1",
        "online_filtering": "true",
        "filter_key": "overall",
        "filter_low": "0.01",
        "filter_high": "0.99",
    },
    "worker": {"hybrid_engine": "true"},
    "worker.actor": {
        "strategy": "fsdp",
        "global_batch_size": "256",
        "micro_batch_size_per_device_for_update": "4",
        "micro_batch_size_per_device_for_experience": "16",
        "max_grad_norm": "1.0",
        "clip_ratio_low": "0.2",
        "clip_ratio_high": "0.3",
        "clip_ratio_dual": "3.0",
        "loss_avg_mode": "token",
        "loss_type": "default",
        "ppo_epochs": "1",
        "padding_free": "true",
        "dynamic_batching": "true",
        "ulysses_sequence_parallel_size": "1",
        "ulysses_size": "1",
        "use_torch_compile": "true",
        "tau_positive": "1.0",
        "tau_negative": "1.05",
    },
    "worker.critic": {
        "strategy": "fsdp",
        "global_batch_size": "256",
        "micro_batch_size_per_device_for_update": "4",
        "micro_batch_size_per_device_for_experience": "16",
        "max_grad_norm": "1.0",
        "cliprange_value": "0.5",
        "ppo_epochs": "1",
        "loss_avg_mode": "token",
        "padding_free": "true",
        "dynamic_batching": "true",
        "ulysses_sequence_parallel_size": "1",
        "ulysses_size": "1",
    },
    "worker.ref": {"strategy": "fsdp"},
    "worker.reward": {
        "reward_type": "function",
        "score_function": "r1v",
        "reward_function": "scripts/report.py:main",
        "reward_function_kwargs": "{a: 1}",
        "skip_special_tokens": "true",
        "num_cpus": "1",
    },
    "worker.rollout": {
        "name": "vllm",
        "n": "4",
        "temperature": "1.0",
        "top_p": "0.99",
        "top_k": "-1",
        "seed": "1",
        "limit_images": "2",
        "dtype": "bf16",
        "gpu_memory_utilization": "0.6",
        "ignore_eos": "false",
        "enforce_eager": "false",
        "enable_chunked_prefill": "false",
        "tensor_parallel_size": "2",
        "max_model_len": "null",
        "max_num_batched_tokens": "8192",
        "max_num_seqs": "1024",
        "disable_log_stats": "true",
        "disable_tqdm": "true",
        "val_override_config": "{n: 1, temperature: 0.5}",
    },
    "trainer": {
        "total_episodes": "10",
        "total_epochs": "15",
        "max_steps": "75",
        "project_name": "easy_r1",
        "experiment_name": "demo",
        "logger": "[console]",
        "nnodes": "1",
        "n_gpus_per_node": "4",
        "max_try_make_batch": "20",
        "critic_warmup": "0",
        "val_freq": "5",
        "val_before_train": "true",
        "val_only": "false",
        "val_generations_to_log": "3",
        "save_freq": "5",
        "save_limit": "3",
        "save_model_only": "true",
        "save_checkpoint_path": "ckpts",
        "load_checkpoint_path": "null",
        "find_last_checkpoint": "true",
        "ray_timeline": "timeline.json",
    },
}
MODEL = {
    "model_path": "owner/name",
    "tokenizer_path": "owner/name",
    "override_config": "{}",
    "enable_gradient_checkpointing": "true",
    "trust_remote_code": "false",
    "freeze_vision_tower": "true",
    "lora.rank": "8",
    "lora.alpha": "64",
    "lora.target_modules": "all-linear",
    "lora.exclude_modules": ".*visual.*",
}
OPTIM = {
    "lr": "1e-6",
    "betas": "[0.9,0.95]",
    "weight_decay": "1e-2",
    "strategy": "adamw_bf16",
    "lr_warmup_ratio": "0.0",
    "min_lr_ratio": "null",
    "warmup_style": "constant",
    "lr_scheduler_type": "cosine",
    "lr_warmup_steps": "null",
}
FSDP = {
    "enable_full_shard": "true",
    "enable_cpu_offload": "false",
    "enable_rank0_init": "true",
    "use_orig_params": "false",
    "torch_dtype": "bf16",
    "fsdp_size": "-1",
    "mp_param_dtype": "bf16",
    "mp_reduce_dtype": "fp32",
    "mp_buffer_dtype": "fp32",
}
OFFLOAD = {"offload_params": "false", "offload_optimizer": "false"}
for role in ("actor", "critic"):
    KEYS |= {f"worker.{role}.model": MODEL, f"worker.{role}.optim": OPTIM}
for role in ("actor", "critic", "ref"):
    KEYS |= {f"worker.{role}.fsdp": FSDP, f"worker.{role}.offload": OFFLOAD}
ALL = {f"{section}.{name}": value for section, values in KEYS.items() for name, value in values.items()}


def faults_of(*arguments: str) -> list[str]:
    try:
        load_config(["worker.actor.global_batch_size=128", "trainer.n_gpus_per_node=4", *arguments])
    except ConfigError as error:
        return error.faults
    return []


@pytest.mark.parametrize("key", ALL)
def test_every_key_of_the_reference_trainers_is_accepted(key):
    faults = faults_of(f"{key}={ALL[key]}")
    if key in DERIVED_KEYS:
        assert "set that instead" in faults[0]
    elif key == "worker.critic.model.lora.rank":
        assert "must be 0, because a critic is trained whole" in faults[0]
    else:
        assert not faults


@pytest.mark.parametrize("key", DERIVED_KEYS)
def test_a_derived_key_cannot_be_set(key):
    fault = next(fault for fault in faults_of(f"{key}=4") if fault.startswith(f"{key} = 4"))
    assert DERIVED_KEYS[key] in fault


@pytest.mark.parametrize(
    ("argument", "word"),
    [
        ("worker.hybrid_engine=false", "must be True"),
        ("worker.reward.reward_type=sequential", "unless its file says REWARD_TYPE = 'sequential'"),
        ("worker.actor.ulysses_size=2", "must be 1"),
        ("worker.actor.ulysses_sequence_parallel_size=4", "must be 1"),
        ("worker.rollout.name=hf", "must be vllm"),
        ("worker.actor.strategy=ddp", "must be fsdp"),
    ],
)
def test_a_settled_key_takes_no_other_value(argument, word):
    (fault,) = faults_of(argument)
    assert word in fault and fault.startswith(argument.partition("=")[0])


def test_old_keys_are_named_once_each(caplog):
    load_config(["worker.actor.padding_free=true", "worker.hybrid_engine=true", "worker.reward.num_cpus=2"])
    notices = [record.getMessage() for record in caplog.records]
    assert [notice.split()[0] for notice in notices] == [
        "worker.hybrid_engine",
        "worker.actor.padding_free",
        "worker.reward.num_cpus",
    ]


# What the reference trainers find out late or never; each is one fault before anything starts.
LATE = [
    ("data.rollout_batch_size=510", "must be a multiple of worker.actor.global_batch_size = 128"),
    ("trainer.n_gpus_per_node=3", "so that ranks share it evenly"),
    ("worker.actor.ulysses_size=3", "must be 1"),
    ("worker.actor.global_batch_size=130", "so that every optimizer step"),
    ("worker.actor.loss_type=dapo", "loss_type"),
    ("worker.actor.loss_avg_mode=sample", "must be one of token"),
    ("algorithm.kl_penalty=k3", "must be one of kl, abs, mse, low_var_kl"),
    ("worker.rollout.temperature=0", "above 0 (training log-probs are divided by it)"),
    ("worker.rollout.val_override_config={n: 0}", "val_override_config.n = 0: must be a whole number"),
    ("worker.rollout.val_override_config={nn: 2}", "val_override_config.nn = 2: unknown key"),
    ("data.format_prompt=./no/such.jinja", "there is no such file"),
    ("data.override_chat_template=none.jinja", "there is no such file"),
    ("data.image_dir=./no/such/folder", "there is no such folder"),
    ("worker.reward.reward_function=no_such.py", "there is no file no_such.py"),
    ("worker.actor.model.tokenizer_path=./missing", "neither a folder nor a hub name"),
    ("trainer.load_checkpoint_path=./global_step_7", "there is no such folder"),
    ("data.mini_rollout_batch_size=100", "must divide data.rollout_batch_size = 512 when nothing is filtered"),
    ("worker.rollout.tensor_parallel_size=3", "must divide trainer.n_gpus_per_node = 4"),
    ("worker.rollout.max_num_batched_tokens=8000", "must be at least data.max_prompt_length"),
    ("worker.rollout.n=1", "got a group of 1"),
    ("algorithm.adv_estimator=gea", "must be one of grpo"),
    ("worker.reward.reward_function=README.md", "must read FILE.py or FILE.py:NAME"),
]


@pytest.mark.parametrize(("argument", "words"), LATE, ids=[argument for argument, _ in LATE])
def test_what_used_to_fail_late_is_a_fault_at_the_start(argument, words):
    assert any(words in fault for fault in faults_of(argument))


def test_a_critic_is_checked_when_there_is_one():
    missing = "worker.critic.model.model_path=./missing"
    assert not faults_of(missing)
    faults = faults_of(missing, "algorithm.adv_estimator=gae", "worker.critic.global_batch_size=100")
    assert any("worker.critic.model.model_path = './missing': is neither" in fault for fault in faults)
    assert any("must be a multiple of worker.critic.global_batch_size = 100" in fault for fault in faults)


def test_what_is_allowed_and_means_something_else_is_said(caplog):
    assert not faults_of("worker.actor.loss_type=cispo", "worker.actor.clip_ratio_low=0", "worker.rollout.top_p=0.9")
    said = [record.getMessage() for record in caplog.records]
    assert "weighs no token less than 1 times" in said[0] and "sampling leaves its tail out" in said[1]
    caplog.clear()
    assert not faults_of("worker.actor.loss_type=cispo", "worker.actor.clip_ratio_low=1") and not caplog.records


@pytest.mark.parametrize(
    ("text", "words"),
    [("{{ content", "is no Jinja template"), ("Think first.", "it uses none"), ("{{ prompt }}", "it uses prompt")],
)
def test_a_template_that_would_lose_the_prompt_is_a_fault(tmp_path, text, words):
    file = tmp_path / "template.jinja"
    file.write_text(text)
    (fault,) = faults_of(f"data.format_prompt={file}")
    assert words in fault

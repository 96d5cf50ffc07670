"""Checks of the models against the configuration, from config.json alone, before weights are loaded."""

import re
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from verl.config.records import AdapterConfig, Config, ConfigError
from verl.model.families import critic_path, model_class, read_config
from verl.model.flops import count_linear
from verl.model.lora import add_adapters
from verl.trainer.memory_estimate import ModelShape, measure_model


def measure_checked_model(config: Config) -> ModelShape:
    """The shape of the policy's model, built on the `meta` device.

    Raises:
        ConfigError: all settings of actor, critic and engine that the models do not support.
    """
    model = config.worker.actor.model
    settings = read_config(model.model_path, model.trust_remote_code, model.override_config)
    faults = [*_engine_faults(config, settings), *_critic_faults(config, settings)]
    with torch.device("meta"):
        built = model_class(settings)(settings)
        shape = measure_model(built)
        if model.lora.rank:
            faults += _adapter_faults(built, model.lora)
            shape = replace(shape, adapters=sum(p.numel() for p in built.parameters() if p.requires_grad))
    if faults:
        raise ConfigError(faults)
    return shape


def _adapter_faults(model: PreTrainedModel, lora: AdapterConfig) -> list[str]:
    try:
        re.compile(lora.exclude_modules or "")
        add_adapters(model, lora, torch.bfloat16, seed=0)
    except ConfigError as error:
        return error.faults
    except re.error as error:
        key = f"worker.actor.model.lora.exclude_modules = {lora.exclude_modules!r}"
        return [f"{key}: is no regular expression ({error}); names of layers look like .*visual.*"]
    return []


def _engine_faults(config: Config, settings: PretrainedConfig) -> Iterator[str]:
    rollout, text = config.worker.rollout, settings.get_text_config()
    if text.num_attention_heads % rollout.tensor_parallel_size:
        yield (
            f"worker.rollout.tensor_parallel_size = {rollout.tensor_parallel_size}: must divide the model's "
            f"{text.num_attention_heads} attention heads; lower it"
        )
    yield from _linear_attention_faults(config, text)
    num_experts = getattr(text, "num_experts", 0)
    if num_experts % rollout.tensor_parallel_size:
        yield (
            f"worker.rollout.tensor_parallel_size = {rollout.tensor_parallel_size}: must divide the model's "
            f"{num_experts} experts; lower it"
        )
    choices = ("routing_replay", config.worker.actor), ("experts", config.worker.actor.model.lora)
    for name, section in choices if not num_experts else ():
        if getattr(section, name):
            key = "worker.actor.routing_replay" if name == "routing_replay" else "worker.actor.model.lora.experts"
            yield f"{key} = true: the model has no experts; set it to false"
    names: Any = settings.architectures
    if (known := _engine_classes()) is not None and f'"{names[0]}"' not in known:
        yield (
            f"worker.actor.model.model_path = {config.worker.actor.model.model_path!r}: the installed vLLM has no "
            f"{names[0]}; install one that has, or name another model"
        )
    longest = config.data.max_prompt_length + config.data.max_response_length
    stretched = (getattr(text, "rope_parameters", None) or {}).get("factor", 1.0)
    limit = int(text.max_position_embeddings * stretched)
    if max(longest, rollout.max_model_len or 0) > limit:
        knob = "worker.rollout.max_model_len" if longest <= limit else "data.max_prompt_length + max_response_length"
        yield (
            f"{knob} = {max(longest, rollout.max_model_len or 0)}: the model has positions for {limit} tokens; lower "
            "it, or stretch them with worker.actor.model.override_config"
        )


def _linear_attention_faults(config: Config, text: Any) -> Iterator[str]:
    if not count_linear(text):
        return
    rollout = config.worker.rollout
    heads = text.linear_num_key_heads
    if heads % rollout.tensor_parallel_size:
        yield (
            f"worker.rollout.tensor_parallel_size = {rollout.tensor_parallel_size}: must divide the model's {heads} "
            "key heads of linear attention; lower it"
        )
    if not rollout.enable_chunked_prefill:
        yield (
            "worker.rollout.enable_chunked_prefill = false: vLLM hands a prompt's states of linear attention to all "
            "its samples only where it reads prompts in pieces; set it to true"
        )
    wanted = config.trainer.device
    is_cpu = wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available())
    if is_cpu and rollout.dtype != "bf16":
        yield (
            f"worker.rollout.dtype = {rollout.dtype!r}: on a CPU vLLM computes the linear attention of this model in "
            "bf16 alone; set it to bf16"
        )


def _engine_classes() -> str | None:
    """The text of vLLM's table of models, read without the seconds that its import takes; None where it is not."""
    spec = find_spec("vllm")
    table = Path(spec.origin).parent / "model_executor" / "models" / "registry.py" if spec and spec.origin else None
    return table.read_text() if table and table.is_file() else None


def _critic_faults(config: Config, settings: PretrainedConfig) -> Iterator[str]:
    if config.algorithm.adv_estimator != "gae":
        return
    critic = config.worker.critic.model
    try:
        path = critic_path(config)
        own = read_config(path, critic.trust_remote_code, critic.override_config, "worker.critic.model")
    except ConfigError as error:
        yield from error.faults
        return
    for name in ("image_token_id", "vocab_size"):
        theirs, ours = (_number(part, name) for part in (own, settings))
        if theirs != ours:
            yield (
                f"worker.critic.model.model_path = {path!r}: its {name} is {theirs} and the actor's is {ours}; they "
                "read the same token ids, so name a model of the actor's family, or null for the actor's own"
            )


def _number(settings: PretrainedConfig, name: str) -> int | None:
    return getattr(settings, name, None) or getattr(settings.get_text_config(), name, None)

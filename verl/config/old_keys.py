"""Keys of EasyR1 and of SpatialThinker's release that are no keys of `verl.config.records`: what becomes of each.

A renamed key is taken under its new name. A settled key asks for what always holds here, so it is taken and changes
nothing; a value that asks for something else is a fault. A derived key is computed from others and is never set.
"""

import logging
from collections.abc import Mapping
from typing import Any

_MODELS = ("worker.actor", "worker.critic")

RENAMED_KEYS = {
    "trainer.total_episodes": "trainer.total_epochs",
    "worker.reward.num_cpus": "worker.reward.num_processes",
    **{f"{model}.optim.warmup_style": f"{model}.optim.lr_scheduler_type" for model in _MODELS},
}

_ANY = None
_SEQUENCE_PARALLEL = "ranks share a batch by groups, not by parts of a sequence"
_PACKED = "prompts and responses are always packed without padding"

SETTLED_KEYS: dict[str, tuple[tuple[Any, ...] | None, str]] = {
    "data.filter_overlong_prompts_workers": (_ANY, "prompt lengths are computed from image headers, in one process"),
    "worker.hybrid_engine": ((True,), "actor and engine always share their devices"),
    "worker.reward.reward_type": (
        ("function", "batch"),
        "a reward is always a function, of all items at once unless its file says REWARD_TYPE = 'sequential'",
    ),
    "worker.rollout.name": (("vllm",), "the engine is always vLLM"),
    "worker.rollout.disable_tqdm": (_ANY, "the engine shows no bar"),
}
"""Key -> values that may be given (None: any), and why nothing follows from them."""

for _model in _MODELS:
    SETTLED_KEYS |= {
        f"{_model}.strategy": (("fsdp", "fsdp2"), "models are always sharded by FSDP2"),
        f"{_model}.padding_free": (_ANY, _PACKED),
        f"{_model}.dynamic_batching": (_ANY, "micro-batches are always filled up to a budget of tokens"),
        f"{_model}.ulysses_size": ((1,), _SEQUENCE_PARALLEL),
        f"{_model}.ulysses_sequence_parallel_size": ((1,), _SEQUENCE_PARALLEL),
    }
SETTLED_KEYS |= {
    "worker.actor.use_torch_compile": (_ANY, "log-probs are computed in pieces and need no compilation"),
    "worker.ref.strategy": SETTLED_KEYS["worker.actor.strategy"],
    "worker.ref.offload.offload_optimizer": (_ANY, "a reference has no optimizer"),
    "worker.ref.fsdp.torch_dtype": (_ANY, "a reference is kept in the type that it computes in"),
    "worker.ref.fsdp.mp_reduce_dtype": (_ANY, "a reference has no gradients"),
    "worker.critic.model.tokenizer_path": (_ANY, "the critic reads the token ids of the actor's prompts"),
    "worker.critic.model.lora.rank": ((0,), "a critic is trained whole"),
    **{
        f"worker.critic.model.lora.{name}": (_ANY, "a critic is trained whole, without adapters")
        for name in ("alpha", "target_modules", "exclude_modules")
    },
}
for _model in (*_MODELS, "worker.ref"):
    SETTLED_KEYS |= {
        f"{_model}.fsdp.enable_full_shard": ((True,), "parameters are always sharded over all ranks"),
        f"{_model}.fsdp.enable_rank0_init": (_ANY, "every rank reads the weights that it keeps"),
        f"{_model}.fsdp.use_orig_params": (_ANY, "FSDP2 has only original parameters"),
        f"{_model}.fsdp.fsdp_size": ((-1,), "parameters are always sharded over all ranks"),
        f"{_model}.fsdp.mp_buffer_dtype": (_ANY, "buffers keep the type that the model gives them"),
    }

_BATCH = "worker.actor.global_batch_size, worker.rollout.n and the number of ranks"

DERIVED_KEYS: dict[str, str] = {
    **{f"{model}.global_batch_size_per_device": _BATCH for model in _MODELS},
    **{f"{model}.optim.training_steps": "trainer.max_steps, or trainer.total_epochs" for model in _MODELS},
    **{f"worker.actor.{name}": f"algorithm.{name}" for name in ("disable_kl", "use_kl_loss", "kl_penalty", "kl_coef")},
    "worker.ref.micro_batch_size_per_device_for_experience": (
        "worker.actor.micro_batch_size_per_device_for_experience"
    ),
    **{
        f"worker.ref.{name}": f"worker.actor.{name}"
        for name in (
            "padding_free",
            "dynamic_batching",
            "ulysses_size",
            "ulysses_sequence_parallel_size",
            "use_torch_compile",
        )
    },
    "worker.rollout.prompt_length": "data.max_prompt_length",
    "worker.rollout.response_length": "data.max_response_length",
    "worker.rollout.trust_remote_code": "worker.actor.model.trust_remote_code",
    "worker.reward.reward_function_name": "worker.reward.reward_function=FILE.py:NAME",
}
"""Key -> the key or keys that it follows from."""

NULL_IS_DEFAULT = ("trainer.save_checkpoint_path",)
"""Keys that upstream's files set to null for the default that they have here."""

_ABSENT = object()


def explain_old_key(key: str) -> str | None:
    """Sentence on what has become of the key; None for one that never was."""
    if key in RENAMED_KEYS:
        return f"is now called {RENAMED_KEYS[key]}"
    if key in SETTLED_KEYS:
        return f"is not needed: {SETTLED_KEYS[key][1]}"
    return f"follows from {DERIVED_KEYS[key]}; set that instead" if key in DERIVED_KEYS else None


def take_old_keys(source: dict[str, Any], faults: dict[str, str]) -> dict[str, Any]:
    """The source with new keys in place of old ones, one notice for each; those that cannot be taken go to faults."""
    for key in DERIVED_KEYS:
        value = _pop(source, key)
        if value is not _ABSENT:
            faults[key] = f"{key} = {value!r}: {explain_old_key(key)}"
    for key, (allowed, reason) in SETTLED_KEYS.items():
        value = _pop(source, key)
        if value is _ABSENT:
            continue
        if allowed is None or value in allowed:
            _notice("%s %s", key, explain_old_key(key))
        else:
            choices = " or ".join(map(str, allowed))
            faults[key] = f"{key} = {value!r}: must be {choices}, because {reason}; leave it out"
    for old, new in RENAMED_KEYS.items():
        value = _pop(source, old)
        if value is _ABSENT:
            continue
        if _pop(source, new) is not _ABSENT:
            faults[old] = f"{old}: is the old name of {new}, and both are given; drop {old}"
        _notice("%s %s; taken as that", old, explain_old_key(old))
        _put(source, new, value)
    for key in NULL_IS_DEFAULT:
        value = _pop(source, key)
        if value is not _ABSENT and value is not None:
            _put(source, key, value)
    return source


def nest(key: str, value: Any, section: dict[str, Any] | None = None) -> dict[str, Any]:
    """Nested dictionaries, new ones unless given, with the value at a dotted key."""
    section = {} if section is None else section
    _put(section, key, value)
    return section


def find_value(section: Any, key: str, default: Any = None) -> Any:
    """The value of a dotted key in nested dictionaries, or the default."""
    for name in key.split("."):
        if not isinstance(section, Mapping) or name not in section:
            return default
        section = section[name]
    return section


def _notice(text: str, *values: str | None) -> None:
    logging.getLogger(__name__).warning(text, *values)


def _pop(section: Any, key: str) -> Any:
    """Takes the value of a dotted key out of nested dictionaries, and sections that are empty without it."""
    name, _, rest = key.partition(".")
    if not isinstance(section, dict) or name not in section:
        return _ABSENT
    if not rest:
        return section.pop(name)
    value = _pop(section[name], rest)
    if value is not _ABSENT and section[name] == {}:
        del section[name]
    return value


def _put(section: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for part in sections:
        section = section.setdefault(part, {})
    section[name] = value

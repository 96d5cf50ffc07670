"""`find_faults`: what fields of the configuration cannot say alone, checked once before Ray starts, all together.

Each fault names the key, its value, the limit and what to change.
"""

import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from verl.config.choices import read_names
from verl.config.mixtures import find_mixture_faults
from verl.config.records import Config, DataConfig
from verl.config.sources import find_source_faults, list_sources

_SAMPLING_LIMITS: dict[str, tuple[Any, str, Callable[[Any], bool]]] = {
    "n": (int, "a whole number, at least 1", lambda value: value >= 1),
    "temperature": ((int, float), "a number, at least 0", lambda value: value >= 0),
    "top_p": ((int, float), "a number above 0 and at most 1", lambda value: 0 < value <= 1),
    "top_k": (int, "a whole number, at least 1, or -1", lambda value: value >= 1 or value == -1),
}
_VALIDATION_LIMITS = _SAMPLING_LIMITS | {
    "min_p": ((int, float), "a number from 0 to 1", lambda value: 0 <= value <= 1),
    "repetition_penalty": ((int, float), "a number above 0", lambda value: value > 0),
    "presence_penalty": ((int, float), "a number from -2 to 2", lambda value: -2 <= value <= 2),
    "frequency_penalty": ((int, float), "a number from -2 to 2", lambda value: -2 <= value <= 2),
}


def find_faults(
    config: Config, score_functions: Sequence[str] | None = None, unreadable: Collection[str] = ()
) -> list[str]:
    """One sentence per fault of the configuration: what does not fit together or is not there.

    Args:
        config: the configuration; paths are looked up on this machine.
        score_functions: the rewards that `worker.reward.score_function` may name; None accepts any name.
        unreadable: keys that hold their default because the given value could not be taken. Sentences about these are
            left out: they would not speak of what was meant.
    """
    faults = (
        *_batch_faults(config),
        *_algorithm_faults(config),
        *_reference_faults(config),
        *_rollout_faults(config),
        *_validation_faults(config),
        *_reward_faults(config, score_functions),
        *find_source_faults(config, score_functions),
        *_path_faults(config),
    )
    return [text for text in faults if not any(key in text for key in unreadable)]


def find_notices(config: Config) -> list[str]:
    """One sentence per choice that is allowed and means something else than it may seem to."""
    actor, rollout = config.worker.actor, config.worker.rollout
    notices = []
    if actor.loss_type == "cispo" and actor.clip_ratio_low < 1:
        notices.append(
            f"worker.actor.clip_ratio_low = {actor.clip_ratio_low}: cispo then weighs no token less than "
            f"{1 - actor.clip_ratio_low:g} times; 1 leaves the weights without a lower bound"
        )
    if config.trainer.critic_warmup > 1 and config.algorithm.adv_estimator != "gae":
        notices.append(
            f"trainer.critic_warmup = {config.trainer.critic_warmup}: {config.algorithm.adv_estimator} has no critic, "
            "so the steps before that one train nothing; set it to 0"
        )
    if rollout.top_p < 1 or rollout.top_k != -1:
        notices.append(
            f"worker.rollout.top_p = {rollout.top_p}, top_k = {rollout.top_k}: training log-probs are those of the "
            "whole distribution, sampling leaves its tail out; actor/rollout_kl shows the gap"
        )
    algorithm = config.algorithm
    if algorithm.use_kl_loss and algorithm.kl_penalty == "kl" and algorithm.kl_coef and not algorithm.disable_kl:
        notices.append(
            "algorithm.kl_penalty = kl with use_kl_loss = true: the gradient of this term is zero on average, so that "
            "nothing holds the policy at the reference; low_var_kl, mse and full do"
        )
    notices.extend(_optimizer_notices(config))
    return notices


def _optimizer_notices(config: Config) -> Iterator[str]:
    """Notices on an optimizer and a type of weights that are not made for each other."""
    roles: dict[str, Any] = {"actor": config.worker.actor}
    if config.algorithm.adv_estimator == "gae":
        roles["critic"] = config.worker.critic
    for name, role in roles.items():
        pair = f"worker.{name}.optim.strategy = {role.optim.strategy}, fsdp.torch_dtype = {role.fsdp.torch_dtype}: "
        match role.optim.strategy, role.fsdp.torch_dtype:
            case "adamw", "bf16":
                yield pair + (
                    "bf16 weights lose every update below a 512th of them, at small learning rates nearly all; set "
                    "fsdp.torch_dtype=fp32, or optim.strategy=adamw_bf16"
                )
            case "adamw_bf16", "fp32":
                yield pair + "weights in float32 are trained by adamw, with states in float32"


def split_path(text: str, mark: str) -> tuple[str, str]:
    """The path in front of the last mark, and the rest from the mark on; a path that holds the mark itself is kept."""
    if not mark or mark not in text or os.path.exists(text):
        return text, ""
    path, _, rest = text.rpartition(mark)
    return path, mark + rest


def _is_multiple(number: int, divisor: int) -> bool:
    return divisor > 0 and number % divisor == 0


def _batch_faults(config: Config) -> Iterator[str]:
    data, actor, ranks = config.data, config.worker.actor, config.num_ranks
    roles = {"actor": actor.global_batch_size}
    if config.algorithm.adv_estimator == "gae":
        roles["critic"] = config.worker.critic.global_batch_size
    for role, size in roles.items():
        if not _is_multiple(data.rollout_batch_size, size):
            yield (
                f"data.rollout_batch_size = {data.rollout_batch_size}: must be a multiple of "
                f"worker.{role}.global_batch_size = {size}, so that every optimizer step of a training step has as "
                "many prompts; change one of the two"
            )
    sizes = {f"worker.{role}.global_batch_size": size for role, size in roles.items()}
    for key, size in ({"data.rollout_batch_size": data.rollout_batch_size} | sizes).items():
        if not _is_multiple(size, ranks):
            yield (
                f"{key} = {size}: must be a multiple of trainer.nnodes x trainer.n_gpus_per_node = {ranks}, "
                "so that ranks share it evenly; change one of them"
            )
    mini = data.mini_rollout_batch_size
    if mini and not config.algorithm.online_filtering and not _is_multiple(data.rollout_batch_size, mini):
        yield (
            f"data.mini_rollout_batch_size = {mini}: must divide data.rollout_batch_size = {data.rollout_batch_size} "
            "when nothing is filtered; change one of the two, or set algorithm.online_filtering=true"
        )
    if data.min_pixels and data.max_pixels and data.min_pixels > data.max_pixels:
        yield f"data.min_pixels = {data.min_pixels}: must be at most data.max_pixels = {data.max_pixels}"


def _algorithm_faults(config: Config) -> Iterator[str]:
    algorithm, n = config.algorithm, config.worker.rollout.n
    if algorithm.adv_estimator in read_names("advantages", "GROUP_ESTIMATORS") and n == 1:
        yield (
            f"worker.rollout.n = 1: {algorithm.adv_estimator} compares responses of one prompt, got a group of 1; "
            "raise worker.rollout.n"
        )
    if algorithm.kl_type == "adaptive" and not algorithm.disable_kl:
        for key, value in (("kl_target", algorithm.kl_target), ("kl_horizon", algorithm.kl_horizon)):
            if value <= 0:
                yield f"algorithm.{key} = {value}: must be above 0 with algorithm.kl_type=adaptive; raise it"
    if algorithm.online_filtering and algorithm.filter_low >= algorithm.filter_high:
        yield (
            f"algorithm.filter_low = {algorithm.filter_low}: must be below algorithm.filter_high = "
            f"{algorithm.filter_high}, or no group is ever kept; lower it"
        )


def _reference_faults(config: Config) -> Iterator[str]:
    given, actors = config.worker.ref.fsdp.mp_param_dtype, config.worker.actor.fsdp.mp_param_dtype
    if given not in (None, actors):
        yield (
            f"worker.ref.fsdp.mp_param_dtype = {given}: must be worker.actor.fsdp.mp_param_dtype = {actors}, or the "
            "divergence would measure the types; change one of the two, or leave it out"
        )


def _rollout_faults(config: Config) -> Iterator[str]:
    rollout = config.worker.rollout
    longest = config.data.max_prompt_length + config.data.max_response_length
    lengths = f"data.max_prompt_length + data.max_response_length = {longest}"
    served = rollout.max_model_len or longest
    if served < longest:
        yield f"worker.rollout.max_model_len = {served}: must be at least {lengths}; raise it, or set it to null"
    if rollout.max_num_batched_tokens < longest:
        yield (
            f"worker.rollout.max_num_batched_tokens = {rollout.max_num_batched_tokens}: must be at least {lengths}; "
            "raise it or lower a length"
        )
    elif rollout.max_num_batched_tokens < served and not rollout.enable_chunked_prefill:
        yield (
            f"worker.rollout.max_num_batched_tokens = {rollout.max_num_batched_tokens}: must be at least "
            f"worker.rollout.max_model_len = {served}; raise it, or set worker.rollout.enable_chunked_prefill=true"
        )
    if not _is_multiple(config.trainer.n_gpus_per_node, rollout.tensor_parallel_size):
        yield (
            f"worker.rollout.tensor_parallel_size = {rollout.tensor_parallel_size}: must divide "
            f"trainer.n_gpus_per_node = {config.trainer.n_gpus_per_node}, for an engine lies on one machine; lower it"
        )


def _validation_faults(config: Config) -> Iterator[str]:
    key, override = "worker.rollout.val_override_config", config.worker.rollout.val_override_config
    for name in override:
        if name not in _VALIDATION_LIMITS:
            yield f"{key}.{name} = {override[name]!r}: unknown key; it may hold {', '.join(_VALIDATION_LIMITS)}"
    sampling = {name: getattr(config.worker.rollout, name) for name in _SAMPLING_LIMITS}
    sampling |= {name: value for name, value in override.items() if name in _VALIDATION_LIMITS}
    wrong = {
        name: f"{key}.{name} = {value!r}: must be {limit}"
        for name, value in sampling.items()
        for kinds, limit, holds in [_VALIDATION_LIMITS[name]]
        if isinstance(value, bool) or not isinstance(value, kinds) or not holds(value)
    }
    yield from wrong.values()
    if not wrong and sampling["temperature"] == 0 and sampling["n"] > 1:
        yield (
            f"{key}.n = {sampling['n']}: at temperature 0 all responses of a prompt are the same; "
            f"set {key}.n=1, or raise {key}.temperature"
        )


def _reward_faults(config: Config, score_functions: Sequence[str] | None) -> Iterator[str]:
    reward = config.worker.reward
    yield from find_mixture_faults(reward.mixtures, score_functions)
    if reward.reward_function is None:
        if score_functions is not None and reward.score_function not in (*score_functions, *reward.mixtures):
            known = ", ".join((*score_functions, *reward.mixtures))
            yield (
                f"worker.reward.score_function = {reward.score_function!r}: must be one of {known}; for your own set "
                "worker.reward.reward_function=FILE.py:NAME"
            )
        return
    path, name = split_path(reward.reward_function, ":")
    if not (name or ":main")[1:].isidentifier() or not path.endswith(".py"):
        yield f"worker.reward.reward_function = {reward.reward_function!r}: must read FILE.py or FILE.py:NAME"
    elif not os.path.isfile(path):
        yield f"worker.reward.reward_function = {reward.reward_function!r}: there is no file {path}"


def _path_faults(config: Config) -> Iterator[str]:
    data, trainer, model_path = config.data, config.trainer, config.worker.actor.model.model_path
    named = (("data.train_files", data.train_files), ("data.val_files", data.val_files))
    for key, locator in ((key, source.path) for key, files in named for source in list_sources(files)):
        path, split = split_path(locator, "@")
        if split == "@" or not (os.path.exists(path) or _is_hub_name(path)):
            yield f"{key} = {locator!r}: is no file, folder or hub name, with or without @SPLIT; correct it"
    yield from _template_faults(data)
    if data.image_dir is not None and not os.path.isdir(data.image_dir):
        yield f"data.image_dir = {data.image_dir!r}: there is no such folder; correct it, or set it to null"
    models = config.worker.actor.model, config.worker.critic.model
    paths = {
        "actor.model.model_path": (model_path, "config.json"),
        "actor.model.tokenizer_path": (models[0].tokenizer_path or model_path, ""),
    }
    if config.algorithm.adv_estimator == "gae" and models[1].model_path:
        paths["critic.model.model_path"] = (models[1].model_path, "config.json")
    for key, (path, file) in paths.items():
        if not (os.path.exists(path) or _is_hub_name(path)):
            yield f"worker.{key} = {path!r}: is neither a folder nor a hub name; correct it"
        elif os.path.exists(path) and not os.path.exists(os.path.join(path, file)):
            yield f"worker.{key} = {path!r}: holds no {file}; give a Hugging Face folder"
    for key in ("project_name", "experiment_name"):
        name = getattr(trainer, key)
        if ".." in name.split("/") or name.startswith(("/", "~")) or not name.isprintable():
            yield f"trainer.{key} = {name!r}: leaves the runs' folder; write a name without '..' and a leading '/'"
    if os.path.exists(trainer.save_checkpoint_path) and not os.path.isdir(trainer.save_checkpoint_path):
        yield f"trainer.save_checkpoint_path = {trainer.save_checkpoint_path!r}: is a file; name a folder"
    loaded = trainer.load_checkpoint_path
    if loaded is not None:
        if not re.fullmatch(r"global_step_\d+", os.path.basename(os.path.normpath(loaded))):
            yield f"trainer.load_checkpoint_path = {loaded!r}: must end in global_step_N; name one checkpoint's folder"
        elif not os.path.isdir(loaded):
            yield f"trainer.load_checkpoint_path = {loaded!r}: there is no such folder; correct it, or set it to null"


def _template_faults(data: DataConfig) -> Iterator[str]:
    if data.format_prompt is not None and is_path(data.format_prompt):
        yield from _format_prompt_faults(data.format_prompt)
    path = data.override_chat_template
    if path is not None and not os.path.isfile(path):
        yield f"data.override_chat_template = {path!r}: there is no such file; correct the path, or set it to null"
    elif path is not None:
        try:
            Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            yield f"data.override_chat_template = {path!r}: is not UTF-8 ({error}); save it in that encoding"


def _format_prompt_faults(path: str) -> Iterator[str]:
    from jinja2 import TemplateSyntaxError, meta
    from jinja2.sandbox import SandboxedEnvironment

    fault = f"data.format_prompt = {path!r}: "
    if not os.path.isfile(path):
        yield fault + "there is no such file; correct the path, or give a text of several words"
        return
    try:
        with open(path, encoding="utf-8") as file:
            used = meta.find_undeclared_variables(SandboxedEnvironment().parse(file.read()))
    except (TemplateSyntaxError, UnicodeDecodeError) as error:
        yield f"{fault}is no Jinja template ({error}); correct the file"
        return
    if used != {"content"}:
        names = ", ".join(sorted(used)) or "none"
        yield f"{fault}must use the variable content alone, it uses {names}; put {{{{ content }}}} into the file"


def is_path(format_prompt: str) -> bool:
    """True if a format_prompt names a file: it exists, or it is one word that ends like a path."""
    one_word = len(format_prompt.split()) == 1
    return os.path.isfile(format_prompt) or one_word and ("/" in format_prompt or "." in format_prompt)


def _is_hub_name(text: str) -> bool:
    """True if the text reads `owner/name`; a path into an existing folder does not, it is a mistyped path."""
    return re.fullmatch(r"[\w.-]*\w/[\w.-]+", text) is not None and not os.path.isdir(text.partition("/")[0])

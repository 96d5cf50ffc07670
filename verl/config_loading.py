"""`load_config`: from `config=FILE a.b=value ...` to a checked configuration, or one error that lists every fault."""

import dataclasses
import difflib
import logging
import math
import os
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from verl.config import Config, ConfigError, RolloutDtype, TrainDtype, TrainerConfig
from verl.config_checks import find_faults, find_notices, split_path
from verl.config_keys import take_old_keys

_DTYPE_SPELLINGS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", None: "fp32"}
_DTYPE_SPELLINGS |= {16: "fp16", "16": "fp16", 32: "fp32", "32": "fp32"}
# Keys that name a file or folder, and the mark after which something else may follow.
_PATH_KEYS = {
    "data.train_files": "@",
    "data.val_files": "@",
    "data.image_dir": "",
    "data.format_prompt": "",
    "data.override_chat_template": "",
    "worker.actor.model.model_path": "",
    "worker.critic.model.model_path": "",
    "worker.actor.model.tokenizer_path": "",
    "worker.reward.reward_function": ":",
    "trainer.load_checkpoint_path": "",
}


def load_config(argv: Sequence[str], score_functions: Sequence[str] | None = None) -> Config:
    """The checked configuration that `config=FILE a.b=value ...` asks for.

    The command line wins over the file, the file over the defaults; dictionaries are merged key by key. Values are
    parsed as YAML. A path that exists becomes absolute, so that workers started in another folder find it.

    Args:
        argv: the arguments, without the program's name.
        score_functions: the rewards that `worker.reward.score_function` may name; None accepts any name.

    Raises:
        ConfigError: listing every fault: unknown keys with the nearest known one, wrong types, and all that
            `verl.config_checks.find_faults` finds.
    """
    faults: dict[str, str] = {}
    merged: dict[str, Any] = {}
    for source in _read_sources(argv, faults):
        merged = _merge(merged, take_old_keys(source, faults))
    config = _build(Config, merged, "", faults)
    config = _resolve_paths(config, config.trainer)
    checked = find_faults(config, score_functions, unreadable=list(faults))
    if faults or checked:
        raise ConfigError([*faults.values(), *checked])
    for notice in find_notices(config):
        logging.getLogger(__name__).warning(notice)
    return config


def config_to_dict(config: Any) -> dict[str, Any]:
    """The configuration, or one section, as nested plain dictionaries and lists, ready for JSON or YAML."""
    section = config if isinstance(config, dict) else dataclasses.asdict(config)
    return {
        key: config_to_dict(value) if isinstance(value, dict) else list(value) if isinstance(value, tuple) else value
        for key, value in section.items()
    }


def _read_sources(argv: Sequence[str], faults: dict[str, str]) -> list[dict[str, Any]]:
    """The file's keys, then the command line's, as nested dictionaries."""
    command_line: dict[str, Any] = {}
    file: dict[str, Any] = {}
    for token in argv:
        key, equals, text = token.partition("=")
        if not equals or not key:
            faults[token] = f"{token!r}: an argument must read key=value; put = between the key and its value"
            continue
        try:
            if key == "config":
                file = _plain(OmegaConf.load(text))
            else:
                command_line = _merge(command_line, _plain(OmegaConf.from_dotlist([token])))
        except OSError as error:
            faults[key] = f"config = {text!r}: cannot be read ({error.strerror}); give config= an existing YAML file"
        except (YAMLError, OmegaConfBaseException) as error:
            reason = getattr(error, "problem", None) or " ".join(str(error).split())
            faults[key] = f"{key} = {text!r}: is not YAML ({reason}); put quotes around the text inside the value"
    return [file, command_line]


def _plain(node: Any) -> dict[str, Any]:
    content = OmegaConf.to_container(node, resolve=True)
    if not isinstance(content, dict):
        raise YAMLError("the file must hold sections such as data: and trainer:")
    return {str(key): value for key, value in content.items()}


def _merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    both = {key: _merge(low[key], high[key]) for key in low.keys() & high.keys() if _are_dicts(low[key], high[key])}
    return {**low, **high, **both}


def _are_dicts(*values: Any) -> bool:
    return all(isinstance(value, dict) for value in values)


def _build(record: type, section: dict[str, Any], prefix: str, faults: dict[str, str]) -> Any:
    """The record with the section's values; what cannot be taken goes to faults and leaves the default."""
    hints = typing.get_type_hints(record)
    values: dict[str, Any] = {}
    for name, value in section.items():
        key = prefix + name
        try:
            if name not in hints:
                raise ValueError(f"unknown key; {_suggestion(key)}")
            if dataclasses.is_dataclass(hints[name]):
                if not isinstance(value, dict):
                    raise ValueError(f"is a section; set its keys, such as {key}.{next(iter(_keys(hints[name], '')))}")
                values[name] = _build(typing.cast(type, hints[name]), value, f"{key}.", faults)
            else:
                default = getattr(record(), name)
                values[name] = _convert(hints[name], _merge(default, value) if _are_dicts(default, value) else value)
        except ValueError as error:
            faults[key] = f"{key} = {value!r}: {error}"
    return record(**values)


def _convert(hint: Any, value: Any) -> Any:
    """The value as the annotated type.

    Raises:
        ValueError: saying what is allowed.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in (TrainDtype, RolloutDtype):
        value = _DTYPE_SPELLINGS.get(value, value)
    if origin is types.UnionType:
        return None if value is None else _convert(arguments[0], value)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"must be one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"must be a list, such as [{value}]")
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise ValueError(f"must hold {len(arguments)} values")
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_convert(kind, item) for kind, item in zip(kinds, value, strict=True))
    return _convert_plain(origin or hint, value)


def _convert_plain(kind: type, value: Any) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise ValueError("must be finite")
    if type(value) is not kind:
        needs = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a dictionary"}
        quote = f"; quote it: '\"{value}\"'" if kind is str and value is not None else ""
        raise ValueError(f"must be {needs[kind]}{quote}")
    return value


def _keys(record: Any, prefix: str) -> list[str]:
    """Every key of the record and of its sections, in order."""
    keys = []
    for name, hint in typing.get_type_hints(record).items():
        keys += _keys(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else [prefix + name]
    return keys


def _suggestion(key: str) -> str:
    keys = _keys(Config, "")
    leaf = key.rpartition(".")[2]
    same_leaf = [known for known in keys if known.rpartition(".")[2] == leaf]
    near = same_leaf[:1] or difflib.get_close_matches(key, keys, n=1, cutoff=0.0)
    return f"did you mean {near[0]}?"


def _resolve_paths(section: Any, trainer: TrainerConfig, prefix: str = "") -> Any:
    """The section with the names in save_checkpoint_path filled in and with existing relative paths made absolute."""
    changes: dict[str, Any] = {}
    for item in dataclasses.fields(section):
        key, value = prefix + item.name, getattr(section, item.name)
        if dataclasses.is_dataclass(value):
            changes[item.name] = _resolve_paths(value, trainer, f"{key}.")
        elif key == "trainer.save_checkpoint_path":
            for name in ("project_name", "experiment_name"):
                value = value.replace(f"{{{name}}}", getattr(trainer, name))
            changes[item.name] = os.path.abspath(value)
        elif key in _PATH_KEYS and value:
            path, suffix = split_path(value, _PATH_KEYS[key])
            changes[item.name] = os.path.abspath(path) + suffix if os.path.exists(path) else value
    return dataclasses.replace(section, **changes)

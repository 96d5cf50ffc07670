"""`load_config`: from `config=FILE a.b=value ...` to a checked configuration, or one error that lists every fault."""

import dataclasses
import functools
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from verl.config.checks import find_faults, find_notices, split_path
from verl.config.fields import NUMBERS, Key, find_keys, find_sections, suggest
from verl.config.free_values import read_free_value
from verl.config.old_keys import find_value, nest, take_old_keys
from verl.config.records import Config, ConfigError, TrainerConfig
from verl.config.source_lists import read_sources
from verl.config.sources import SOURCE_KEYS
from verl.config.upstream import DEFAULTS_KEY, choose_defaults

# YAML 1.1 reads these as octal, hexadecimal, binary and base 60.
_ODD_NUMBER = re.compile(r"[-+]?0[0-9_xb]|.*:")
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


_ABSENT = object()


def load_config(argv: Sequence[str], score_functions: Sequence[str] | None = None) -> Config:
    """The checked configuration that `config=FILE a.b=value ...` asks for.

    The command line wins over the file, the file over the defaults; dictionaries are merged key by key. Defaults are
    the paper's run, or those of the program that the file was written for, see `verl.config.upstream`. Values are
    parsed as YAML, but for text on the command line, which is taken as it stands: `#`, `:`, `[` and digits mean
    nothing in it. A path that exists becomes absolute, so that workers started in another folder find it.

    Args:
        argv: the arguments, without the program's name.
        score_functions: the rewards that `worker.reward.score_function` may name; None accepts any name.

    Raises:
        ConfigError: listing every fault: unknown keys with the nearest known one, values that `verl.config.records`
            does not take, and all that `verl.config.checks.find_faults` finds.
    """
    faults: dict[str, str] = {}
    file, command_line = _read_sources(argv, faults)
    if "actor_rollout_ref" in file:
        raise ConfigError(["actor_rollout_ref: the file is of verl's own trainer; the keys here are EasyR1's"])
    asked = [source.pop(DEFAULTS_KEY) for source in (command_line, file) if DEFAULTS_KEY in source]
    defaults = _merge_defaults(config_to_dict(Config()), choose_defaults(file, asked[0] if asked else None, faults))
    file, command_line = (take_old_keys(source, faults) for source in (file, command_line))
    defaults = _merge(_end_by_epochs(defaults, file, command_line), _weights_of_adamw((file, command_line)))
    keys = find_keys()
    faults |= _section_faults(file, keys)
    values = _merge(_merge(defaults, file), command_line)
    read_sources(values, faults)
    config = _validate(values, keys, faults)
    config = _resolve_paths(config, config.trainer)
    checked = find_faults(config, score_functions, unreadable=faults.keys() & {*keys, *find_sections(keys)})
    if faults or checked:
        raise ConfigError([*faults.values(), *checked])
    for notice in find_notices(config):
        logging.getLogger(__name__).warning(notice)
    return config


def config_to_dict(config: Any) -> dict[str, Any]:
    """The configuration, or one section, as nested plain dictionaries and lists, ready for JSON or YAML."""
    section = config if isinstance(config, dict) else dataclasses.asdict(config)
    return {
        key: config_to_dict(value)
        if isinstance(value, dict)
        else list(value)
        if isinstance(value, tuple | list)
        else value
        for key, value in section.items()
    }


def _merge_defaults(low: dict[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """The records with other defaults; a dictionary of free keys is replaced as a whole."""
    both = [key for key in high if isinstance(low[key], dict) and high[key]]
    return {**low, **high, **{key: _merge_defaults(low[key], high[key]) for key in both}}


def _end_by_epochs(defaults: dict[str, Any], file: Any, command_line: Any) -> dict[str, Any]:
    """The defaults without a max_steps where total_epochs is given alone: it would not be heard."""
    epochs = [find_value(source, "trainer.total_epochs") for source in (file, command_line)]
    steps = [find_value(source, "trainer.max_steps", "") for source in (file, command_line)]
    if any(epochs) and steps == ["", ""]:
        return _merge(defaults, nest("trainer.max_steps", None))
    if epochs[1] and steps[0] and steps[1] == "":
        logging.getLogger(__name__).warning(
            "trainer.total_epochs = %s: the file's trainer.max_steps = %s ends the run, if it comes earlier; "
            "set trainer.max_steps=null to train by epochs",
            epochs[1],
            steps[0],
        )
    return defaults


def _read_sources(argv: Sequence[str], faults: dict[str, str]) -> list[dict[str, Any]]:
    """The file's keys, then the command line's, as nested dictionaries."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    command_line: dict[str, Any] = {}
    file: dict[str, Any] = {}
    nouns = {name: known.kind.noun for name, known in find_keys().items()}
    free = tuple(name for name, noun in nouns.items() if noun == "a dictionary")
    for token in argv:
        key, equals, text = token.partition("=")
        if not equals or not key:
            faults[token] = f"{token!r}: an argument must read key=value; put = between the key and its value"
            continue
        try:
            token.encode()  # bytes that Python cannot read stand in it as lone surrogates
            if key == "config":
                file = _read_file(text)
            elif key in SOURCE_KEYS and text.startswith("[{"):
                command_line = _merge(command_line, nest(key, read_free_value(text)))
            elif nouns.get(key) == "text" or key == DEFAULTS_KEY:
                command_line = _merge(command_line, nest(key, _read_text(text)))
            elif any(key == name or key.startswith(f"{name}.") for name in free):
                command_line = _merge(command_line, nest(key, read_free_value(text)))
            elif nouns.get(key) in NUMBERS and _ODD_NUMBER.match(text):
                command_line = _merge(command_line, nest(key, text))  # text, which is a fault
            else:
                content: Any = OmegaConf.to_container(OmegaConf.from_dotlist([token]), resolve=True)
                command_line = _merge(command_line, content)
        except OSError as error:
            faults[key] = f"config = {text!r}: cannot be read ({error.strerror}); give config= an existing YAML file"
        except UnicodeError as error:
            faults[key] = f"{key} = {text!r}: is not UTF-8 ({error}); save it in that encoding"
        except (YAMLError, OmegaConfBaseException) as error:
            reason = getattr(error, "problem", None) or " ".join(str(error).split())
            if (mark := getattr(error, "problem_mark", None)) and key == "config":
                reason += f", line {mark.line + 1}"
            faults[key] = f"{key} = {text!r}: is not YAML ({reason}); put quotes around the text inside the value"
    return [file, command_line]


def _read_file(path: str) -> dict[str, Any]:
    """The keys of a YAML file, as nested dictionaries."""
    from omegaconf import OmegaConf
    from yaml import YAMLError

    content: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    if not isinstance(content, dict):
        raise YAMLError("the file must hold sections such as data: and trainer:")
    return {str(name): value for name, value in content.items()}


def _read_text(text: str) -> str | None:
    """Text of the command line without quotes around it; null, or nothing, is None."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return None if text in ("", "null") else text


def _weights_of_adamw(sources: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Float32 weights for a role that asks for adamw and for no type: bf16 weights would lose nearly every update."""
    merged: Any = functools.reduce(_merge, sources)
    defaults: dict[str, Any] = {}
    for role in ("actor", "critic"):
        keys = f"worker.{role}.optim.strategy", f"worker.{role}.fsdp.torch_dtype"
        strategy, dtype = (functools.reduce(_child, key.split("."), merged) for key in keys)
        if strategy == "adamw" and dtype is _ABSENT:
            logging.getLogger(__name__).warning("%s = fp32, since optim.strategy = adamw", keys[1])
            defaults = _merge(defaults, nest(keys[1], "fp32"))
    return defaults


def _child(section: Any, name: str) -> Any:
    return section.get(name, _ABSENT) if isinstance(section, dict) else _ABSENT


def _merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    both = [key for key in low if isinstance(low[key], dict) and isinstance(high.get(key), dict)]
    return {**low, **high, **{key: _merge(low[key], high[key]) for key in both}}


def _section_faults(file: dict[str, Any], keys: Mapping[str, Key]) -> dict[str, str]:
    """Faults of sections and dictionaries in a file that are none, which those of the command line would cover up."""
    faults = {}
    for name in (*find_sections(keys), *(name for name, key in keys.items() if key.kind.noun == "a dictionary")):
        value = find_value(file, name, {})
        if not isinstance(value, dict):
            detail = {"type": "dict_type" if name in keys else "dataclass_type", "input": value}
            faults[name] = f"{name} = {value!r}: {_reason(detail, name, keys)}"
    return faults


def _validate(values: dict[str, Any], keys: Mapping[str, Key], faults: dict[str, str]) -> Config:
    """The configuration with these values; what cannot be taken goes to faults and leaves the default."""
    records = TypeAdapter(Config)
    # In JSON's strict mode a dictionary may stand for a record and a list for a tuple, and nothing else differs.
    values = json.loads(json.dumps(values, default=str))
    try:
        return records.validate_json(json.dumps(values))
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            *sections, name = _field_path(detail["loc"], keys)
            section = functools.reduce(dict.__getitem__, sections, values)
            if name in section:
                key = ".".join([*sections, name])
                faults[key] = f"{key} = {section.pop(name)!r}: {_reason(detail, key, keys)}"
    return records.validate_json(json.dumps(values))


def _field_path(location: tuple[int | str, ...], keys: Mapping[str, Key]) -> list[str]:
    """The part of pydantic's location that names a key, without what lies inside its value."""
    path: list[str] = []
    for part in location:
        path.append(str(part))
        if ".".join(path) in keys:
            break
    return path


def _reason(detail: Any, key: str, keys: Mapping[str, Key]) -> str:
    """Message of a pydantic error: the type or limit that must hold instead."""
    fault, value = detail["type"], detail["input"]
    if fault == "unexpected_keyword_argument":
        return f"unknown key; {suggest(key, keys)}"
    if fault == "dataclass_type":
        return f"is a section; set its keys, such as {next(name for name in keys if name.startswith(f'{key}.'))}"
    kind, must = keys[key].kind, "must be"
    if fault == "tuple_type":
        return f"must be {kind.noun}" + ("" if value is None else f", such as [{value}]")
    if kind.item and fault not in ("missing", "too_long", "too_short"):
        kind, must = kind.item, "each must be"
    if fault == "finite_number":
        return f"{must} finite"
    quote = f"; quote it: '\"{value}\"'" if fault == "string_type" and value is not None else ""
    is_type = not kind.limits or fault.endswith("_type")
    return f"{must} {kind.or_other(kind.noun if is_type else kind.limits)}{quote}"


def _resolve_path(value: str, mark: str) -> str:
    """The path made absolute if it exists; what follows the mark stays."""
    value = os.path.expanduser(value)
    path, suffix = split_path(value, mark)
    return os.path.abspath(path) + suffix if os.path.exists(path) else value


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
            changes[item.name] = os.path.abspath(os.path.expanduser(value))
        elif key in SOURCE_KEYS and not isinstance(value, str):
            changes[item.name] = tuple(
                dataclasses.replace(
                    source,
                    path=_resolve_path(source.path, "@"),
                    reward=_resolve_path(source.reward, ":")
                    if source.reward and ".py" in source.reward
                    else source.reward,
                )
                for source in value
            )
        elif key in _PATH_KEYS and value:
            changes[item.name] = _resolve_path(value, _PATH_KEYS[key])
    return dataclasses.replace(section, **changes)

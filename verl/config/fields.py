"""Every key of the configuration with its type in words, read from the records of `verl.config.records`."""

import dataclasses
import difflib
import types
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from verl.config.records import Config

NUMBERS = ("a whole number", "a number")
_NOUNS = {int: NUMBERS[0], float: NUMBERS[1], bool: "true or false", str: "text", dict: "a dictionary"}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


@dataclass(frozen=True)
class Kind:
    """Values that a key takes, in words: a noun and limits, such as `a whole number` and `at least 1`."""

    noun: str
    limits: str = ""
    other: str = ""
    """Value that is taken beside those, such as null."""
    choices: tuple[str, ...] = ()
    item: "Kind | None" = None
    """Kind of a list's values."""

    def __str__(self) -> str:
        limits = f", {self.limits}" if self.limits else ""
        each = f", each {self.item}" if self.item else ""
        return self.or_other(self.noun.removeprefix("a ") + limits + each)

    def or_other(self, words: str) -> str:
        """The words, and the value that is taken beside them."""
        return f"{words}, or {self.other}" if self.other else words


@dataclass(frozen=True)
class Key:
    """A key of the configuration, the line that explains it, and what it takes."""

    name: str
    kind: Kind
    default: Any
    meaning: str

    @property
    def section(self) -> str:
        """The dotted name of the section that holds the key."""
        return self.name.rpartition(".")[0]


def find_keys(record: Any = Config, prefix: str = "") -> dict[str, Key]:
    """Every key of the record and of its sections, in their order."""
    keys: dict[str, Key] = {}
    for name, info in record.__pydantic_fields__.items():
        if dataclasses.is_dataclass(info.annotation):
            keys |= find_keys(info.annotation, f"{prefix}{name}.")
        else:
            default = info.get_default(call_default_factory=True)
            kind = describe(info.annotation, info.metadata)
            keys[prefix + name] = Key(prefix + name, kind, default, _meaning(record, name))
    return keys


def _meaning(record: type, name: str) -> str:
    """The line under the field; pydantic gives it to the class that holds the line, not to those that inherit it."""
    infos = [vars(parent).get("__pydantic_fields__", {}).get(name) for parent in record.__mro__]
    return next(info.description for info in infos if info is not None and info.description)


def find_sections(keys: Iterable[str]) -> list[str]:
    """Every section that holds one of the keys or a section with one, in their order."""
    parts = [key.split(".") for key in keys]
    return list(dict.fromkeys(".".join(names[:depth]) for names in parts for depth in range(1, len(names))))


def suggest(name: str, known: Iterable[str]) -> str:
    """A question that names the known key or section next to the name: the same last part wins."""
    known = list(known)
    leaf = name.rpartition(".")[2]
    same_leaf = [key for key in known if key.rpartition(".")[2] == leaf]
    near = same_leaf[:1] or difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"did you mean {near[0]}?"


def describe(hint: Any, metadata: Iterable[Any] = ()) -> Kind:
    """The annotated type in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return describe(arguments[0], [*arguments[1:], *metadata])
    if origin in (types.UnionType, Union):
        last = arguments[1]
        is_list = get_origin(last) is tuple
        other = "null" if last is types.NoneType else "a list of sources" if is_list else str(get_args(last)[0])
        return replace(describe(arguments[0], metadata), other=other)
    if origin is Literal:
        return Kind(f"one of {', '.join(arguments)}", choices=arguments)
    parts = [part for item in metadata for part in (item.metadata if isinstance(item, FieldInfo) else [item])]
    if origin is tuple:
        least = next((f" with at least {part.min_length} value" for part in parts if hasattr(part, "min_length")), "")
        noun = "a list" + (least if arguments[-1] is Ellipsis else f" of {len(arguments)} values")
        return Kind(noun, item=describe(arguments[0]))
    bounds = {name: getattr(part, name) for name in _BOUNDS for part in parts if hasattr(part, name)}
    limits = " and ".join(f"{_BOUNDS[name]} {bound}" for name, bound in bounds.items())
    if bounds.keys() == {"ge", "le"}:
        limits = f"from {bounds['ge']} to {bounds['le']}"
    reason = "".join(f" ({part})" for part in parts if isinstance(part, str))
    return Kind(_NOUNS[origin or hint], limits + reason)

"""Mixtures of rewards: the faults of `worker.reward.mixtures`, and the parts that their gates name."""

import difflib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

KEYS = ("sum", "gate", "kwargs")
FILE = re.compile(r"(.+\.py(?::\w+)?)(?:\.(\w+))?")


def split_gate(gate: str) -> tuple[str, str]:
    """Reward and part of a gate `REWARD` or `REWARD.PART`; `overall` where none is named."""
    if match := FILE.fullmatch(gate):
        return match[1], match[2] or "overall"
    reward, _, part = gate.partition(".")
    return reward, part or "overall"


def list_parts(content: Mapping[str, Any]) -> list[str]:
    """The rewards of a mixture, those first that have a weight."""
    gates = [split_gate(gate)[0] for gate in content.get("gate", {})]
    return list(dict.fromkeys([*content.get("sum", {}), *gates]))


def find_mixture_faults(mixtures: Mapping[str, Any], score_functions: Sequence[str] | None) -> Iterator[str]:
    """Faults of mixtures: their form, numbers that are none, rewards that are unknown, circles."""
    whole: dict[str, Mapping[str, Any]] = {}
    for name, content in mixtures.items():
        where = f"worker.reward.mixtures.{name}"
        if "." in name or ":" in name or name in (score_functions or ()):
            yield f"{where}: is the name of another reward or holds '.' or ':'; give it a name of its own"
        faults = list(_form_faults(where, content))
        yield from faults
        if not faults:
            whole[name] = content
            yield from _reward_faults(where, content, mixtures, score_functions)
    for name in whole:
        if circle := _find_circle(name, whole, ()):
            yield f"worker.reward.mixtures.{name}: leads back to itself ({' -> '.join(circle)}); take one part out"


def _form_faults(where: str, content: Any) -> Iterator[str]:
    if not isinstance(content, Mapping) or not content.get("sum") or set(content) - set(KEYS):
        yield f"{where} = {content!r}: must hold sum: {{reward: weight}}, and may hold gate and kwargs"
        return
    for key in ("sum", "gate"):
        numbers = content.get(key, {})
        if not isinstance(numbers, Mapping):
            yield f"{where}.{key} = {numbers!r}: must be a dictionary of numbers by reward"
            continue
        for reward, number in numbers.items():
            if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
                yield f"{where}.{key}.{reward} = {number!r}: must be a finite number"
    kwargs = content.get("kwargs", {})
    if not isinstance(kwargs, Mapping) or not all(isinstance(own, Mapping) for own in kwargs.values()):
        yield f"{where}.kwargs = {kwargs!r}: must hold a dictionary of arguments by reward"


def _reward_faults(
    where: str, content: Mapping[str, Any], mixtures: Mapping[str, Any], score_functions: Sequence[str] | None
) -> Iterator[str]:
    parts = list_parts(content)
    for reward in parts:
        path = reward.partition(".py")[0] + ".py"
        if FILE.fullmatch(reward):
            if not os.path.isfile(path):
                yield f"{where}: {reward!r}: there is no file {path}"
        elif score_functions is not None and reward not in (*score_functions, *mixtures):
            known = [*score_functions, *mixtures]
            near = difflib.get_close_matches(reward, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it must be FILE.py:NAME or one of {', '.join(known)}"
            yield f"{where}: no reward is called {reward!r}; {hint}"
    for reward in content.get("kwargs", {}):
        if reward not in parts or reward in mixtures:
            yield f"{where}.kwargs.{reward}: its sum and gates name no such reward that takes arguments; take it out"


def _find_circle(name: str, mixtures: Mapping[str, Any], above: tuple[str, ...]) -> tuple[str, ...]:
    """Names from a mixture over its parts back to itself; empty without such a way."""
    if above and name == above[0]:
        return (*above, name)
    if name in above or name not in mixtures:
        return ()
    found = (_find_circle(part, mixtures, (*above, name)) for part in list_parts(mixtures[name]))
    return next(filter(None, found), ())

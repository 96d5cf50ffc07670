"""Reward of several rewards: weighted sums and gates, stated as configuration.

    {"sum": {"numbers": 0.8, "length": 0.2}}
    {"gate": "choice", "then": {"sum": {"spatial_sgg": 0.9, "length": 0.1}}, "at": 1.0}
    {"sum": {"choice": 0.9, "r1v.format": 0.1}}

    sum  = sum of weight * score
    gate = [score of the gate >= at] * score of what follows

A part is the name of a reward, NAME.TERM for one of its terms, or {"reward": NAME, "term": ..., "kwargs": {...}}. A
sum is a dictionary of names and weights, or a list of parts that have a "weight" each. Weights are not negative: a sum
lies in [0, 1] where they add up to at most 1.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from spatialthinker.rewards.record import RewardInput
from spatialthinker.rewards.truths import truth_text

Rewards = Mapping[str, Callable[..., list[dict[str, float]]]]
_FORMS = ({"sum"}, {"gate", "then"}, {"gate", "then", "at"})


def mix(rewards: Rewards, spec: Mapping[str, Any], inputs: Sequence[RewardInput]) -> list[dict[str, float]]:
    """Returns overall, and each part's score under its name, of each response.

    Raises ValueError, which names the place in `spec`, for a form, name, term or weight that is not known.
    """
    texts = [item if isinstance(item.ground_truth, str) else _with_text(item) for item in inputs]
    parts: dict[str, list[float]] = {}
    overall = _scores(rewards, spec, "mixture", texts, parts)
    return [{"overall": score} | {name: part[i] for name, part in parts.items()} for i, score in enumerate(overall)]


def _with_text(item: RewardInput) -> RewardInput:
    return replace(item, ground_truth=truth_text(item.ground_truth))


def _scores(
    rewards: Rewards, spec: Any, place: str, inputs: Sequence[RewardInput], parts: dict[str, list[float]]
) -> list[float]:
    """Returns the scores of a part, and adds those of its leaves to `parts`."""
    if isinstance(spec, str):
        name, _, term = spec.partition(".")
        spec = {"reward": name, "term": term or "overall"}
    if not isinstance(spec, Mapping):
        raise ValueError(f"{place}: got {spec!r}; a name, a sum or a gate is needed")
    if "reward" in spec:
        return _leaf(rewards, spec, place, inputs, parts)
    if set(spec) not in _FORMS:
        raise ValueError(f"{place}: got the keys {', '.join(map(str, spec)) or 'none'}; sum, or gate with then and at")
    if "gate" in spec:
        limit = _number(spec.get("at", 1.0), f"{place}.at")
        gates = _scores(rewards, spec["gate"], f"{place}.gate", inputs, parts)
        then = _scores(rewards, spec["then"], f"{place}.then", inputs, parts)
        return [score if gate >= limit else 0.0 for gate, score in zip(gates, then, strict=True)]
    total = [0.0] * len(inputs)
    for part, weight, where in _weighted(spec["sum"], f"{place}.sum"):
        for i, score in enumerate(_scores(rewards, part, where, inputs, parts)):
            total[i] += weight * score
    return total


def _weighted(terms: Any, place: str) -> list[tuple[Any, float, str]]:
    """Returns each part of a sum with its weight and place."""
    if isinstance(terms, Mapping) and terms:
        return [(name, _number(weight, f"{place}.{name}"), f"{place}.{name}") for name, weight in terms.items()]
    if not isinstance(terms, Sequence) or isinstance(terms, str) or not terms:
        raise ValueError(f"{place}: got {terms!r}; names with weights, or a list of parts with a weight, are needed")
    found = []
    for i, part in enumerate(terms):
        if not isinstance(part, Mapping) or "weight" not in part:
            raise ValueError(f"{place}[{i}]: got {part!r}; a part with a weight is needed")
        rest = {key: value for key, value in part.items() if key != "weight"}
        found.append((rest, _number(part["weight"], f"{place}[{i}].weight"), f"{place}[{i}]"))
    return found


def _number(value: Any, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(f"{place}: got {value!r}; a number from 0 on is needed")
    return float(value)


def _leaf(
    rewards: Rewards, spec: Mapping[str, Any], place: str, inputs: Sequence[RewardInput], parts: dict[str, list[float]]
) -> list[float]:
    name, term, kwargs = spec["reward"], spec.get("term", "overall"), spec.get("kwargs", {})
    if name not in rewards or name == "mixture":
        near = difflib.get_close_matches(str(name), [known for known in rewards if known != "mixture"], n=1)
        raise ValueError(f"{place}: no reward {name!r}" + (f"; did you mean {near[0]}?" if near else ""))
    if surplus := set(spec) - {"reward", "term", "kwargs"}:
        raise ValueError(f"{place}: got the keys {', '.join(sorted(surplus))} beside reward, term and kwargs")
    results = rewards[name](inputs, **kwargs)
    if results and term not in results[0]:
        raise ValueError(f"{place}: {name} has no term {term!r}, only {', '.join(results[0])}")
    scores = [result[term] for result in results]
    parts[name if term == "overall" else f"{name}.{term}"] = scores
    return scores

"""`MixedReward`: a weighted sum of rewards, and gates that a response must pass."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from verl.reward.faults import RewardError, call_function
from verl.reward.scores import check_scores


@dataclass(frozen=True)
class MixedReward:
    """overall = [every gate's part reaches its bound] x sum of weight x overall of each reward.

    Every part of a reward is logged as `<reward>/<part>`, those of weight 0 too.

    Attributes:
        name: of the mixture.
        functions: rewards by name.
        weights: by name; a reward without one only serves a gate.
        gates: least value by reward and part.
    """

    name: str
    functions: Mapping[str, Any]
    weights: Mapping[str, float]
    gates: Mapping[tuple[str, str], float]

    def __str__(self) -> str:
        return self.name

    @property
    def reads_row(self) -> bool:
        """True if one of the rewards reads columns or images."""
        return any(getattr(function, "reads_row", True) for function in self.functions.values())

    def __call__(self, items: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
        found = {}
        for name, function in self.functions.items():
            copies = [dict(item) for item in items]
            result = call_function(lambda function=function, copies=copies: function(copies), items)
            found[name] = check_scores(result, items, function)
        return [self._combine({name: scores[i] for name, scores in found.items()}) for i in range(len(items))]

    def is_coroutine(self) -> bool:
        """True if one of the rewards is to be awaited."""
        return any(_is_coroutine(function) for function in self.functions.values())

    async def score(self, item: dict[str, Any]) -> list[dict[str, float]]:
        """The score of one item, the coroutines among the rewards side by side."""

        async def run(function: Any) -> dict[str, float]:
            copy = dict(item)
            is_slow = _is_coroutine(function)
            result = await function.score(copy) if is_slow else call_function(lambda: function([copy]), [item])
            return check_scores(result, [item], function)[0]

        scores = await asyncio.gather(*map(run, self.functions.values()))
        return [self._combine(dict(zip(self.functions, scores, strict=True)))]

    def _combine(self, scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        total = sum(weight * scores[name]["overall"] for name, weight in self.weights.items())
        parts = {f"{name}/{part}": value for name, own in scores.items() for part, value in own.items()}
        prices = sum(own.get("price", 0.0) for own in scores.values())
        is_open = all(_part(scores, gate) >= least for gate, least in self.gates.items())
        more = {"gate": float(is_open)} if self.gates else {}
        return {"overall": total if is_open else 0.0, **more, **parts} | ({"price": prices} if prices else {})


def _part(scores: Mapping[str, Mapping[str, float]], gate: tuple[str, str]) -> float:
    """The value that a gate looks at."""
    name, part = gate
    if part not in scores[name]:
        raise RewardError(f"a gate names the part {part!r} of {name}, which has {', '.join(scores[name])}")
    return scores[name][part]


def _is_coroutine(function: Any) -> bool:
    return hasattr(function, "is_coroutine") and function.is_coroutine()

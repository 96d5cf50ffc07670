"""Reward of numbers: distances, sizes, counts.

    error   = |predicted - true| / |true|, and 0 or infinite where the true value is 0
    mra     = share of the thresholds t in 0.50, 0.55, ..., 0.95 with error < 1 - t
    smooth  = max(0, 1 - error)
    overall = (1 - smooth_weight) * mra + smooth_weight * smooth

Sources: mean relative accuracy, https://arxiv.org/abs/2412.14171, section 3.2; one minus the relative error,
https://arxiv.org/abs/2503.21776, section on the rule-based rewards of regression questions. The first has steps of
0.05 in the error and is 0 from 0.5 on, the second tells any two numbers apart up to twice the true one.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from spatialthinker.answer_grammar import is_denied
from spatialthinker.quantities import (
    Number,
    converted,
    mean_relative_accuracy,
    parse_quantity,
    stated_texts,
    unboxed,
)
from spatialthinker.rewards.answers import read_answer
from spatialthinker.rewards.record import RewardInput
from spatialthinker.rewards.truths import bad_truth, decode_truth, truth_text

SMOOTH_WEIGHT = 0.0
"""Share of the smooth form; the benchmarks count the mean relative accuracy alone."""
MAX_CACHED_CHARS = 256


def numbers(inputs: Sequence[RewardInput], *, smooth_weight: float = SMOOTH_WEIGHT) -> list[dict[str, float]]:
    """Returns overall, mra and smooth of each response's number, 0 for none, several or a range.

    The ground truth is a number, a text that states one ("2.5 m", "two"), or {"value": 2.5, "unit": "m"}. Units are
    converted where both sides state one that is known; another kind of unit or of counted thing scores 0.
    """
    results = []
    for item in inputs:
        value, true = _values(item)
        mra = smooth = 0.0
        if value is not None:
            mra, smooth = mean_relative_accuracy(value, true), max(0.0, 1.0 - _relative_error(value, true))
        overall = (1.0 - smooth_weight) * mra + smooth_weight * smooth
        results.append({"overall": overall, "mra": mra, "smooth": smooth})
    return results


def check_numbers(ground_truth: Any, problem: str = "") -> None:
    """Raises ValueError for a ground truth that states no number."""
    _truth(truth_text(ground_truth))


def gold_number(ground_truth: Any) -> str:
    """Returns the answer that states the true number."""
    number = _truth(truth_text(ground_truth))
    return " ".join([repr(number.value), number.unit, *number.counted]).strip()


def explain_numbers(item: RewardInput) -> Iterator[str]:
    """Yields lines on the number that was read and the true one."""
    (value, true), answer = _values(item), read_answer(item.response)
    yield f"answer:   {answer[:80]!r}, read as {'no number' if value is None else f'{value:g}'}, true {true:g}"
    if value is not None:
        yield f"error:    {_relative_error(value, true):.4f} of the true value"


def _values(item: RewardInput) -> tuple[float | None, float]:
    """Returns a response's number in the unit of the true one, and the true one."""
    wanted = _truth(truth_text(item.ground_truth))
    answer = read_answer(item.response)
    found = _read_short(answer) if len(answer) <= MAX_CACHED_CHARS else _read(answer)
    return (None if found is None else converted(found, wanted)), wanted.value


def _read(answer: str) -> Number | None:
    texts = stated_texts(unboxed(answer))
    return next((found for text in texts if not is_denied(text.lower()) and (found := parse_quantity(text))), None)


_read_short = lru_cache(maxsize=4096)(_read)


def _relative_error(value: float, true: float) -> float:
    if not true:
        return 0.0 if value == true else math.inf
    return abs(value - true) / abs(true)


@lru_cache(maxsize=4096)
def _truth(text: str) -> Number:
    if text.startswith("{"):
        struct = decode_truth(text)
        if not isinstance(struct, dict) or not isinstance(struct.get("value"), str | int | float):
            raise bad_truth('is a dictionary without "value"', text)
        text = f"{struct['value']} {struct.get('unit') or ''}".strip()
    number = None if text.startswith("[") else parse_quantity(text)
    if number is None or not math.isfinite(number.value):
        raise bad_truth("states no number, several, or a range", text)
    return number

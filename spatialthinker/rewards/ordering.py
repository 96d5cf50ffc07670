"""Reward of orders: patches, depths, sizes, moments.

    pairs   = pairs of true items that the answer has in the right order / all pairs
    exact   = [the answer is the true order]
    overall = exact_weight * exact + (1 - exact_weight) * max(0, 2 pairs - 1)

2 pairs - 1 is Kendall's tau, 0 on average for a random order. Sources: Kendall 1938, A new measure of rank
correlation, Biometrika 30; the exact order of shuffled patches and of depths as a reward,
https://arxiv.org/abs/2510.27606, section on the five tasks.
"""

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import msgspec

from spatialthinker.answer_grammar import normalize
from spatialthinker.rewards.answers import read_answer
from spatialthinker.rewards.record import RewardInput
from spatialthinker.rewards.truths import bad_truth, decode_truth, truth_text

EXACT_WEIGHT = 0.5
MAX_ITEMS = 100
MAX_ANSWER_CHARS = 5_000
MAX_CACHED_CHARS = 256
_SEPARATOR = re.compile(r"\s{0,4}(?:,|;|\n|->|=>|>|<|→|\bthen\b)\s{0,4}")
_NUMBERING = re.compile(r"\s{0,4}(?:\d{1,3}[.)]|[-*•])\s{1,4}(?=\S)|\s{0,4}and\s{1,4}")
_LEAD_IN = re.compile(r"[^:\n]{0,80}:\s")


def ordering(inputs: Sequence[RewardInput], *, exact_weight: float = EXACT_WEIGHT) -> list[dict[str, float]]:
    """Returns overall, exact and pairs of each response's order, 0 for one that names an item twice.

    The ground truth is a list of different items, as [3, 1, 2], ["cat", "dog"], or a text "3, 1, 2", "cat > dog".
    A pair of which the answer lacks an item is wrong; items that are not in the ground truth only spoil `exact`.
    """
    results = []
    for item in inputs:
        truth, found = _truth(truth_text(item.ground_truth)), _read(read_answer(item.response))
        pairs, exact = _share_of_pairs(truth, found), float(found == truth)
        overall = exact_weight * exact + (1.0 - exact_weight) * max(0.0, 2.0 * pairs - 1.0)
        results.append({"overall": overall, "exact": exact, "pairs": pairs})
    return results


def check_ordering(ground_truth: Any, problem: str = "") -> None:
    """Raises ValueError for a ground truth that is no list of two or more different items."""
    _truth(truth_text(ground_truth))


def gold_order(ground_truth: Any) -> str:
    """Returns the answer that states the true order."""
    return ", ".join(_truth(truth_text(ground_truth)))


def explain_ordering(item: RewardInput) -> Iterator[str]:
    """Yields lines on the order that was read and the true one."""
    yield f"order:    {', '.join(_read(read_answer(item.response))[:20]) or 'none'}"
    yield f"true:     {', '.join(_truth(truth_text(item.ground_truth)))}"


def _share_of_pairs(truth: tuple[str, ...], found: tuple[str, ...]) -> float:
    if len(set(found)) < len(found):
        return 0.0
    places = {item: place for place, item in enumerate(found)}
    ranks = [places.get(item, -1) for item in truth]
    right = sum(0 <= a < b for i, a in enumerate(ranks) for b in ranks[i + 1 :])
    return right / (len(truth) * (len(truth) - 1) / 2)


def _read_any(answer: str) -> tuple[str, ...]:
    if answer.startswith("["):
        try:
            return _names(msgspec.json.decode(answer))
        except (msgspec.DecodeError, UnicodeEncodeError, RecursionError, TypeError):
            answer = answer.strip("[] \n")
    lead_in = _LEAD_IN.match(answer)
    parts = _SEPARATOR.split(answer[lead_in.end() :] if lead_in else answer, maxsplit=MAX_ITEMS)
    names = (normalize(_without_numbering(part)).strip("()[]' ") for part in parts)
    return tuple(name for name in names if name)


def _without_numbering(part: str) -> str:
    match = _NUMBERING.match(part)
    return part[match.end() :] if match else part


_read_short = lru_cache(maxsize=4096)(_read_any)


def _read(answer: str) -> tuple[str, ...]:
    """Returns the items of an answer in its order, normalized, () where it states none."""
    return _read_short(answer) if len(answer) <= MAX_CACHED_CHARS else _read_any(answer[:MAX_ANSWER_CHARS])


def _names(values: Any) -> tuple[str, ...]:
    """Returns the items of a list as normalized texts; TypeError for anything but a list of texts and numbers."""
    if not isinstance(values, list | tuple) or not all(type(value) in (str, int, float) for value in values):
        raise TypeError("no list of texts and numbers")
    return tuple(normalize(value if isinstance(value, str) else f"{value:.12g}") for value in values)


@lru_cache(maxsize=2048)
def _truth(text: str) -> tuple[str, ...]:
    try:
        names = _names(decode_truth(text)) if text.startswith("[") else _read(text)
    except TypeError:
        raise bad_truth("is no list of texts and numbers", text) from None
    if not 2 <= len(names) <= MAX_ITEMS or len(set(names)) < len(names) or not all(names):
        raise bad_truth(f"is no order of 2 to {MAX_ITEMS} different items", text)
    return names

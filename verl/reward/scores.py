"""Scores as plain floats, or one message that names what a reward function returned, its part and its row."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from numbers import Real
from typing import Any

import torch

from verl.reward.faults import RewardError, name_rows, show

MAX_SCORE = torch.finfo(torch.float32).max
"""Scores become float32."""


def check_scores(scores: Any, items: Sequence[Mapping[str, Any]], function: Any) -> list[dict[str, float]]:
    """The scores of the items, each a dict of plain floats, which any process can read.

    Raises:
        RewardError: too few or too many, or one that is no dict with `overall`, or a part that is no finite number.
    """
    if not isinstance(scores, Sequence) or isinstance(scores, str):
        raise RewardError(
            f"{function} returned {show(scores)} instead of a list of dicts, one for each response, for "
            f"{name_rows(items)}"
        )
    if len(scores) != len(items):
        is_short = len(scores) < len(items)
        first = f"; the first without one is of row {items[len(scores)].get('uid')}" if is_short else ""
        raise RewardError(
            f"{function} returned {len(scores)} scores for {len(items)} responses ({name_rows(items)}){first}"
        )
    return [_check_score(score, item, function) for item, score in zip(items, scores, strict=True)]


def _check_score(score: Any, item: Mapping[str, Any], function: Any) -> dict[str, float]:
    where = f"row {item['uid']}: the reward function"
    if not isinstance(score, Mapping):
        raise RewardError(f"{where} returned {show(score)} instead of a dict with 'overall' ({function})")
    if "overall" not in score:
        raise RewardError(
            f"{where} returned no 'overall', only {', '.join(map(repr, score)) or 'nothing'} ({function})"
        )
    parts = {}
    for key, value in score.items():
        number = _finite(value)
        if not isinstance(key, str) or number is None:
            raise RewardError(
                f"{where} returned {show(value)} as {key!r}, which must be a finite number ({function}); "
                f"the response begins with {item['response'][:80]!r}"
            )
        parts[key] = number
    return parts


def _finite(value: Any) -> float | None:
    """The value as float if it is a finite number, or an array or tensor of one."""
    with suppress(ValueError, TypeError, RuntimeError, OverflowError):
        value = value.item() if hasattr(value, "item") else value
        number = float(value) if isinstance(value, Real | Decimal) else float("nan")
        return number if abs(number) <= MAX_SCORE else None
    return None

"""The list of records with the figures that the released program writes into it, for scripts that read its files.

Each figure is over all records so far, errors as wrong answers, and by the number of records of its task. (The
released program is one record behind in its tasks and divides by the task's number of items in the whole benchmark.)
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from evaluation.journal import Record

PERIOD = 10
"""Records between two of those that hold running figures."""


def with_released_figures(records: Sequence[Record], views: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """Return the records as JSON values: `<task>_correct` in each, `cur_*` in every tenth, `final_*` in the last.

    Args:
        records: in the order of evaluation.
        views: the summary of the pairs of views, where the benchmark has them.
    """
    tasks = sorted({record.task for record in records if record.task is not None})
    counts: Counter[str | None] = Counter()
    correct: Counter[str | None] = Counter(dict.fromkeys(tasks, 0))
    total = 0
    written = []
    for number, record in enumerate(records, 1):
        counts[record.task] += 1
        correct[record.task] += record.correct
        total += record.correct
        value = asdict(record) | {f"{task}_correct": correct[task] for task in tasks}
        seen = [task for task in tasks if counts[task]]
        if number % PERIOD == 0:
            for task in seen:
                value |= _figures(f"{task}_acc", f"{task}_std_err", correct[task], counts[task])
            value |= _figures("cur_acc", "cur_std_err", total, number)
        if number == len(records):
            for task in seen:
                value |= _figures(f"{task}_final_acc", f"{task}_final_std_err", correct[task], counts[task])
            if views is not None:
                names = ("final_view_consistency_acc", "final_view_consistency_std_err")
                value |= _figures(*names, views["correct"], views["n"])
            value |= _figures("final_accuracy", "final_std_err", total, number)
        written.append(value)
    return written


def _figures(name: str, error_name: str, correct: int, n: int) -> dict[str, float]:
    """The share and its standard error sqrt(p (1 - p) / n)."""
    p = correct / n if n else 0.0
    return {name: p, error_name: math.sqrt(p * (1 - p) / n) if n else 0.0}

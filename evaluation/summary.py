"""From records to figures: accuracy with its interval, per task, how answers were read, mean rewards."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from evaluation.journal import Record

Z_95 = 1.959963984540054  # standard normal quantile of a two-sided 95 % interval
PARSE_FAILURES = ("unparsed", "truncated")


def wilson_interval(successes: int, trials: int, z: float = Z_95) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion; (0, 1) without trials.

    centre = (p + z^2 / 2n) / (1 + z^2 / n), half width = z / (1 + z^2 / n) sqrt(p (1 - p) / n + z^2 / 4n^2)
    https://doi.org/10.1080/01621459.1927.10502953
    """
    if trials == 0:
        return 0.0, 1.0
    p = successes / trials
    scale = 1 + z * z / trials
    centre = (p + z * z / (2 * trials)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: Sequence[float], z: float = Z_95) -> tuple[float, float, float]:
    """Return (mean, low, high): mean +- z s / sqrt(n), s with n - 1; without a spread to measure all three agree."""
    n = len(values)
    mean = sum(values) / n if n else 0.0
    if n < 2:
        return mean, mean, mean
    half = z * math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
    return mean, mean - half, mean + half


def summarize(records: Sequence[Record], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the run's summary.

    Items that ended in an error (a broken image) got no answer: `accuracy` is over answered items, and
    `accuracy_errors_wrong` counts them as wrong. `macro_accuracy` is the mean over the tasks seen.
    """
    answered = [record for record in records if record.status == "ok"]
    kinds = Counter(record.kind for record in answered)
    names = sorted({record.task for record in answered if record.task is not None})
    tasks = {name: _accuracy([record for record in answered if record.task == name]) for name in names}
    rewards = [record.reward for record in answered if record.reward is not None]
    correct = sum(record.correct for record in answered)
    return {
        "settings": settings,
        "items": len(records),
        "answered": len(answered),
        "errors": len(records) - len(answered),
        **_accuracy(answered),
        "accuracy_errors_wrong": correct / len(records) if records else 0.0,
        "macro_accuracy": sum(task["accuracy"] for task in tasks.values()) / len(tasks) if tasks else None,
        "parse_failure_rate": sum(kinds[kind] for kind in PARSE_FAILURES) / len(answered) if answered else 0.0,
        "kinds": dict(sorted(kinds.items(), key=lambda item: str(item[0]))),
        "tasks": tasks,
        "rewards": {
            key: dict(zip(("mean", "low", "high"), mean_interval([reward[key] for reward in rewards]), strict=True))
            for key in (rewards[0] if rewards else ())
        },
        "cost_usd": round(sum(r.cost_usd for r in records), 6),
        "response_tokens_mean": sum(r.response_tokens for r in answered) / len(answered) if answered else 0.0,
    }


def _accuracy(records: Sequence[Record]) -> dict[str, Any]:
    correct = sum(record.correct for record in records)
    low, high = wilson_interval(correct, len(records))
    accuracy = correct / len(records) if records else 0.0
    return {"n": len(records), "correct": correct, "accuracy": accuracy, "accuracy_low": low, "accuracy_high": high}


def format_table(summary: dict[str, Any]) -> str:
    """Return the summary as a table for the terminal."""
    rows = [("task", "n", "accuracy", "95 % interval")]
    for name, task in [*summary["tasks"].items(), ("all", summary)]:
        interval = f"{task['accuracy_low']:.3f} - {task['accuracy_high']:.3f}"
        rows.append((name, str(task["n"]), f"{task['accuracy']:.3f}", interval))
    for key, value in summary["rewards"].items():
        count = str(summary["answered"])
        rows.append((f"reward/{key}", count, f"{value['mean']:.3f}", f"{value['low']:.3f} - {value['high']:.3f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    kinds = ", ".join(f"{kind} {count}" for kind, count in summary["kinds"].items())
    lines.append(f"answers read as: {kinds or 'none'}; parse failures {summary['parse_failure_rate']:.1%}")
    if summary["errors"]:
        lines.append(f"{summary['errors']} of {summary['items']} items ended in an error and have no answer")
    return "\n".join(lines)

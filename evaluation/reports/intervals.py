"""Intervals of 95 % around shares and means."""

import math
from collections.abc import Sequence
from typing import Any

Z_95 = 1.959963984540054  # standard normal quantile of a two-sided 95 % interval


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion; (0, 1) without trials.

    centre = (p + z^2 / 2n) / (1 + z^2 / n), half width = z / (1 + z^2 / n) sqrt(p (1 - p) / n + z^2 / 4n^2)
    https://doi.org/10.1080/01621459.1927.10502953
    """
    if trials == 0:
        return 0.0, 1.0
    p, z = successes / trials, Z_95
    scale = 1 + z * z / trials
    centre = (p + z * z / (2 * trials)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return (mean, low, high): mean +- z s / sqrt(n), s with n - 1; without a spread to measure all three agree."""
    n = len(values)
    mean = sum(values) / n if n else 0.0
    if n < 2:
        return mean, mean, mean
    half = Z_95 * math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
    return mean, mean - half, mean + half


def proportion(correct: int, n: int) -> dict[str, Any]:
    """Return a share of n with its Wilson interval, under the names of a summary."""
    low, high = wilson_interval(correct, n)
    accuracy = correct / n if n else 0.0
    return {"n": n, "correct": correct, "accuracy": accuracy, "accuracy_low": low, "accuracy_high": high}

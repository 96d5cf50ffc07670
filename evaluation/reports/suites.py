"""Leaderboards of several benchmarks: each line by its benchmark's own rule, and the mean of the lines."""

import math
from collections.abc import Iterable, Mapping, Sequence

from evaluation.benchmarks.rows import BENCHMARKS, SUITES
from evaluation.journal import Record
from evaluation.reports.official import RULES, Figure, measure
from evaluation.reports.summary import align_rows

MEAN = "mean"


def covered_suites(names: Iterable[str]) -> list[str]:
    """Return the leaderboards all of whose benchmarks are among the names."""
    known = set(names)
    return [suite for suite, lines in SUITES.items() if all(known.issuperset(line) for line in lines.values())]


def measure_suite(name: str, records: Mapping[str, Sequence[Record]]) -> dict[str, Figure]:
    """Return the figure of each line, named with its rule, and of their mean; a line without any item is left out.

    The mean's interval is that of independent lines: sqrt(sum_l h_l^2) / L with half-widths h_l.
    """
    figures: dict[str, Figure] = {}
    for line, members in SUITES[name].items():
        rule = BENCHMARKS[members[0]].rule or "accuracy"
        found = measure(RULES[rule], [record for member in members for record in records[member]])
        figures |= {f"{line}: {rule}": figure for figure in list(found.values())[:1]}
    count = max(1, len(figures))
    half = math.sqrt(sum(((figure.high - figure.low) / 2) ** 2 for figure in figures.values())) / count
    mean = sum(figure.value for figure in figures.values()) / count
    return figures | {MEAN: Figure(sum(figure.n for figure in figures.values()), mean, mean - half, mean + half)}


def format_suite(name: str, records: Mapping[str, Sequence[Record]]) -> str:
    """Return a leaderboard as a table for the terminal."""
    rows = [
        (line, str(figure.n), f"{figure.value:.3f}", f"{figure.low:.3f} - {figure.high:.3f}")
        for line, figure in measure_suite(name, records).items()
    ]
    return align_rows([(name, "n", "figure", "95 % interval"), *rows])

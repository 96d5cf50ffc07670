"""The figures by which the benchmarks' own authors report, each with its 95 % interval. Pure functions of records.

A figure is a weighted sum of means, sum_k w_k mean(y_k); its interval takes the items as independent draws:
+- z sqrt(sum_k w_k^2 s_k^2 / n_k).
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from evaluation.journal import Record
from evaluation.reports.intervals import Z_95

BOX_THRESHOLDS = (0.5, 0.75, 0.9)


class Figure(NamedTuple):
    """A figure over n items (or pairs) and its interval."""

    n: int
    value: float
    low: float
    high: float


Strata = Sequence[tuple[float, Sequence[float]]]
"""(weight, values) of the parts of a figure."""
Rule = Callable[[Sequence[Record]], Mapping[str, Strata]]
"""From records to figures by name, the one that leaderboards quote first."""


def measure(rule: Rule, records: Sequence[Record]) -> dict[str, Figure]:
    """Return a rule's figures over answered records; one without any item is left out."""
    return {name: _weigh(strata) for name, strata in rule(records).items() if any(values for _, values in strata)}


def _weigh(strata: Strata) -> Figure:
    filled = [(weight, values) for weight, values in strata if values]
    value = sum(weight * statistics.fmean(values) for weight, values in filled)
    spread = sum(w * w * statistics.variance(values) / len(values) for w, values in filled if len(values) > 1)
    half = Z_95 * math.sqrt(spread)
    return Figure(sum(len(values) for _, values in filled), value, value - half, value + half)


def score_of(record: Record) -> float:
    """Return the share of a record's credit: its score where its form has degrees, else 0 or 1."""
    return float(record.correct) if record.score is None else record.score


def _even(parts: Iterable[Sequence[float]]) -> Strata:
    """Return parts of equal weight."""
    filled = [part for part in parts if part]
    return [(1 / len(filled), part) for part in filled]


def _by(records: Sequence[Record], name: Callable[[Record], str]) -> dict[str, list[float]]:
    parts: dict[str, list[float]] = defaultdict(list)
    for record in records:
        parts[name(record)].append(score_of(record))
    return parts


def mean_score(records: Sequence[Record]) -> Mapping[str, Strata]:
    """The mean score: mean relative accuracy of numbers, share of points in a mask, accuracy of choices."""
    return {"mean score": _even([[score_of(record) for record in records]])}


def mean_over_tasks(records: Sequence[Record]) -> Mapping[str, Strata]:
    """The mean over tasks of their mean scores.

    SPAR-Bench's `overall`: https://github.com/EvolvingLMMs-Lab/lmms-eval, tasks/sparbench/utils.py.
    """
    return {"mean over tasks": _even(_by(records, lambda record: record.task or "").values())}


def vsi_bench(records: Sequence[Record]) -> Mapping[str, Strata]:
    """The mean over eight tasks; relative direction is the mean of its three levels.

    https://github.com/EvolvingLMMs-Lab/lmms-eval, tasks/vsibench/utils.py, vsibench_aggregate_results.
    """
    tasks = _by(records, lambda record: record.task or "")
    levels = {name: tasks.pop(name) for name in list(tasks) if name.startswith("object_rel_direction")}
    count = len(tasks) + bool(levels)
    weighed = [(1 / count, values) for values in tasks.values()]
    return {"mean over tasks": weighed + [(1 / count / len(levels), values) for values in levels.values()]}


def chance_adjusted(records: Sequence[Record]) -> Mapping[str, Strata]:
    """SITE's chance-adjusted accuracy: sum(hit - 1/n) / sum(1 - 1/n) over items with n options.

    https://github.com/EvolvingLMMs-Lab/lmms-eval, tasks/sitebench/utils.py.
    """
    chances = [1 / record.facts["choices"] for record in records if record.facts]
    room = 1 - statistics.fmean(chances) if chances else 0.0
    gains = [record.correct - chance for record, chance in zip(records, chances, strict=True)]
    return {"chance-adjusted accuracy": [(1 / room, gains)] if room else []}


def cv_bench(records: Sequence[Record]) -> Mapping[str, Strata]:
    """CV-Bench by source: 2D = (ADE20K + COCO) / 2, 3D = Omni3D, all = (2D + 3D) / 2.

    https://github.com/EvolvingLMMs-Lab/lmms-eval, tasks/cv_bench/utils.py.
    """
    sources = _by(records, lambda record: (record.facts or {})["source"])
    flat = [values for name, values in sources.items() if not name.startswith("Omni3D")]
    deep = [values for name, values in sources.items() if name.startswith("Omni3D")]
    halves = {"2D by source": _even(flat), "3D by source": _even(deep)}
    if not (flat and deep):
        return halves
    both = [(weight / 2, part) for half in halves.values() for weight, part in half]
    return {"mean of 2D and 3D by source": both} | halves


def mindcube(records: Sequence[Record]) -> Mapping[str, Strata]:
    """MindCube's settings, named by the ids; `translation` is left out of the mean.

    https://github.com/mll-lab-nu/MindCube, extractors.py.
    """
    settings = _by(records, lambda record: (record.facts or {})["id"].split("_")[0].removesuffix("new"))
    settings.pop("translation", None)
    every = {"all but translation": _even([[value for values in settings.values() for value in values]])}
    return every | {name: _even([values]) for name, values in sorted(settings.items())}


def _pairs(records: Sequence[Record]) -> list[float]:
    """Return, for each whole pair of the grouping `pair`, 1.0 where both items are right."""
    found: dict[str, list[int]] = defaultdict(list)
    for record in records:
        found[(record.groups or {})["pair"]].append(record.correct)
    return [float(all(marks)) for marks in found.values() if len(marks) == 2]


MMVP_WRONG_PAIRS = ("49", "139")
"""Pairs of rows 98/99 and 278/279, counted from 0, whose labels are wrong: github.com/tsb0601/MMVP, issues 14, 30."""


def mmvp(records: Sequence[Record]) -> Mapping[str, Strata]:
    """MMVP's pairs, rows 2k and 2k + 1, with and without those whose labels are known to be wrong."""
    sound = [record for record in records if (record.groups or {})["pair"].split("/")[0] not in MMVP_WRONG_PAIRS]
    return {"pairs": _even([_pairs(records)]), "pairs with sound labels": _even([_pairs(sound)])}


def spatialbench(records: Sequence[Record]) -> Mapping[str, Strata]:
    """SpatialBench by its categories: yes/no by pairs, `reach` and `size` by items too, counting by relative error.

    https://github.com/BAAI-DCAI/SpatialBot, eval_spatialbench.py; a count scores max(0, 1 - |x - true| / true).
    """
    tasks: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        tasks[record.task or ""].append(record)
    figures: dict[str, Strata] = {
        f"{name} by pairs": _even([_pairs(tasks[name])]) for name in ("existence", "reach", "size")
    }
    figures |= {f"{name} by items": _even([list(map(score_of, tasks[name]))]) for name in ("reach", "size")}
    return figures | {"counting by relative error": _even([[score_of(record) for record in tasks["counting"]]])}


def boxes(records: Sequence[Record]) -> Mapping[str, Strata]:
    """The mean IoU and the accuracy at IoU 0.5, 0.75 and 0.9."""
    values = [score_of(record) for record in records]
    shares = {f"accuracy at IoU {t}": _even([[float(value >= t) for value in values]]) for t in BOX_THRESHOLDS}
    return {"mean IoU": _even([values])} | shares


def multihop(records: Sequence[Record]) -> Mapping[str, Strata]:
    """MultihopSpatial: choice right and IoU >= 0.5; the choice alone; the mean IoU of boxes beside right choices.

    https://github.com/EvolvingLMMs-Lab/lmms-eval, tasks/multihopspatial/utils.py: acc50iou, mcq_acc, avg_iou.
    """
    marks = [(record.facts or {}).get("choice", 0) for record in records]
    ious = [record.score for record, mark in zip(records, marks, strict=True) if mark and record.score is not None]
    return {
        "choice and IoU 0.5": _even([[float(record.correct) for record in records]]),
        "choice": _even([[float(mark) for mark in marks]]),
        "mean IoU of right choices": _even([ious]),
    }


def all_right(grouping: str) -> Rule:
    """Return the rule by which a group counts when all of its items are right; one that lacks an item is left out."""

    def rule(records: Sequence[Record]) -> Mapping[str, Strata]:
        found: dict[str, list[int]] = defaultdict(list)
        sizes: dict[str, int] = {}
        for record in records:
            name = (record.groups or {})[grouping]
            found[name].append(record.correct)
            sizes[name] = (record.facts or {})["sizes"][grouping]
        whole = [float(all(marks)) for name, marks in found.items() if len(marks) == sizes[name]]
        return {f"groups right: {grouping}": _even([whole])}

    return rule


def accuracy(records: Sequence[Record]) -> Mapping[str, Strata]:
    """The share of right answers."""
    return {"accuracy": _even([[float(record.correct) for record in records]])}


RULES: dict[str, Rule] = {
    "accuracy": accuracy,
    "mean score": mean_score,
    "mean over tasks": mean_over_tasks,
    "vsi-bench": vsi_bench,
    "chance-adjusted": chance_adjusted,
    "cv-bench": cv_bench,
    "mindcube": mindcube,
    "mmvp": mmvp,
    "spatialbench": spatialbench,
    "boxes": boxes,
    "multihop": multihop,
    "flip_circular": all_right("flip_circular"),
}
"""Name of a rule -> the figures that it makes of records."""

"""From records to figures: accuracy with its interval, per task, how answers were read, mean rewards."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.journal import Record
from evaluation.reports.faithfulness import ROWS
from evaluation.reports.intervals import mean_interval, proportion
from evaluation.reports.official import RULES, measure
from evaluation.scoring.strict import PARSE_FAILURES
from spatialthinker.plain_text import printable


def name_cluster(record: Record) -> str:
    """Return the cluster that a record belongs to; an item without any is its own."""
    return f"item {record.id}" if record.cluster is None else record.cluster


def clustered_standard_error(records: Sequence[Record]) -> float | None:
    """Return the standard error of the accuracy when items of one cluster depend on each other; None below two.

    sqrt(G / (G - 1) sum_g (sum_{i in g} (y_i - p))^2) / n over G clusters.
    https://doi.org/10.3368/jhr.50.2.317
    """
    if not records:
        return None
    n = len(records)
    p = sum(record.correct for record in records) / n
    sums: dict[str, float] = defaultdict(float)
    for record in records:
        sums[name_cluster(record)] += record.correct - p
    if len(sums) < 2:
        return None
    return math.sqrt(len(sums) / (len(sums) - 1) * sum(value * value for value in sums.values())) / n


def summarize_groups(records: Sequence[Record], sizes: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """Return, by grouping, the accuracy over groups, each right when all its items are.

    `sizes` holds the number of items of every group in the data; groups of which an item is missing do not count.
    """
    answered: dict[str, dict[str, list[int]]] = {name: defaultdict(list) for name in sizes}
    for record in records:
        for name, group in (record.groups or {}).items():
            answered[name][group].append(record.correct)
    result = {}
    for name, groups in answered.items():
        complete = [all(values) for group, values in groups.items() if len(values) == sizes[name][group]]
        result[name] = proportion(sum(complete), len(complete)) | {"incomplete": len(groups) - len(complete)}
    return result


def summarize(
    records: Sequence[Record],
    settings: dict[str, Any],
    group_sizes: Mapping[str, Mapping[str, int]] | None = None,
    extractor: Mapping[str, Any] | None = None,
    rule: str | None = None,
    faithfulness: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the run's summary; `official` holds the figures of the benchmark's own rule, a name of RULES.

    Items that ended in an error (a broken image) got no answer: `accuracy` is over answered items, and
    `accuracy_errors_wrong` counts them as wrong. `macro_accuracy` is the mean over the tasks seen. `scorings` sets
    the strict reading of answers beside the released rule, and beside strict reading with an extractor's opinions on
    what the rules could not read.
    """
    answered = [record for record in records if record.status == "ok"]
    kinds = Counter(record.kind for record in answered)
    names = sorted({record.task for record in answered if record.task is not None})
    tasks = {name: _accuracy([record for record in answered if record.task == name]) for name in names}
    rewards = [record.reward for record in answered if record.reward is not None]
    correct = sum(record.correct for record in answered)
    strict = [record.correct_strict for record in answered if record.correct_strict is not None]
    scorings = {"strict": strict, "paper": [r.correct_paper for r in answered if r.correct_paper is not None]}
    if extractor is not None:
        scorings["strict, then extractor"] = [extractor["correct"].get(record.id) for record in answered]
    return {
        "settings": settings,
        "items": len(records),
        "answered": len(answered),
        "errors": len(records) - len(answered),
        **_accuracy(answered),
        "accuracy_errors_wrong": correct / len(records) if records else 0.0,
        "macro_accuracy": sum(task["accuracy"] for task in tasks.values()) / len(tasks) if tasks else None,
        "standard_error_clustered": clustered_standard_error(answered),
        "clusters": len({record.cluster for record in answered if record.cluster is not None}),
        "official": {name: f._asdict() for name, f in measure(RULES[rule], answered).items()} if rule else {},
        "groups": summarize_groups(answered, group_sizes or {}),
        "scorings": {name: proportion(sum(map(bool, marks)), len(marks)) for name, marks in scorings.items()},
        "parse_failure_rate": sum(kinds[kind] for kind in PARSE_FAILURES) / len(answered) if answered else 0.0,
        "kinds": dict(sorted(kinds.items(), key=lambda item: str(item[0]))),
        "tasks": tasks,
        "rewards": {
            key: dict(zip(("mean", "low", "high"), mean_interval([reward[key] for reward in rewards]), strict=True))
            for key in (rewards[0] if rewards else ())
        },
        "extractor": None if extractor is None else {k: v for k, v in extractor.items() if k != "correct"},
        "faithfulness": faithfulness,
        "cost_usd": round(sum(r.cost_usd for r in records), 6),
        "seconds_mean": sum(r.seconds for r in answered) / len(answered) if answered else 0.0,
        "response_tokens_mean": sum(r.response_tokens for r in answered) / len(answered) if answered else 0.0,
    }


def _accuracy(records: Sequence[Record]) -> dict[str, Any]:
    return proportion(sum(record.correct for record in records), len(records))


def format_table(summary: dict[str, Any]) -> str:
    """Return the summary as a table for the terminal."""
    return "\n".join([align_rows([_HEADER, *_table_rows(summary)]), *_notes(summary)])


def align_rows(rows: Sequence[Sequence[str]]) -> str:
    """Return rows, the first a head, in columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    form = "  ".join(f"{{:{side}{width}}}" for side, width in zip("<>>>", widths, strict=True))
    lines = [form.format(*row) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def format_markdown(summary: dict[str, Any]) -> str:
    """Return the summary as a page: what was evaluated, the table, how answers were read."""
    settings = summary["settings"]
    title = f"# {settings.get('dataset', 'evaluation')}: {settings.get('model_path', '')}"
    table = [_HEADER, ("---", "---:", "---:", "---:"), *_table_rows(summary)]
    lines = [title, "", *("| " + " | ".join(map(_escape, row)) + " |" for row in table), ""]
    lines += [f"- {note}" for note in _notes(summary)]
    lines += ["", "| setting | value |", "| --- | --- |"]
    lines += [f"| {key} | {_escape(str(value))} |" for key, value in settings.items()]
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    return printable(text).replace("|", "\\|")


_HEADER = ("task", "n", "accuracy", "95 % interval")


def _table_rows(summary: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    named = [*summary["tasks"].items(), ("all", summary)]
    named += [(f"groups right: {name}", group) for name, group in summary["groups"].items()]
    named += [(f"all, scoring {name}", scoring) for name, scoring in summary["scorings"].items()]
    figures = [(name, *_interval(found)) for name, found in named]
    faithfulness = summary.get("faithfulness") or {}
    figures += [(ROWS[n], *_interval(faithfulness[n])) for n in ROWS if n in faithfulness]
    figures += [(f"own rule: {name}", *figure.values()) for name, figure in summary["official"].items()]
    figures += [(f"reward/{key}", summary["answered"], *f.values()) for key, f in summary["rewards"].items()]
    return [
        (printable(name), str(n), f"{value:.3f}", f"{low:.3f} - {high:.3f}") for name, n, value, low, high in figures
    ]


def _interval(found: Mapping[str, Any]) -> tuple[int, float, float, float]:
    return found["n"], found["accuracy"], found["accuracy_low"], found["accuracy_high"]


def _notes(summary: dict[str, Any]) -> list[str]:
    kinds = ", ".join(f"{kind} {count}" for kind, count in summary["kinds"].items())
    notes = [f"answers read as: {kinds or 'none'}; parse failures {summary['parse_failure_rate']:.1%}"]
    if len(summary["tasks"]) > 1:
        notes.append(f"mean over the {len(summary['tasks'])} tasks: {summary['macro_accuracy']:.3f}")
    if summary["clusters"] and summary["standard_error_clustered"] is not None:
        error = summary["standard_error_clustered"]
        notes.append(f"standard error over {summary['clusters']} clusters of dependent items: {error:.4f}")
    for name, group in summary["groups"].items():
        if group["incomplete"]:
            notes.append(f"{group['incomplete']} groups of {name} lack an item and do not count")
    if extractor := summary.get("extractor"):
        notes.append(
            f"{extractor['model']} read {extractor['asked']} of the {extractor['unread']} answers that the rules "
            f"could not, for {extractor['cost_usd']:.4f} dollars"
        )
    if found := summary.get("faithfulness"):
        asked, decided = found["follows"]["asked"], found["follows"]["n"]
        notes.append(
            f"{asked} of {summary['answered']} questions are of a kind that a scene can decide, and the model's own "
            f"decide {decided}"
            + (f"; further passes cost {found['cost_usd']:.4f} dollars" if found["cost_usd"] else "")
        )
    if summary["errors"]:
        notes.append(f"{summary['errors']} of {summary['items']} items ended in an error and have no answer")
    return notes

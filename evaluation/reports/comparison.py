"""From the journals of several runs to one table: accuracies with intervals, and paired tests against the first model.

A model is what the runs of one set of settings have in common; it holds one run for each benchmark. Two models are
compared on the items that both answered.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.benchmarks.rows import SUITES
from evaluation.journal import Record, read_journal
from evaluation.reports.faithfulness import ROWS as FAITHFULNESS
from evaluation.reports.intervals import wilson_interval
from evaluation.reports.published import PUBLISHED
from evaluation.reports.suites import covered_suites, measure_suite
from evaluation.reports.summary import PARSE_FAILURES, name_cluster

if TYPE_CHECKING:
    import numpy as np

RESAMPLES = 10_000
PERCENTILES = (2.5, 97.5)
_DATA_SETTINGS = frozenset({"dataset", "data_fingerprint", "data_path", "split", "revision"})
FAITHFULNESS_NOTE = (
    "Answers that follow: in % of the questions that the model's own scene decides by its boxes and relations. "
    "95 % Wilson intervals."
)
SUITE_NOTE = (
    "Each line by its benchmark's own rule, in %, and their mean. Differences are of right answers, with the tests "
    "above, p not adjusted."
)
_BESIDE = (".extractor.jsonl", ".blank.jsonl", ".true_scene.jsonl")
"""Endings of journals that lie beside a run's own."""
_ENDINGS = (*_BESIDE, ".jsonl", ".summary.json", ".summary.md", ".json")


@dataclass(frozen=True)
class AnsweredRun:
    """One model's answers to one benchmark."""

    path: Path
    settings: dict[str, Any]
    records: dict[str, Record]
    """The answered items."""
    errors: int
    faithfulness: dict[str, Any] | None = None
    """Figures of --faithfulness in the run's summary."""

    @property
    def benchmark(self) -> str:
        return self.settings["dataset"]


@dataclass(frozen=True)
class Model:
    """Runs of the same settings, by benchmark."""

    label: str
    settings: dict[str, Any]
    runs: dict[str, AnsweredRun] = field(default_factory=dict)


def find_journals(names: Iterable[str]) -> list[Path]:
    """Return the journals that the names mean: a journal, any other file of a run, its base name, or a folder of runs.

    Errors: FileNotFoundError for a name without a journal.
    """
    found: dict[Path, None] = {}
    for name in names:
        path = Path(name)
        if path.is_dir():
            journals = sorted(each for each in path.glob("*.jsonl") if not each.name.endswith(_BESIDE))
        else:
            ending = next((ending for ending in _ENDINGS if path.name.endswith(ending)), "")
            journal = path.with_name(path.name.removesuffix(ending) + ".jsonl")
            journals = [journal] if journal.is_file() else []
        if not journals:
            raise FileNotFoundError(f"{name}: no journal (.jsonl) of an evaluation there")
        found |= dict.fromkeys(journals)
    return list(found)


def read_run(path: Path) -> AnsweredRun:
    """Return the run of a journal. Errors: ValueError for a file that is none, or one without answers."""
    settings, records = read_journal(path)
    if "dataset" not in settings or "model_path" not in settings:
        raise ValueError(f"{path}: its settings name no dataset or no model_path; not a journal of evals.py")
    answered = {item_id: record for item_id, record in records.items() if record.status == "ok"}
    if not answered:
        raise ValueError(f"{path}: none of its {len(records)} items has an answer")
    return AnsweredRun(path, settings, answered, len(records) - len(answered), _read_faithfulness(path))


def _read_faithfulness(journal: Path) -> dict[str, Any] | None:
    """Return the figures of --faithfulness in the summary beside a journal, None without them.

    Errors: ValueError for a summary that is damaged.
    """
    path = journal.with_name(journal.name.removesuffix(".jsonl") + ".summary.json")
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_bytes()).get("faithfulness")
        return found and {name: found[name] for name in FAITHFULNESS if name in found}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error}); evaluate again with --resume to write it") from None


def group_models(runs: Sequence[AnsweredRun]) -> list[Model]:
    """Return the models in the order of their first runs.

    Errors: ValueError for two runs of one model on one benchmark, and for runs of one benchmark on different data.
    """
    models: dict[str, Model] = {}
    labels = _name_models([_model_settings(run) for run in runs])
    first: dict[str, AnsweredRun] = {}
    for run in runs:
        settings = _model_settings(run)
        model = models.setdefault(repr(settings), Model(labels[repr(settings)], settings))
        if run.benchmark in model.runs:
            other = model.runs[run.benchmark].path
            raise ValueError(f"{other} and {run.path} are runs of one model on {run.benchmark}; leave one out")
        known = first.setdefault(run.benchmark, run)
        if known.settings.get("data_fingerprint") != run.settings.get("data_fingerprint"):
            raise ValueError(
                f"{known.path} and {run.path} hold answers to different data of {run.benchmark} "
                "(their data_fingerprint differs): their items cannot be compared"
            )
        model.runs[run.benchmark] = run
    return list(models.values())


def _model_settings(run: AnsweredRun) -> dict[str, Any]:
    return {key: run.settings[key] for key in sorted(run.settings) if key not in _DATA_SETTINGS}


def _name_models(every: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return a label for each set of settings: the model's short name and what tells it from others of that name."""
    unique = {repr(settings): settings for settings in every}
    names = {key: short_name(settings["model_path"]) for key, settings in unique.items()}
    labels = {}
    for key, settings in unique.items():
        rivals = [other for other_key, other in unique.items() if names[other_key] == names[key]]
        known = {name for rival in rivals for name in rival}
        differing = {name for name in known if len({repr(rival.get(name)) for rival in rivals}) > 1}
        if "model_path" in differing:  # other weights go without saying
            differing.discard("weights_fingerprint")
        details = [f"{name} {settings.get(name)}" for name in sorted(differing)]
        labels[key] = names[key] + (f" ({', '.join(details)})" if details else "")
    return labels


def short_name(model_path: str) -> str:
    """Return the telling part of a model path: merged checkpoints by run and step, others by their last part."""
    parts = [part for part in Path(model_path).parts if part not in ("huggingface", "actor", "/")]
    name = parts[-1]
    if re.match(r"global_step_\d+$", name):
        owners = [part for part in parts[:-1] if part != "checkpoints"]
        return f"{owners[-1]} step {name.removeprefix('global_step_')}" if owners else name
    return name


def measure_accuracy(run: AnsweredRun) -> dict[str, Any]:
    """Return the accuracy over a run's answered items, with its 95 % Wilson interval from low to high."""
    records = run.records.values()
    n, correct = len(records), sum(record.correct for record in records)
    low, high = wilson_interval(correct, n)
    return {
        "n": n,
        "correct": correct,
        "accuracy": correct / n,
        "low": low,
        "high": high,
        "errors": run.errors,
        "parse_failure_rate": sum(record.kind in PARSE_FAILURES for record in records) / n,
        "response_tokens_mean": sum(record.response_tokens for record in records) / n,
        "cost_usd": sum(record.cost_usd for record in records),
    }


def compare_runs(baseline: AnsweredRun, run: AnsweredRun) -> dict[str, Any] | None:
    """Return the paired comparison on common items; None without any.

    gained and lost: items that only the run, or only the baseline, has right. p_value: McNemar's exact test, the
    two-sided binomial test of gained among gained + lost at 1/2 (https://doi.org/10.1007/BF02295996). Items of one
    cluster depend on each other: where there are any, the signs of the clusters' differences are drawn instead, which
    is the same test when every cluster is one item. low and high: percentiles of the bootstrap over clusters.
    """
    import numpy as np

    kinds = _count_cluster_kinds(baseline, run)
    if not kinds:
        return None
    common = baseline.records.keys() & run.records.keys()
    gained = sum(run.records[i].correct > baseline.records[i].correct for i in common)
    lost = sum(run.records[i].correct < baseline.records[i].correct for i in common)
    rng = np.random.default_rng(0)
    difference = (gained - lost) / len(common)
    interval = _mean_interval([difference], _resample_means(rng, kinds), "difference")
    return {"n": len(common), "gained": gained, "lost": lost, **interval, "p_value": _test_signs(rng, kinds)}


ClusterKinds = Counter[tuple[int, int]]
"""Number of clusters with this sum and this number of items: clusters that agree in both are exchangeable."""


def _count_cluster_kinds(baseline: AnsweredRun | None, run: AnsweredRun) -> ClusterKinds:
    """Return the clusters of a run's right answers, or of its differences from a baseline on common items."""
    sums: dict[str, int] = defaultdict(int)
    sizes: Counter[str] = Counter()
    for item_id, record in run.records.items():
        if baseline is not None and item_id not in baseline.records:
            continue
        name = name_cluster(record)
        sums[name] += record.correct - (0 if baseline is None else baseline.records[item_id].correct)
        sizes[name] += 1
    return Counter((sums[name], size) for name, size in sizes.items())


def _resample_means(rng: "np.random.Generator", kinds: ClusterKinds) -> "np.ndarray":
    """Return [RESAMPLES] means over items: resampling clusters is drawing how many there are of each kind."""
    import numpy as np

    count = kinds.total()
    counts = rng.multinomial(count, [number / count for number in kinds.values()], size=RESAMPLES)
    sums, sizes = np.array(list(kinds)).T
    return counts @ sums / (counts @ sizes)


def _test_signs(rng: "np.random.Generator", kinds: ClusterKinds) -> float:
    """Return the two-sided p-value of the clusters' differences against random signs."""
    import numpy as np
    from scipy.stats import binomtest

    differing: Counter[int] = Counter()
    for (difference, _), number in kinds.items():
        differing[difference] += number
    differing.pop(0, None)
    if not differing:
        return 1.0
    if differing.keys() <= {1, -1}:
        return float(binomtest(differing[1], differing.total()).pvalue)
    steps: Counter[int] = Counter()
    for difference, number in differing.items():
        steps[abs(difference)] += number
    draws = sum(step * (2 * rng.binomial(number, 0.5, RESAMPLES) - number) for step, number in steps.items())
    found = abs(sum(difference * number for difference, number in differing.items()))
    return float((1 + np.sum(np.abs(draws) >= found)) / (1 + RESAMPLES))


def compare_models(models: Sequence[Model], published: Sequence[str] = ()) -> dict[str, Any]:
    """Return the comparison as it is written to JSON; shares are fractions, published figures too.

    `q_value` is the p-value adjusted for the number of tests in the table (Benjamini and Hochberg).
    """
    from scipy.stats import false_discovery_control

    baseline = models[0]
    benchmarks = list(dict.fromkeys(name for model in models for name in model.runs))
    rows: dict[str, Any] = {}
    for name in benchmarks:
        differences = {
            model.label: result
            for model in models[1:]
            if name in model.runs and name in baseline.runs
            if (result := compare_runs(baseline.runs[name], model.runs[name])) is not None
        }
        rows[name] = {
            "accuracy": {m.label: measure_accuracy(m.runs[name]) for m in models if name in m.runs},
            "difference": differences,
            "published": {m: PUBLISHED[name][m] / 100 for m in published if m in PUBLISHED.get(name, {})},
        }
    tests = [test for row in rows.values() for test in row["difference"].values()]
    adjusted = false_discovery_control([test["p_value"] for test in tests]) if tests else ()
    for test, q_value in zip(tests, adjusted, strict=True):
        test["q_value"] = float(q_value)
    return {
        "baseline": baseline.label,
        "models": {
            model.label: {
                "settings": model.settings,
                "journals": {name: str(run.path) for name, run in model.runs.items()},
            }
            for model in models
        },
        "published": list(published),
        "benchmarks": rows,
        "suites": {name: rows for name in covered_suites(baseline.runs) if (rows := _compare_suite(name, models))},
        "faithfulness": _list_faithfulness(models, benchmarks),
        "average": _average(models, rows, published),
    }


def _compare_suite(name: str, models: Sequence[Model]) -> dict[str, Any]:
    """Return a leaderboard's rows in the form of `benchmarks`, of the models that answered all of it.

    Accuracies are figures by each benchmark's own rule; differences are of right answers, items of a line together.
    """
    whole = [model for model in models if name in covered_suites(model.runs)]
    try:
        figures = {
            model.label: measure_suite(name, {each: list(run.records.values()) for each, run in model.runs.items()})
            for model in whole
        }
    except KeyError:  # a journal of an older version lacks what a rule reads
        return {}
    rows: dict[str, Any] = {line: {"accuracy": {}, "difference": {}} for found in figures.values() for line in found}
    for label, found in figures.items():
        for line, figure in found.items():
            n, value, low, high = figure
            rows[line]["accuracy"][label] = {"n": n, "accuracy": value, "low": low, "high": high}
    for line, row in rows.items():
        members = SUITES[name].get(line.partition(":")[0], ())
        for model in whole[1:] if members else ():
            if (result := compare_runs(_pool(whole[0], members), _pool(model, members))) is not None:
                row["difference"][model.label] = result
    return rows


def _pool(model: Model, members: Sequence[str]) -> AnsweredRun:
    """Return the runs of several benchmarks as one; items of two of them do not depend on each other."""
    runs = [model.runs[member] for member in members]
    records = {
        f"{run.benchmark} {item_id}": replace(record, cluster=f"{run.benchmark} {name_cluster(record)}")
        for run in runs
        for item_id, record in run.records.items()
    }
    return AnsweredRun(runs[0].path, runs[0].settings, records, sum(run.errors for run in runs))


def _list_faithfulness(models: Sequence[Model], benchmarks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return benchmark and figure of --faithfulness -> model -> its share and interval."""
    found: dict[str, dict[str, Any]] = {}
    for name in benchmarks:
        for model in models:
            figures = (model.runs[name].faithfulness if name in model.runs else None) or {}
            for key, figure in figures.items():
                found.setdefault(f"{name}: {FAITHFULNESS[key]}", {})[model.label] = {
                    "n": figure["n"],
                    "accuracy": figure["accuracy"],
                    "low": figure["accuracy_low"],
                    "high": figure["accuracy_high"],
                }
    return found


def fill_faithfulness(comparison: Mapping[str, Any], write: Callable[[Mapping[str, Any]], str]) -> list[list[str]]:
    """Return the rows of the table of --faithfulness: a figure, then each model's cell."""
    rows = comparison["faithfulness"].items()
    return [[name, *(write(row[m]) if m in row else "" for m in comparison["models"])] for name, row in rows]


def fill_rows(
    comparison: Mapping[str, Any],
    accuracy: Callable[[Mapping[str, Any]], str],
    difference: Callable[[Mapping[str, Any]], str],
    published: Callable[[float], str],
) -> list[list[str]]:
    """Return the rows of a comparison's table, cells written by these functions: benchmarks, then their average."""
    labels, average = list(comparison["models"]), comparison["average"]
    named = list(comparison["benchmarks"].items())
    if average:
        named.append((f"average of {len(average['benchmarks'])}", average))
    columns = [("accuracy", label, accuracy) for label in labels]
    columns += [("difference", label, difference) for label in labels[1:]]
    columns += [("published", model, published) for model in comparison["published"]]
    return [[name, *(write(row[k][c]) if c in row[k] else "" for k, c, write in columns)] for name, row in named]


def _average(models: Sequence[Model], rows: Mapping[str, Any], published: Sequence[str]) -> dict[str, Any] | None:
    """Return the plain mean over the benchmarks that every model answered; None where those are fewer than two."""
    import numpy as np

    names = [name for name, row in rows.items() if len(row["accuracy"]) == len(models)]
    if len(names) < 2:
        return None
    rng = np.random.default_rng(0)
    result: dict[str, Any] = {"benchmarks": names, "accuracy": {}, "difference": {}}
    for quantity, averaged in (("accuracy", models), ("difference", models[1:])):
        for model in averaged:
            parts = [rows[name][quantity].get(model.label) for name in names]
            if None in parts:
                continue
            baselines = [models[0].runs[name] if quantity == "difference" else None for name in names]
            kinds = [_count_cluster_kinds(base, model.runs[name]) for base, name in zip(baselines, names, strict=True)]
            draws = np.mean([_resample_means(rng, part) for part in kinds], axis=0)
            result[quantity][model.label] = _mean_interval([part[quantity] for part in parts], draws, quantity)
    complete = [model for model in published if all(model in rows[name]["published"] for name in names)]
    means = {model: float(np.mean([rows[name]["published"][model] for name in names])) for model in complete}
    return result | {"published": means}


def _mean_interval(values: Sequence[float], draws: "np.ndarray", name: str) -> dict[str, float]:
    import numpy as np

    low, high = np.percentile(draws, PERCENTILES)
    return {name: float(np.mean(values)), "low": float(low), "high": float(high)}

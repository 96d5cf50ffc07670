"""Compare evaluations: one table, one figure and a page to browse, over models and benchmarks.

    python3 evaluation/compare.py evaluation/outputs/stvqa_BASE_reasoning evaluation/outputs/stvqa_TRAINED_reasoning

RUN is a file of an evaluation, its name without ending, or a folder of evaluations. The first run's model is the
baseline. Writes table.md, table.json, figure.png and index.html into --out. Exit code: 0; 2 for bad input.
"""

import argparse
import difflib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout's packages before installed ones

from evaluation.reports.published import DEFAULT_MODELS, MODELS, match_model

if TYPE_CHECKING:
    from evaluation.benchmarks.samples import Sample
    from evaluation.reports.comparison import Model

# They tell models apart in grey.
_MARKERS = ("o", "s", "^", "v", "P", "X")
_ROW_IN = 0.22
SIGNIFICANT = 0.05


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="evaluation to compare; the first one's model is the baseline")
    add("--out", type=Path, default=Path("evaluation/outputs/comparison"), help="(default: %(default)s)")
    add("--published", help=f"models of the paper to show, comma-separated, or none (default: {DEFAULT_MODELS})")
    where = "where the images are (default: as in the runs)"
    add("--data_path", action="append", default=[], metavar="[DATASET=]PATH", help=where)
    add("--split", help="split to read (default: that of the runs)")
    add("--page_items", type=int, default=300, help="items on the page, over all benchmarks (default: 300)")
    return parser


def choose_published(names: str | None, models: "Sequence[Model]") -> list[str]:
    """Return the published models to show: those asked for, else the default ones and those that were evaluated.

    Errors: ValueError for an unknown name, with the nearest.
    """
    if names is None:
        evaluated = [match_model(model.settings["model_path"]) for model in models]
        return list(dict.fromkeys(name for name in (*evaluated, *DEFAULT_MODELS) if name is not None))
    chosen = [] if names == "none" else [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in MODELS:
            nearest = difflib.get_close_matches(name, MODELS, 1, 0)[0]
            raise ValueError(f"--published {name}: nearest is {nearest!r}; known: none, {', '.join(MODELS)}")
    return chosen


def format_markdown(comparison: Mapping[str, Any]) -> str:
    """Return the table in percent. A difference is bold where its adjusted p-value is below SIGNIFICANT."""
    from evaluation.reports.comparison import FAITHFULNESS_NOTE, SUITE_NOTE, fill_faithfulness, fill_rows

    labels, baseline = list(comparison["models"]), comparison["baseline"]
    others = [label for label in labels if label != baseline]
    header = ["benchmark", *labels, *(f"{label} - baseline" for label in others)]
    header += [f"{name} (paper)" for name in comparison["published"]]
    rows = fill_rows(comparison, _accuracy_cell, _difference_cell, lambda share: f"{100 * share:.1f}")
    table = _write_table(header, rows)
    notes = ["Accuracy in % of the answered items with its 95 % Wilson interval."]
    if others:
        notes.append(
            f"Differences in points from {baseline} over the items that both answered, with 95 % bootstrap intervals "
            f"and p of McNemar's exact test, or of the signs of groups where items depend on each other; bold where "
            f"p, adjusted for the number of tests, is below {SIGNIFICANT}."
        )
    if comparison["published"]:
        notes.append(
            "The paper's figures were graded by the released parser and answered under its released prompt; "
            "the prompt here is worded otherwise."
        )
    text = f"{table}\n\n{' '.join(notes)}\n"
    for name, suite in comparison["suites"].items():
        lines = {**comparison, "benchmarks": suite, "average": None, "published": []}
        columns = [name, *labels, *(f"{label} - baseline" for label in others)]
        text += f"\n{_write_table(columns, fill_rows(lines, _accuracy_cell, _difference_cell, str))}\n\n{SUITE_NOTE}\n"
    if found := fill_faithfulness(comparison, _accuracy_cell):
        text += f"\n{_write_table(['faithfulness', *labels], found)}\n\n{FAITHFULNESS_NOTE}\n"
    return text


def _write_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _accuracy_cell(facts: Mapping[str, Any]) -> str:
    count = f", n {facts['n']}" if "n" in facts else ""
    value, low, high = (f"{100 * facts[key]:.1f}" for key in ("accuracy", "low", "high"))
    return f"{value} [{low}, {high}]{count}"


def _difference_cell(facts: Mapping[str, Any]) -> str:
    value, low, high = (f"{100 * facts[key]:+.1f}" for key in ("difference", "low", "high"))
    mark = "**" if facts.get("q_value", 1) < SIGNIFICANT else ""
    test = f", p {facts['p_value']:.2g}, n {facts['n']}" if "p_value" in facts else ""
    return f"{mark}{value}{mark} [{low}, {high}]{test}"


def draw_figure(comparison: Mapping[str, Any], path: Path) -> None:
    """Write every model's accuracies with their intervals, and below them the published ones as hollow marks."""
    import numpy as np
    from matplotlib.figure import Figure

    from spatialthinker.visualize import LINE_COLORS

    labels, published = list(comparison["models"]), comparison["published"]
    rows = list(comparison["benchmarks"].items())
    num_lines = len(labels) + bool(published)
    height = max(2.4, _ROW_IN * len(rows) * (num_lines + 1.2) + 1.2 + 0.2 * len(labels + published) / 2)
    figure = Figure(figsize=(7.2, height), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    step = 0.7 / num_lines
    for index, label in enumerate(labels):
        # Every model lies on its own line, the first on top, so that no interval hides another.
        found = {i: facts for i, (_, row) in enumerate(rows) if (facts := row["accuracy"].get(label)) is not None}
        places = [position + step * (index - (num_lines - 1) / 2) for position in found]
        ends = [[100 * facts[key] for facts in found.values()] for key in ("low", "accuracy", "high")]
        low, values, high = map(np.array, ends)
        errors = np.clip([values - low, high - values], 0, None)
        color, marker = LINE_COLORS[index % len(LINE_COLORS)], _MARKERS[index % len(_MARKERS)]
        axes.errorbar(values, places, xerr=errors, fmt=marker, color=color, ms=6, capsize=3, lw=1.6, label=label)
    for index, name in enumerate(published):
        shares = {i: row["published"][name] for i, (_, row) in enumerate(rows) if name in row["published"]}
        if shares:
            x, y = [100 * share for share in shares.values()], [i + step * (num_lines - 1) / 2 for i in shares]
            marker = ("D", "^", "s", "v")[index % 4]
            axes.scatter(x, y, marker=marker, s=42, facecolors="none", edgecolors="#5c6670", label=f"{name} (paper)")
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("accuracy in %, 95 % interval")
    axes.grid(axis="x", color="#d9dde2", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    order = [*labels, *(f"{name} (paper)" for name in published)]
    handles = sorted(zip(*axes.get_legend_handles_labels(), strict=True), key=lambda pair: order.index(pair[1]))
    figure.legend(*zip(*handles, strict=True), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, format="png")


def read_samples(args: argparse.Namespace, models: "Sequence[Model]") -> "dict[str, dict[str, Sample]]":
    """Return each benchmark's samples by item id; a benchmark of the hub that cannot be read is left out with a note.

    Errors: ValueError or OSError where a path that was given holds other data than the runs were asked.
    """
    from evaluation.benchmarks.rows import BENCHMARKS
    from evaluation.benchmarks.samples import fingerprint_samples, load_samples

    paths = {name if found else "": path for name, found, path in (split_path(value) for value in args.data_path)}
    runs = {name: run for model in reversed(models) for name, run in model.runs.items()}
    if unknown := paths.keys() - runs.keys() - {""}:
        raise ValueError(f"--data_path {unknown.pop()}=...: the runs are of {', '.join(runs)}")
    samples = {}
    for name, run in runs.items():
        given = paths.get(name, paths.get(""))
        path, split = given or run.settings.get("data_path"), args.split or run.settings.get("split")
        try:
            if name not in BENCHMARKS:
                raise ValueError(f"{name} of {run.path}: no such benchmark; known: {', '.join(BENCHMARKS)}")
            every = load_samples(name, BENCHMARKS[name], path, split)
            if fingerprint_samples(every) != run.settings["data_fingerprint"]:
                raise ValueError(f"{path or name}: not the data of {run.path}; give them with --data_path and --split")
        except (OSError, ValueError) as error:
            if given is not None:
                raise
            print(f"compare: {name} on the page without images: {error}", file=sys.stderr)
            continue
        samples[name] = {sample.id: sample for sample in every}
    return samples


def split_path(value: str) -> tuple[str, bool, str]:
    """Return (data set, whether there is one, path) of "DATASET=PATH" or "PATH"."""
    from evaluation.benchmarks.rows import BENCHMARKS

    name, mark, path = value.partition("=")
    return (name, True, path) if mark and name in BENCHMARKS else ("", False, value)


def write_comparison(args: argparse.Namespace) -> str:
    """Write the four files; return the table. Errors: ValueError or OSError with one message."""
    from evaluation.reports.compare_page import build_page
    from evaluation.reports.comparison import compare_models, find_journals, group_models, read_run
    from spatialthinker.storage.files import write_json, write_text

    if args.page_items < 0:
        raise ValueError(f"--page_items {args.page_items}: need at least 0")
    models = group_models([read_run(path) for path in find_journals(args.runs)])
    comparison = compare_models(models, choose_published(args.published, models))
    samples = read_samples(args, models) if args.page_items else {}
    table = format_markdown(comparison)
    write_json(args.out / "table.json", comparison)
    write_text(args.out / "table.md", table)
    draw_figure(comparison, args.out / "figure.png")
    page = build_page(comparison, models, samples, args.page_items, (args.out / "figure.png").read_bytes())
    write_text(args.out / "index.html", page)
    return table


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 0, or 2 after one message about bad input."""
    args = build_parser().parse_args(argv)
    try:
        table = write_comparison(args)
    except (ValueError, OSError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    print(table)
    for name in ("table.md", "table.json", "figure.png", "index.html"):
        print(args.out / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Draw a training run as one self-contained page: curves, before and after, grounded answers.

    python scripts/report.py --run_dir runs/quickstart [--out runs/quickstart/report]

Writes OUT/index.html, which needs no other file, and its pictures as PNGs beside it. Every figure comes from the
run's own files: experiment_log.jsonl, generations.jsonl and validation_step_N.jsonl of the trainer, the validation
images that experiment_config.json names, and the summaries in RUN/evaluation where there are some.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout's packages before installed ones

from toy.before_after import summarize_validation
from toy.charts import DARK, LIGHT, Series, draw_changes, draw_curves, draw_pictures

from spatialthinker.response import SECTIONS, parse_response
from spatialthinker.scene_graph import SceneGraph, parse_scene
from spatialthinker.schema import read_parquet
from spatialthinker.storage.files import write_text
from spatialthinker.visualize import (
    draw_scene,
    escape,
    html_image,
    html_page,
    html_scene_key,
    html_table,
    png_bytes,
    relation_text,
)

if TYPE_CHECKING:
    from PIL import Image

NUM_ROLLOUTS = 8
REWARD_PARTS = ("format", "count", "accuracy", "spatial_score")
METRIC_NAMES = {
    "overall": "overall reward",
    "accuracy": "accuracy",
    "spatial_score": "spatial score",
    "format": "format",
    "count": "count",
}


@dataclass(frozen=True)
class RunFiles:
    """Inputs of the report."""

    name: str
    log: list[dict[str, Any]]
    """One object per step, flat metric names."""
    generations: list[dict[str, Any]]
    comparison: dict[str, Any]
    """Validation before and after: see before_after.summarize_validation."""
    evaluations: list[dict[str, Any]]
    images: "dict[tuple[str, str], bytes]"
    """Encoded image by (problem, ground truth)."""


@dataclass(frozen=True)
class Rollout:
    """One held-out question, the newest answer to it and, if it was logged, the one before training."""

    image: "Image.Image"
    question: str
    ground_truth: str
    before: dict[str, Any] | None
    after: dict[str, Any]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file. Errors: FileNotFoundError, or ValueError with the line's number."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; the trainer writes it (trainer.logger must hold file)")
    objects = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            objects.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not objects:
        raise ValueError(f"{path} is empty")
    return objects


def read_images(config_path: Path) -> "dict[tuple[str, str], bytes]":
    """Return the validation images of the run that a configuration describes."""
    if not config_path.is_file():
        raise FileNotFoundError(f"{config_path} is missing; the trainer writes it (trainer.logger must hold file)")
    location, _, split = json.loads(config_path.read_text())["data"]["val_files"].partition("@")
    files = (
        sorted(Path(location).glob(f"{split or 'train'}-*.parquet")) if Path(location).is_dir() else [Path(location)]
    )
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"{location}: the validation data that {config_path} names are missing")
    rows = [row for file in files for row in read_parquet(file)]
    return {(row.problem, row.answer_option_text): row.images for row in rows}


def read_run(run_dir: Path) -> RunFiles:
    """Return everything the report shows. Errors: FileNotFoundError or ValueError naming the file."""
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir}: no such folder")
    folder = run_dir / "checkpoints" if (run_dir / "checkpoints").is_dir() else run_dir
    summaries = sorted((run_dir / "evaluation").glob("*.summary.json"))
    return RunFiles(
        name=run_dir.resolve().name,
        log=read_lines(folder / "experiment_log.jsonl"),
        generations=read_lines(folder / "generations.jsonl"),
        comparison=summarize_validation(folder),
        evaluations=[json.loads(path.read_text()) for path in summaries],
        images=read_images(folder / "experiment_config.json"),
    )


def series(log: list[dict[str, Any]], key: str, label: str = "") -> Series:
    """Return one metric over the steps that have it."""
    points = [(line["step"], line[key]) for line in log if line.get(key) is not None]
    return Series(label or key, [step for step, _ in points], [value for _, value in points])


def choose_rollouts(run: RunFiles) -> list[Rollout]:
    """Return up to eight questions of the newest step that has generations, with their first answers.

    Errors: ValueError if none of them belongs to an image of the validation data.
    """
    from io import BytesIO

    from PIL import Image

    first_step, last_step = (pick(line["step"] for line in run.generations) for pick in (min, max))
    key_of = lambda line: (line["problem"], line["ground_truth"])  # noqa: E731
    earlier = {key_of(line): line for line in run.generations if line["step"] == first_step != last_step}
    newest = {key_of(line): line for line in run.generations if line["step"] == last_step}
    rollouts = [
        Rollout(
            image=Image.open(BytesIO(run.images[key])).convert("RGB"),
            question=key[0].rpartition("\nQ. ")[2],
            ground_truth=key[1],
            before=earlier.get(key),
            after=line,
        )
        for key, line in newest.items()
        if key in run.images
    ]
    if not rollouts:
        raise ValueError(f"no generation of step {last_step} belongs to an image of the validation data")
    return rollouts[:NUM_ROLLOUTS]


def draw_rollout(rollout: Rollout, line: dict[str, Any]) -> "Image.Image":
    """Return the question's image with the reference's boxes and those of one answer."""
    return draw_scene(rollout.image, predicted_scene(line), reference_scene(rollout))


def predicted_scene(line: dict[str, Any]) -> SceneGraph | None:
    return parse_scene(parse_response(line["response"]).scene_text)


def reference_scene(rollout: Rollout) -> SceneGraph | None:
    return parse_scene(parse_response(rollout.ground_truth).scene_text, is_reference=True)


def draw_charts(run: RunFiles, theme: Any) -> Iterator[tuple[str, str, bytes]]:
    """Yield (file name, description, PNG) of each curve that the log has values for."""
    log = run.log
    held_out = series(log, "val/reward_score", "held-out scenes")
    reward = series(log, "reward/overall", "training rollouts")
    yield "reward", "Overall reward", draw_curves(theme, "Overall reward", "reward", [reward], markers=[held_out])
    parts = [series(log, f"reward/{part}", METRIC_NAMES[part]) for part in REWARD_PARTS]
    yield "reward_parts", "Parts of the reward", draw_curves(theme, "Parts of the reward", "score", parts)
    length = series(log, "response_length/mean", "mean")
    band = series(log, "response_length/min", "shortest to longest"), series(log, "response_length/max")
    picture = draw_curves(theme, "Response length", "tokens", [length], band=band)
    yield "response_length", "Response length", picture
    divergence = series(log, "actor/kl_loss")
    if divergence.values:
        title = "KL divergence from the reference policy"
        yield "kl", title, draw_curves(theme, title, "KL per token", [divergence])
    changes = {
        METRIC_NAMES[key]: run.comparison["metrics"][key] for key in METRIC_NAMES if key in run.comparison["metrics"]
    }
    title = "Held-out questions before and after"
    yield "before_after", title, draw_changes(theme, title, "mean with 95 % interval", changes)


def html_headline(run: RunFiles) -> str:
    """Return the title and the run in one sentence."""
    facts = run.comparison["metrics"]["overall"]
    low, high = facts["gain_interval"]
    steps = max(line["step"] for line in run.log if "val/reward_score" in line)
    verdict = "good" if low > 0 else "bad" if high < 0 else "soft"
    gain = f'<span class="{verdict}">{facts["gain"]:+.3f}</span> (95 % interval {low:+.3f} to {high:+.3f})'
    return (
        f"<h1>GRPO with the dense spatial reward: {escape(run.name)}</h1>"
        f"<p>Over {steps} training steps the mean reward on {run.comparison['held_out_samples']} held-out questions "
        f"went from {facts['before']:.3f} to {facts['after']:.3f}: {gain}.</p>"
    )


def html_comparison(run: RunFiles) -> str:
    """Return the table of before and after."""

    def cell(facts: dict[str, Any], name: str, sign: str = "") -> str:
        low, high = facts[f"{name}_interval"]
        return f"{facts[name]:{sign}.3f}\n{low:{sign}.3f} to {high:{sign}.3f}"

    metrics = run.comparison["metrics"]
    rows = [
        (METRIC_NAMES[key], cell(metrics[key], "before"), cell(metrics[key], "after"), cell(metrics[key], "gain", "+"))
        for key in METRIC_NAMES
        if key in metrics
    ]
    note = (
        f"{run.comparison['held_out_samples']} held-out questions, the same before and after. Means with their 95 % "
        "intervals: bootstrap over questions, for the gain over the paired differences."
    )
    return f'<p class="soft">{note}</p>' + html_table(("", "before", "after", "gain"), rows)


def html_evaluation(summary: dict[str, Any]) -> str:
    """Return one evaluation's accuracy per task."""
    rows = [
        (name, task["n"], f"{task['accuracy']:.3f}", f"{task['accuracy_low']:.3f} to {task['accuracy_high']:.3f}")
        for name, task in [*summary["tasks"].items(), ("all", summary)]
    ]
    settings = summary["settings"]
    note = (
        f"{settings['dataset']}, template {settings['template']}, {settings['provider']}: {summary['answered']} of "
        f"{summary['items']} items answered, {summary['parse_failure_rate']:.1%} of the answers could not be read."
    )
    if conflicts := summary["kinds"].get("conflict", 0):
        note += f" In {conflicts} answers letter and text disagree: here the letter counts, in the reward both do."
    return f'<p class="soft">{escape(note)}</p>' + html_table(("task", "n", "accuracy", "95 % interval"), rows)


def html_response(line: dict[str, Any], is_open: bool) -> str:
    """Return one answer's scores and its text, the section tags set apart."""
    score = line["score"]
    parts = ", ".join(f"{METRIC_NAMES.get(key, key)} {value:.2f}" for key, value in score.items())
    verdict = '<span class="good">right</span>' if score.get("accuracy", 0) else '<span class="bad">wrong</span>'
    text = escape(line["response"])
    for tag in SECTIONS:
        for mark in (f"&lt;{tag}&gt;", f"&lt;/{tag}&gt;"):
            text = text.replace(mark, f'<span class="soft">{mark}</span>')
    note = "" if predicted_scene(line) else '<p class="soft">Its scene graph cannot be read.</p>'
    details = f"<details{' open' if is_open else ''}><summary>response</summary><pre>{text}</pre></details>"
    return f"<p>{verdict} <span class='soft'>{escape(parts)}</span></p>{note}{details}"


def html_rollout(rollout: Rollout, number: int) -> str:
    """Return the card of one question."""
    graph = reference_scene(rollout)
    relations = "; ".join(relation_text(relation) for relation in graph.relations) if graph else ""
    answer = parse_response(rollout.ground_truth).answer or rollout.ground_truth
    question, _, options = rollout.question.partition("\nOptions:\n")
    truth = f"reference: {answer}" + (f"; {relations}" if relations else "")
    sides = [(f"step {line['step']}", line) for line in (rollout.before, rollout.after) if line is not None]
    columns = "".join(
        f"<div><h3>{escape(title)}</h3>"
        f"{html_image(png_bytes(draw_rollout(rollout, line)), f'{title}: boxes predicted and true')}"
        f"{html_response(line, is_open=line is rollout.after)}</div>"
        for title, line in sides
    )
    return (
        f'<article class="card"><h3>{number}. {escape(question)}</h3>'
        f'<p>{escape(" · ".join(options.split(chr(10))))}</p><p class="soft">{escape(truth)}</p>'
        f'<div class="grid">{columns}</div></article>'
    )


def build_page(run: RunFiles, out_dir: Path) -> str:
    """Return the page; the pictures are written to `out_dir` on the way."""
    dark = {name: picture for name, _, picture in draw_charts(run, DARK)}
    cards = {}
    for name, description, picture in draw_charts(run, LIGHT):
        (out_dir / f"{name}.png").write_bytes(picture)
        cards[name] = f'<div class="card">{html_image(picture, description, dark[name])}</div>'
    changes = cards.pop("before_after")
    rollouts = choose_rollouts(run)
    captions = [f"{r.question.partition(chr(10))[0]}\n{parse_response(r.after['response']).answer}" for r in rollouts]
    sheet = draw_pictures([draw_rollout(r, r.after) for r in rollouts], captions)
    (out_dir / "rollouts.png").write_bytes(sheet)
    evaluations = "".join(html_evaluation(summary) for summary in run.evaluations)
    body = [
        html_headline(run),
        "<h2>Training</h2>",
        f'<div class="grid">{"".join(cards.values())}</div>',
        "<h2>Before and after</h2>",
        f'<div class="grid"><div>{html_comparison(run)}</div>{changes}</div>',
        f"<h2>Evaluation of the merged model</h2>{evaluations}" if evaluations else "",
        "<h2>Grounded answers</h2>",
        html_scene_key(),
        f'<div class="stack">{"".join(html_rollout(r, i) for i, r in enumerate(rollouts, 1))}</div>',
    ]
    return html_page(f"SpatialThinker: {run.name}", "\n".join(body))


def write_report(run_dir: Path, out_dir: Path) -> Path:
    """Write the page and its pictures; return the page's path."""
    run = read_run(run_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / "index.html"
    write_text(path, build_page(run, out_dir))
    return path


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 0, or 2 after one message about a missing or unreadable file."""
    parser = argparse.ArgumentParser(description="Draw a training run as one self-contained page.")
    parser.add_argument("--run_dir", type=Path, required=True, help="folder of the run")
    parser.add_argument("--out", type=Path, help="folder of the report (default: RUN_DIR/report)")
    args = parser.parse_args(argv)
    try:
        path = write_report(args.run_dir, args.out or args.run_dir / "report")
    except (FileNotFoundError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(f"report: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

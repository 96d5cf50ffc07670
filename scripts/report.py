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
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout's packages before installed ones

from toy.before_after import summarize_validation
from toy.charts import DARK, LIGHT, Series, draw_changes, draw_curves, draw_pictures

from spatialthinker.response import parse_response
from spatialthinker.scene_graph import SceneGraph, parse_scene
from spatialthinker.schema import read_parquet
from spatialthinker.storage.files import write_text
from spatialthinker.storage.images import load_image
from spatialthinker.visualize import Layout, image_uri, lay_out, question_of, render_page

TEMPLATE = Path(__file__).parent / "toy" / "report.html.jinja"
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
    images: dict[tuple[str, str], bytes]
    """Encoded image by (problem, ground truth)."""


@dataclass(frozen=True)
class Rollout:
    """One held-out question, the newest answer to it and, if it was logged, the one before training."""

    image: bytes
    question: str
    ground_truth: str
    lines: list[dict[str, Any]]
    """The answers as they were logged, the newest last."""

    @property
    def reference(self) -> SceneGraph | None:
        return parse_scene(parse_response(self.ground_truth).scene_text, is_reference=True)

    def lay_out(self, predicted: SceneGraph | None) -> Layout:
        """Return the reference's boxes and those of one answer."""
        return lay_out(load_image(self.image).size, predicted, self.reference)


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


def read_images(config_path: Path) -> dict[tuple[str, str], bytes]:
    """Return the validation images of the run that a configuration describes."""
    if not config_path.is_file():
        raise FileNotFoundError(f"{config_path} is missing; the trainer writes it (trainer.logger must hold file)")
    location, _, split = json.loads(config_path.read_text())["data"]["val_files"].partition("@")
    place = Path(location)
    files = sorted(place.glob(f"{split or 'train'}-*.parquet")) if place.is_dir() else [place]
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
    first_step, last_step = (pick(line["step"] for line in run.generations) for pick in (min, max))
    key_of = lambda line: (line["problem"], line["ground_truth"])  # noqa: E731
    earlier = {key_of(line): line for line in run.generations if line["step"] == first_step != last_step}
    newest = {key_of(line): line for line in run.generations if line["step"] == last_step}
    rollouts = [
        Rollout(run.images[key], question_of(key[0]), key[1], [*filter(None, [earlier.get(key)]), line])
        for key, line in newest.items()
        if key in run.images
    ]
    if not rollouts:
        raise ValueError(f"no generation of step {last_step} belongs to an image of the validation data")
    return rollouts[:NUM_ROLLOUTS]


def predicted_scene(line: dict[str, Any]) -> SceneGraph | None:
    return parse_scene(parse_response(line["response"]).scene_text)


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
    metrics = run.comparison["metrics"]
    changes = {name: metrics[key] for key, name in METRIC_NAMES.items() if key in metrics}
    title = "Held-out questions before and after"
    yield "before_after", title, draw_changes(theme, title, "mean with 95 % interval", changes)


def change_rows(run: RunFiles) -> list[tuple[str, ...]]:
    """Return the table of before and after; second lines hold intervals."""

    def cell(facts: dict[str, Any], name: str, sign: str = "") -> str:
        low, high = facts[f"{name}_interval"]
        return f"{facts[name]:{sign}.3f}\n{low:{sign}.3f} to {high:{sign}.3f}"

    found = [(name, run.comparison["metrics"].get(key)) for key, name in METRIC_NAMES.items()]
    return [(n, cell(m, "before"), cell(m, "after"), cell(m, "gain", "+")) for n, m in found if m is not None]


def evaluation_rows(summary: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Return one evaluation's accuracy per task."""
    return [
        (name, task["n"], f"{task['accuracy']:.3f}", f"{task['accuracy_low']:.3f} to {task['accuracy_high']:.3f}")
        for name, task in [*summary["tasks"].items(), ("all", summary)]
    ]


def describe_rollout(rollout: Rollout) -> dict[str, Any]:
    """Return what the page shows of a question."""
    answers = []
    for line in rollout.lines:
        scene = predicted_scene(line)
        answers.append(line | {"scene": scene, "layout": rollout.lay_out(scene)})
    return {
        "image": image_uri(rollout.image),
        "question": rollout.question,
        "reference": rollout.reference,
        "answer": parse_response(rollout.ground_truth).answer or rollout.ground_truth,
        "answers": answers,
    }


def build_page(run: RunFiles, out_dir: Path) -> str:
    """Return the page; the pictures are written to `out_dir` on the way."""
    dark = {name: picture for name, _, picture in draw_charts(run, DARK)}
    light = {name: (description, picture) for name, description, picture in draw_charts(run, LIGHT)}
    rollouts = choose_rollouts(run)
    captions = [f"{r.question.partition('\n')[0]}\n{parse_response(r.lines[-1]['response']).answer}" for r in rollouts]
    sheet = draw_pictures([(r.image, r.lay_out(predicted_scene(r.lines[-1]))) for r in rollouts], captions)
    for name, picture in [*((name, picture) for name, (_, picture) in light.items()), ("rollouts", sheet)]:
        (out_dir / f"{name}.png").write_bytes(picture)
    return render_page(
        TEMPLATE,
        title=f"SpatialThinker: {run.name}",
        run=run,
        names=METRIC_NAMES,
        steps=max(line["step"] for line in run.log if "val/reward_score" in line),
        charts={name: (*found, dark[name]) for name, found in light.items()},
        changes=change_rows(run),
        evaluation_rows=evaluation_rows,
        rollouts=map(describe_rollout, rollouts),
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 0, or 2 after one message about a missing or unreadable file."""
    parser = argparse.ArgumentParser(description="Draw a training run as one self-contained page.")
    parser.add_argument("--run_dir", type=Path, required=True, help="folder of the run")
    parser.add_argument("--out", type=Path, help="folder of the report (default: RUN_DIR/report)")
    args = parser.parse_args(argv)
    try:
        run, out_dir = read_run(args.run_dir), args.out or args.run_dir / "report"
        out_dir.mkdir(parents=True, exist_ok=True)
        write_text(out_dir / "index.html", build_page(run, out_dir))
    except (FileNotFoundError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(f"report: {out_dir / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

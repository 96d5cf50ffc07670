"""Validation before and after training, scene by scene, with 95 % intervals.

Letters: V held-out samples.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

METRICS = ("overall", "accuracy", "spatial_score", "format", "count")
RESAMPLES = 10_000
PERCENTILES = (2.5, 97.5)


def read_validation(path: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """Returns the problem texts and each metric's scores [V] of one validation_step_N.jsonl."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    if not rows:
        raise ValueError(f"{path} holds no validation records")
    names = [name for name in METRICS if name in rows[0]["score"]]
    scores = {name: np.array([row["score"][name] for row in rows], dtype=np.float64) for name in names}
    return [row["problem"] for row in rows], scores


def find_validations(folder: Path) -> tuple[Path, Path]:
    """Returns the files of step 0 and of the last validated step."""
    steps = [(path.stem.removeprefix("validation_step_"), path) for path in folder.glob("validation_step_*.jsonl")]
    found = {int(step): path for step, path in steps if step.isdecimal()}
    if 0 not in found or len(found) < 2:
        raise ValueError(
            f"{folder} holds validations of steps {sorted(found)}; before and after need step 0 "
            "(trainer.val_before_train=true) and a later one (trainer.val_freq)"
        )
    return found[0], found[max(found)]


def bootstrap_interval(values: np.ndarray) -> list[float]:
    """Returns the 95 % percentile interval of the mean of `values` [V], resampling samples with replacement.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.3. Of differences of the same
    scenes it is the paired interval.
    """
    choices = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))  # [RESAMPLES, V]
    return [round(float(bound), 4) for bound in np.percentile(values[choices].mean(axis=1), PERCENTILES)]


def compare_metric(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """Returns means, gain and intervals of one metric's paired scores [V]."""
    facts: dict[str, Any] = {}
    for name, values in (("before", before), ("after", after), ("gain", after - before)):
        facts |= {name: round(float(values.mean()), 4), f"{name}_interval": bootstrap_interval(values)}
    return facts


def summarize_validation(folder: Path) -> dict[str, Any]:
    """Returns reward and accuracy before and after, with intervals, from the trainer's validation files in `folder`.

    Raises ValueError when one of the two is missing or when they are not of the same questions in the same order.
    """
    before_path, after_path = find_validations(folder)
    before_problems, before = read_validation(before_path)
    after_problems, after = read_validation(after_path)
    if before_problems != after_problems:
        raise ValueError(f"{before_path.name} and {after_path.name} in {folder} are not of the same questions")
    metrics = {name: compare_metric(before[name], after[name]) for name in before}
    return {
        "reward_before": metrics["overall"]["before"],
        "reward_after": metrics["overall"]["after"],
        "accuracy_before": metrics["accuracy"]["before"],
        "accuracy_after": metrics["accuracy"]["after"],
        "held_out_samples": len(before_problems),
        "metrics": metrics,
    }


def format_table(summary: dict[str, Any]) -> str:
    """Returns the summary as lines for the terminal."""

    def cell(row: dict[str, Any], name: str, sign: str = "") -> str:
        low, high = row[f"{name}_interval"]
        return f"{row[name]:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"

    lines = [f"{summary['held_out_samples']} held-out questions, mean [95 % interval]"]
    lines.append(f"{'':15}{'before':>24}{'after':>24}{'gain':>26}")
    for name, row in summary["metrics"].items():
        lines.append(f"{name:15}{cell(row, 'before'):>24}{cell(row, 'after'):>24}{cell(row, 'gain', '+'):>26}")
    memory = f"peak memory {summary['peak_memory_gb']:.2f} GiB (sum of PSS)"
    lines += ["", f"{summary['steps']} steps, {summary['seconds']:.0f} s in all, {memory}"]
    lines += [f"{name.replace('_', ' ')}: {summary[name]}" for name in ("checkpoint", "merged_model", "report")]
    return "\n".join(lines)

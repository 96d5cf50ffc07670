"""Answers to the page: objects that become JSON."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from spatialthinker.response import parse_response
from spatialthinker.visualize import question_of, split_sections
from verl.viewer.columns import HEAVY, PART
from verl.viewer.filters import GOOD_IOU, ODD, check_query, select
from verl.viewer.run import Run, Snapshot
from verl.viewer.scenes import Scenes, compare_scenes, explain_failure, read_scenes
from verl.viewer.tokens import read_tokens

MAX_POINTS = 800
"""Points of one curve; of more every k-th is sent."""
MAX_GROUPS = 50
MAX_SAMPLES = 64
"""Samples of one group that are sent."""
GROUP_TEXT_CHARACTERS = 2000
GRID_COLUMNS = ("images", "problem", "ground_truth", "answer", "boxes")
FIGURES = (
    *("score", "advantage", "response_tokens", "prompt_tokens", "log_prob_mean", "ratio_mean", "kl_mean"),
    *("entropy_mean", "iou_mean", "spread"),
)
SORTS = {"newest", "oldest", "score", "advantage", "response_tokens", "iou_mean", "spread", "kl_mean", "entropy_mean"}


def describe_run(run: Run) -> dict[str, Any]:
    """Return the run's name, steps, and the values that its filters take."""
    snapshot = run.snapshot
    return {
        "name": run.name,
        "folder": str(run.folder),
        "revision": run.revision,
        "rollouts": len(snapshot),
        "steps": _describe_steps(snapshot),
        "parts": snapshot.parts,
        "numbers": [name for name in FIGURES if len(snapshot) and not np.isnan(snapshot.numbers[name]).all()],
        "values": {name: sorted(snapshot.values.get(name, []))[:200] for name in ("source", "category", "failure")}
        | {"stop": sorted(snapshot.values.get("stop_reason", []))},
        "odd": list(ODD),
        "good_iou": GOOD_IOU,
        "reward": str(run.about.get("reward", "")),
        "rule": str(run.about.get("rule", "")),
        "problems": run.problems,
        "last_step": run.log.objects[-1].get("step") if run.log.objects else None,
    }


def _describe_steps(snapshot: Snapshot) -> list[dict[str, Any]]:
    steps = []
    for index, file in enumerate(snapshot.files):
        start, end = np.searchsorted(snapshot.file, [index, index + 1])
        if start < end:
            score = snapshot.numbers["score"][start:end]
            mean = None if np.isnan(score).all() else float(np.nanmean(score))
            groups = int(snapshot.group[end - 1] - snapshot.group[start] + 1)
            steps.append(
                {"kind": file.kind, "step": file.step, "rollouts": int(end - start), "groups": groups, "score": mean}
            )
    return steps


def read_metrics(run: Run) -> dict[str, list[list[float]]]:
    """Return each metric of the log as pairs of step and value; what is no finite number is left out."""
    series: dict[str, list[list[float]]] = {}
    for line in run.log.objects:
        step = line.get("step")
        if not isinstance(step, int):
            continue
        for name, value in line.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if name != "step" and is_number and math.isfinite(value):
                series.setdefault(name, []).append([step, value])
    return {name: _thinned(points) for name, points in series.items()}


def _thinned(points: list[list[float]]) -> list[list[float]]:
    stride = -(-len(points) // MAX_POINTS)
    return points if stride <= 1 else [*points[:-1:stride], points[-1]]


def read_checks(run: Run) -> list[dict[str, Any]]:
    """Return the newest checks that fired, each once with its first and last step and how often."""
    found: dict[str, dict[str, Any]] = {}
    for line in run.checks.objects:
        name, step = str(line.get("check", "")), line.get("step")
        if not isinstance(step, int):
            continue
        entry = found.setdefault(name, {"check": name, "first": step, "steps": 0})
        entry |= {key: line.get(key) for key in ("value", "threshold")} | {"message": str(line.get("message", ""))}
        entry |= {"last": step, "steps": entry["steps"] + 1}
    return sorted(found.values(), key=lambda entry: -entry["last"])


def find_groups(run: Run, query: Mapping[str, str], sort: str, offset: int, limit: int) -> dict[str, Any]:
    """Return a page of the groups that hold a rollout which passes the filters.

    Raises ValueError for an unknown filter or order.
    """
    snapshot = run.snapshot
    mask = select(run, snapshot, query)
    groups = sort_groups(snapshot, mask, sort)
    page = groups[offset : offset + min(limit, MAX_GROUPS)]
    return {
        "rollouts": int(mask.sum()),
        "total": len(groups),
        "offset": offset,
        "groups": [describe_group(run, snapshot, int(group), mask) for group in page],
    }


def sort_groups(snapshot: Snapshot, mask: np.ndarray, sort: str) -> np.ndarray:
    """Return the groups of these rollouts in this order: a leading "-" puts the highest first."""
    name = sort.removeprefix("-")
    if name not in SORTS and name.removeprefix(PART) not in snapshot.parts:
        raise ValueError(f"unknown order {sort!r}; known: {', '.join(sorted(SORTS))}, a part, each with - in front")
    groups, first = np.unique(snapshot.group[mask], return_index=True)
    if name in ("newest", "oldest") or not len(groups):
        steps = snapshot.numbers["step"][mask][first] if len(groups) else groups
        return groups[np.argsort(-steps, kind="stable")] if name == "newest" else groups
    values = snapshot.numbers[name]
    is_highest_first = sort.startswith("-")
    values = np.where(mask & ~np.isnan(values), -values if is_highest_first else values, np.inf)
    best = np.minimum.reduceat(values, snapshot.starts)[groups]
    return groups[np.argsort(best, kind="stable")]


def describe_group(run: Run, snapshot: Snapshot, group: int, mask: np.ndarray | None = None) -> dict[str, Any]:
    """Return a group with its samples; `mask` says which of them pass the filters."""
    members = snapshot.members(group)
    shown = members[:MAX_SAMPLES]
    table = _read(run, snapshot, shown, GRID_COLUMNS)
    first = shown[0]
    rows = [_row(table, snapshot, rollout) for rollout in shown]
    row = rows[0]
    images = row["images"] or []
    size = run.pictures.size(images[0]) if images else None
    problem, truth = row["problem"] or "", row["ground_truth"] or ""
    samples = []
    for rollout, row in zip(shown, rows, strict=True):
        scenes = read_scenes(row["boxes"])
        layout = scenes.lay_out(size, with_labels=False)
        answer = (row["answer"] or "")[:200]
        sample = describe_light(snapshot, rollout) | {"answer": answer, "layout": layout and asdict(layout)}
        samples.append(sample | {"passes": mask is None or bool(mask[rollout])})
    return {
        "kind": snapshot.text("kind", first),
        "step": int(snapshot.numbers["step"][first]),
        "group": _whole(snapshot.numbers["group"][first]),
        "uid": snapshot.text("uid", first),
        "source": snapshot.text("source", first),
        "category": snapshot.text("category", first),
        "kept": snapshot.text("kept", first),
        "spread": _finite(snapshot.numbers["spread"][first]),
        "question": question_of(problem)[:GROUP_TEXT_CHARACTERS],
        "truth": _short_truth(truth)[:GROUP_TEXT_CHARACTERS],
        "images": images,
        "size": size,
        "left_out": len(members) - len(shown),
        "samples": samples,
    }


def describe_light(snapshot: Snapshot, rollout: int) -> dict[str, Any]:
    """Return the light columns of a rollout; None for a number that is missing or not finite."""
    numbers = snapshot.numbers
    right = _finite(numbers["right"][rollout])
    return {
        "kind": snapshot.text("kind", rollout),
        "step": _whole(numbers["step"][rollout]),
        "group": _whole(numbers["group"][rollout]),
        "sample": _whole(numbers["sample"][rollout]),
        "right": None if right is None else right == 1,
        "failure": snapshot.text("failure", rollout),
        "stop": snapshot.text("stop_reason", rollout),
        "parts": {name: _finite(numbers[PART + name][rollout]) for name in snapshot.parts},
    } | {name: _finite(numbers[name][rollout]) for name in FIGURES}


def find_rollout(snapshot: Snapshot, kind: str, step: int, group: int, sample: int) -> int:
    """Return the index of a rollout. Errors: KeyError where there is none."""
    mask = np.ones(len(snapshot), dtype=bool)
    for name, value in (("step", step), ("group", group), ("sample", sample)):
        mask &= snapshot.numbers[name] == value if len(snapshot) else False
    for rollout in np.flatnonzero(mask):
        if snapshot.text("kind", rollout) == kind:
            return int(rollout)
    raise KeyError(f"there is no sample {sample} of group {group} in {kind} step {step}")


def show_rollout(run: Run, kind: str, step: int, group: int, sample: int) -> dict[str, Any]:
    """Return everything about one rollout. Errors: KeyError where there is none."""
    snapshot = run.snapshot
    rollout = find_rollout(snapshot, kind, step, group, sample)
    row = _row(_read(run, snapshot, [rollout], tuple(HEAVY)), snapshot, rollout)
    problem, truth, response = (row[name] or "" for name in ("problem", "ground_truth", "response"))
    images = row["images"] or []
    size = run.pictures.size(images[0]) if images else None
    scenes = read_scenes(row["boxes"]) if row["boxes"] else compare_scenes(response, truth, problem)
    layout = scenes.lay_out(size, with_labels=True)
    samples = snapshot.members(int(snapshot.group[rollout]))
    return describe_light(snapshot, rollout) | {
        "uid": snapshot.text("uid", rollout),
        "source": snapshot.text("source", rollout),
        "category": snapshot.text("category", rollout),
        "kept": snapshot.text("kept", rollout),
        "samples": [_whole(snapshot.numbers["sample"][member]) for member in samples],
        "question": question_of(problem),
        "problem": problem,
        "truth": truth,
        "sections": split_sections(response),
        "is_cut": bool(row["response_cut"]),
        "answer": row["answer"],
        "why": explain_failure(snapshot.text("failure", rollout), response),
        "images": images,
        "layout": layout and asdict(layout),
        "pairs": scenes.pairs(),
        "relations": scenes.relations(),
        "reference_relations": [text for text, _ in Scenes(scenes.reference).relations()],
        "tokens": read_tokens(run.folder, row),
    }


def show_prompt(run: Run, uid: str, kind: str | None) -> dict[str, Any]:
    """Return the groups of one prompt over the steps, the oldest first. Errors: KeyError where there are none."""
    query = {"uid": uid} | ({"kind": kind} if kind else {})
    snapshot = run.snapshot
    mask = select(run, snapshot, query)
    groups = np.unique(snapshot.group[mask])
    if not len(groups):
        raise KeyError(f"the run has no rollout of the prompt {uid[:200]!r}")
    shown = groups if len(groups) <= MAX_GROUPS else groups[np.linspace(0, len(groups) - 1, MAX_GROUPS).astype(int)]
    found = [describe_group(run, snapshot, int(group)) for group in shown]
    return {"uid": uid, "total": len(groups), "groups": found}


def compare_runs(runs: Sequence[Run], query: Mapping[str, str], offset: int, limit: int) -> dict[str, Any]:
    """Return the prompts that both runs have, each with the newest group of either that the filters leave.

    The filters choose prompts by the first run's rollouts; kind and steps hold for both.
    """
    check_query(query)
    common = {name: value for name, value in query.items() if name in ("kind", "step", "from", "to")}
    first, second = runs
    snapshots = [run.snapshot for run in runs]
    newest = [
        _newest_groups(snapshots[0], select(first, snapshots[0], query)),
        _newest_groups(snapshots[1], select(second, snapshots[1], common)),
    ]
    shared = [uid for uid in newest[0] if uid in newest[1]]
    pairs = [
        [
            describe_group(run, snapshot, groups[uid])
            for run, snapshot, groups in zip(runs, snapshots, newest, strict=True)
        ]
        for uid in shared[offset : offset + min(limit, MAX_GROUPS)]
    ]
    return {"total": len(shared), "offset": offset, "prompts": [len(groups) for groups in newest], "pairs": pairs}


def _newest_groups(snapshot: Snapshot, mask: np.ndarray) -> dict[str, int]:
    """Return the last group of each prompt, the newest prompt first."""
    found = {}
    for group in sort_groups(snapshot, mask, "newest"):
        uid = snapshot.text("uid", int(snapshot.starts[group]))
        if uid is not None:
            found.setdefault(uid, int(group))
    return found


def _read(run: Run, snapshot: Snapshot, rollouts: Sequence[int], names: tuple[str, ...]) -> pa.Table:
    """Return columns of the file of these rollouts; nulls where it cannot be read any more."""
    file = snapshot.files[snapshot.file[rollouts[0]]]
    try:
        return run.reader.read(file, names)
    except (OSError, ValueError, pa.ArrowException):  # written anew or removed in this moment
        return pa.table({name: pa.nulls(0, HEAVY[name]) for name in names})


def _row(table: pa.Table, snapshot: Snapshot, rollout: int) -> dict[str, Any]:
    row = int(snapshot.row[rollout])
    found = table.slice(row, 1).to_pylist()
    return found[0] if found else dict.fromkeys(table.column_names)


def _short_truth(truth: str) -> str:
    """Return the ground truth's answer, or all of it where it has none of its own."""
    return parse_response(truth).answer or truth.strip()


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def _whole(value: Any) -> int | None:
    return int(value) if math.isfinite(value) else None

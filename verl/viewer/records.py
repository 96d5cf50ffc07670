"""Validation records of a run that recorded no rollouts, as rows of the same columns."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from spatialthinker.response import parse_response
from spatialthinker.rewards.spatial_sgg import format_failure
from verl.viewer.columns import PART, type_of

MAX_FILE_BYTES = 2**28
FindImage = Callable[[str, str], str | None]
"""From problem and ground truth to the id of an image."""


def read_records(path: Path, step: int, find_image: FindImage) -> tuple[pa.Table, list[str]]:
    """Return the rows of a step and what was left out.

    `path` is validation_step_N.jsonl, or generations.jsonl, of whose lines those of this step are taken.
    Raises ValueError for a file that is too large, OSError where it cannot be read.
    """
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path.name} is larger than {MAX_FILE_BYTES} bytes")
    rows, problems, groups = [], [], {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if record.get("step", step) != step:
                continue
            rows.append(_row(record, step, groups, find_image))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            problems.append(f"line {number} of {path.name} is left out: {error}")
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: pa.array([row.get(name) for row in rows], type_of(name)) for name in names}
    return pa.table(columns), problems[:20]


def list_steps(path: Path) -> list[int]:
    """Return the steps that lines of generations.jsonl are of."""
    steps = set()
    for line in path.read_bytes().split(b"\n") if path.stat().st_size <= MAX_FILE_BYTES else ():
        try:
            step = json.loads(line).get("step")
        except (ValueError, AttributeError, RecursionError):
            continue
        if isinstance(step, int):
            steps.add(step)
    return sorted(steps)


def _row(record: Mapping[str, Any], step: int, groups: dict[str, int], find_image: FindImage) -> dict[str, Any]:
    problem, truth, response = (_text(record.get(name)) for name in ("problem", "ground_truth", "response"))
    scores = record.get("score")
    scores = scores if isinstance(scores, dict) else {"overall": scores}
    parts = {f"{PART}{_text(name)}": _number(value) for name, value in scores.items() if name != "overall"}
    uid = _text(record.get("uid") or hashlib.sha256(problem.encode()).hexdigest()[:16])  # it stands in addresses
    accuracy = parts.get(f"{PART}accuracy")
    image = find_image(problem, truth)
    length = record.get("response_length")
    sections = parse_response(response)
    return parts | {
        "step": float(step),
        "kind": "val",
        "group": float(groups.setdefault(uid, len(groups))),
        "sample": float(record.get("sample") or 0),
        "uid": uid,
        "images": [image] if image else [],
        "problem": problem,
        "ground_truth": truth,
        "response": response,
        "response_cut": False,
        "response_tokens": _number(length),
        "score": _number(scores.get("overall")),
        "failure": format_failure(response) if parts.get(f"{PART}format") == 0 else None,
        "answer": sections.answer,
        "right": None if accuracy is None else float(accuracy >= 0.5),
    }


def _text(value: Any) -> str:
    """Return the value as text that UTF-8 can hold: half a surrogate pair becomes its escape."""
    return ("" if value is None else str(value)).encode("utf-8", "backslashreplace").decode()


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None

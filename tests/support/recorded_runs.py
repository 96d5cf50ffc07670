"""Folders of runs as a training leaves them: with recorded rollouts, or of the form without."""

import hashlib
import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spatialthinker.response import parse_response
from spatialthinker.rewards import REWARDS, RewardInput, format_failure
from spatialthinker.schema import VqaRow, parquet_path, write_parquet
from spatialthinker.synthetic import generate, gold_response
from verl.viewer.scenes import Scenes, compare_scenes

PARTS = ("format", "count", "accuracy", "spatial_score")
CUT_SHORT = "<observe>\nI see a shape and"
Edit = Callable[[dict[str, Any]], None]


def make_rows(number: int, seed: int = 4) -> list[VqaRow]:
    return [row for _, row in generate(number, seed)]


def answer_with_error(row: VqaRow, error_px: float, is_right: bool, rng: random.Random) -> str:
    """A reply whose boxes are off by some pixels, with the right answer or another one."""

    def shift(match: re.Match[str]) -> str:
        numbers = [max(0, round(float(n) + rng.uniform(-error_px, error_px))) for n in match[1].split(",")]
        return f'"bbox": [{", ".join(map(str, numbers))}]'

    text = re.sub(r'"bbox": \[([^\]]*)\]', shift, gold_response(row))
    wrong = "(B) something else" if row.answer_only != "B" else "(A) something else"
    return text if is_right else text.replace(row.answer_option_text_only, wrong)


def make_group(row: VqaRow, step: int, group: int, num_samples: int, skill: float, rng: random.Random) -> list[dict]:
    """The recorded rows of one prompt; `skill` from 0 to 1 makes right answers and tight boxes more likely."""
    texts = [
        answer_with_error(row, 20 * (1 - skill), rng.random() < 0.2 + 0.7 * skill, rng) for _ in range(num_samples)
    ]
    if rng.random() < 0.5 * (1 - skill):
        texts[0] = CUT_SHORT
    scores = REWARDS["spatial_sgg"]([RewardInput(text, row.answer_option_text, row.problem) for text in texts])
    overall = [score["overall"] for score in scores]
    mean = sum(overall) / len(overall)
    spread = (sum((value - mean) ** 2 for value in overall) / len(overall)) ** 0.5
    found = []
    for sample, (text, score) in enumerate(zip(texts, scores, strict=True)):
        scenes = compare_scenes(text, row.answer_option_text, row.problem)
        overlaps = [match["iou"] for match in scenes.matches]
        tokens = max(len(text) // 4, 1)
        found.append(
            {
                "step": step,
                "kind": "train",
                "group": group,
                "sample": sample,
                "uid": row.image_id,
                "source": "shapes",
                "category": row.category,
                "images": [hashlib.sha256(row.images).hexdigest()],
                "problem": row.problem,
                "ground_truth": row.answer_option_text,
                "response": text,
                "response_cut": False,
                "response_tokens": tokens,
                "prompt_tokens": len(row.problem) // 4,
                "stop_reason": "length" if text == CUT_SHORT else "stop",
                "score": score["overall"],
                **{f"part:{name}": score[name] for name in PARTS},
                "advantage": (score["overall"] - mean) / spread if spread > 1e-9 else 0.0,
                "log_prob_mean": -rng.random() / 2,
                "ratio_mean": 1 + rng.uniform(-0.02, 0.02),
                "kl_mean": rng.random() / 100,
                "entropy_mean": 0.4 + rng.random() / 10,
                "kept": "all",
                "failure": format_failure(text),
                "answer": parse_response(text).answer,
                "right": score["accuracy"] == 1.0,
                "boxes": json.dumps(record_of(scenes)),
                "iou_mean": sum(overlaps) / len(overlaps) if overlaps else None,
            }
        )
    return found


def record_of(scenes: Scenes) -> dict[str, Any]:
    """The column `boxes` of these scenes."""
    record: dict[str, Any] = {"matches": scenes.matches, "size": scenes.size}
    for name, graph in (("predicted", scenes.predicted), ("reference", scenes.reference)):
        record[name] = graph and [{"id": item.id, "box": list(item.bbox)} for item in graph.objects]
        triples = [[r.subject, r.predicate, r.object] for r in graph.relations] if graph else []
        record["relations" if name == "predicted" else "reference_relations"] = triples
    return record


def write_step(folder: Path, rows: Sequence[dict[str, Any]], name: str = "") -> Path:
    """Write the file of one step, whole."""
    path = folder / "rollouts" / (name or f"{rows[0]['kind']}_step_{rows[0]['step']:06d}.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    names = dict.fromkeys(column for row in rows for column in row)
    table = pa.table({column: [row.get(column) for row in rows] for column in names})
    for column, kind in (("step", pa.int32()), ("group", pa.int32()), ("sample", pa.int32())):
        table = table.set_column(table.column_names.index(column), column, table[column].cast(kind))
    partial = path.with_suffix(".tmp")
    pq.write_table(table, partial, compression="zstd")
    partial.rename(path)
    return path


def write_images(folder: Path, rows: Sequence[VqaRow]) -> None:
    for row in rows:
        write_image(folder, row.images)


def write_image(folder: Path, data: bytes) -> str:
    """Write an image of the run; return its id."""
    name = hashlib.sha256(data).hexdigest()
    path = folder / "rollouts" / "images" / name[:2] / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return name


def write_log(folder: Path, steps: Sequence[int], **more: Any) -> None:
    """Append these steps to experiment_log.jsonl."""
    with (folder / "experiment_log.jsonl").open("a") as file:
        for step in steps:
            values = {f"reward/{name}": 0.2 + step / 100 for name in ("overall", *PARTS)}
            values |= {"response_length/mean": 150 - step, "actor/kl_loss": step / 1000, "checks/no_variance": 0.1}
            values |= {"val/reward_score": 0.3 + step / 100} if step % 2 == 0 else {}
            file.write(json.dumps({"step": step} | values | more) + "\n")


def write_recorded_run(
    folder: Path,
    steps: Sequence[int] = (1, 2, 3),
    num_groups: int = 4,
    num_samples: int = 4,
    seed: int = 0,
    edit: Edit | None = None,
) -> Path:
    """A run with recorded rollouts of toy scenes; `edit` may change each recorded row. Returns the folder."""
    rng = random.Random(seed)
    rows = make_rows(num_groups)
    folder.mkdir(parents=True, exist_ok=True)
    write_images(folder, rows)
    about = {"version": 1, "reward": "spatial_sgg", "rule": "all", "parts": list(PARTS)}
    (folder / "rollouts" / "about.json").write_text(json.dumps(about))
    (folder / "experiment_config.json").write_text("{}")
    for step in steps:
        skill = min(0.15 + 0.25 * step, 0.95)
        found = [one for i, row in enumerate(rows) for one in make_group(row, step, i, num_samples, skill, rng)]
        for one in found if edit else ():
            edit(one)
        write_step(folder, found)
    write_log(folder, steps)
    fired = {"step": steps[-1], "check": "no_variance", "value": 0.6, "threshold": 0.5}
    line = json.dumps(fired | {"message": "6 of 10 groups have no variance: the prompts are too easy or too hard."})
    (folder / "rollouts" / "checks.jsonl").write_text(line + "\n")
    return folder


def write_old_run(folder: Path, num_rows: int = 6) -> Path:
    """A run without recorded rollouts: logs, validation records and the data that its configuration names."""
    rng = random.Random(0)
    rows = make_rows(num_rows)
    write_parquet(rows, parquet_path(folder / "data", "val"))
    (folder / "experiment_config.json").write_text(json.dumps({"data": {"val_files": f"{folder / 'data'}@val"}}))
    for step, skill in ((0, 0.2), (4, 0.9)):
        texts = [answer_with_error(row, 20 * (1 - skill), rng.random() < skill, rng) for row in rows]
        texts[0] = CUT_SHORT if step == 0 else texts[0]
        inputs = [
            RewardInput(text, row.answer_option_text, row.problem) for text, row in zip(texts, rows, strict=True)
        ]
        records = [
            {"uid": row.image_id, "problem": row.problem, "ground_truth": row.answer_option_text}
            | {"sample": 0, "response": text, "response_length": len(text) // 4, "score": score}
            for row, text, score in zip(rows, texts, REWARDS["spatial_sgg"](inputs), strict=True)
        ]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"validation_step_{step}.jsonl").write_text(lines)
        with (folder / "generations.jsonl").open("a") as file:
            file.writelines(json.dumps({"step": step} | record) + "\n" for record in records[:2])
    write_log(folder, range(5))
    return folder

"""Rows of the mixed toy run: scenes, widths in pixels, points, and counts of drawn pictures with their annotations.

Each kind is a data set of its own, with a validation split, and has a column `reply`: what a teacher in a hurry would
write. It sees the scene right and answers at random in HASTY of the rows, so that the answer has something to learn.
Its words are those of the toy model's own training: the warm-up trains no embeddings.
"""

import json
import math
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from spatialthinker.prompts import render_prompt
from spatialthinker.schema import VqaRow
from spatialthinker.shapes import DEFAULT_CANVAS, Canvas, Shape, draw, encode_png
from spatialthinker.storage.files import whole_file
from spatialthinker.synthetic import PLACES, Puzzle, generate

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("scenes", "numbers", "points", "counts")
SPLITS = {"train": 512, "val": 64}
"""Rows of a source in each split."""
WARM_UP_ROWS = 128
"""Rows of a source that the warm-up sees."""
HASTY = 0.6
COUNTED_CANVAS = Canvas(224, 224)  # as small as data_gen takes pictures


def write_sources(folder: Path, seed: int = 0) -> None:
    """Writes the train and val splits of every source as folder/SOURCE/SPLIT.parquet."""
    for split, number in SPLITS.items():
        puzzles = list(generate(number, seed, f"mixed-{split}"))
        rng = random.Random(f"mixed {seed} {split}")
        write_rows(folder / "scenes" / f"{split}.parquet", [_scene_row(row, rng) for _, row in puzzles])
        for source, make in (("numbers", _width_row), ("points", _point_row)):
            write_rows(folder / source / f"{split}.parquet", [make(puzzle, rng) for puzzle, _ in puzzles])
        write_rows(folder / "counts" / f"{split}.parquet", list(_count_rows(folder / "drawn" / split, number, rng)))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows to a parquet file, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        pq.write_table(pa.Table.from_pylist(rows), partial)


def _row(image: bytes, problem: str, answer: str, reward: str, reply: str) -> dict[str, Any]:
    return {"images": {"bytes": image}, "problem": problem, "answer": answer, "reward": reward, "reply": reply}


def _scene_row(row: VqaRow, rng: random.Random) -> dict[str, Any]:
    from toy.rows import careless_reply  # it imports torch

    return _row(row.images, row.problem, row.answer_option_text, "spatial_sgg", careless_reply(row, rng))


def _shape_row(
    puzzle: Puzzle, rng: random.Random, question: str, reward: str, tell: Callable[[Shape], tuple[str, str, str]]
) -> dict[str, Any]:
    """A row on one shape; `tell` gives its true answer, a thought, and the answer of the teacher."""
    shape = puzzle.shapes[-1]  # on top: nothing hides it
    truth, thought, answer = tell(shape)
    label = shape.name.replace(" ", "_")
    scene = {"objects": [{"id": f"{label}.1", "bbox": list(shape.box)}], "relationships": []}
    problem = render_prompt(
        "spatial_thinker_full", question.format(shape.name), DEFAULT_CANVAS.width, DEFAULT_CANVAS.height
    )
    reply = _reply(f"I see a {shape.name}.", scene, thought, answer)
    return _row(encode_png(draw(DEFAULT_CANVAS, puzzle.shapes)), problem, truth, reward, reply)


def _width_row(puzzle: Puzzle, rng: random.Random) -> dict[str, Any]:
    def tell(shape: Shape) -> tuple[str, str, str]:
        said = rng.choice(DEFAULT_CANVAS.sizes) if rng.random() < HASTY else shape.size
        return str(shape.size), f"The {shape.name} is {shape.size}.", str(said)

    return _shape_row(puzzle, rng, "How many pixels wide is the {}?", "numbers", tell)


def _point_row(puzzle: Puzzle, rng: random.Random) -> dict[str, Any]:
    def tell(shape: Shape) -> tuple[str, str, str]:
        x, y = (round(value) for value in shape.centre)
        spread = shape.size if rng.random() < HASTY else 0
        x, y = (min(max(value + rng.randint(-spread, spread), 0), DEFAULT_CANVAS.width) for value in (x, y))
        place = min(
            PLACES, key=lambda name: math.dist(shape.centre, [DEFAULT_CANVAS.width * at for at in PLACES[name]])
        )
        return str(list(shape.box)), f"The {shape.name} is at the {place}.", f"({x}, {y})"

    return _shape_row(puzzle, rng, "Point at the {}.", "points", tell)


def _count_rows(folder: Path, number: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Rows that data generation makes of pictures with COCO's annotations, and nothing else."""
    import pyarrow.parquet as pq

    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    images, annotations, kinds = [], [], {}
    # More than are needed: near-duplicates are left out.
    for index, (puzzle, _) in enumerate(generate(number * 2, 0, f"counted-{folder.name}", COUNTED_CANVAS, ("count",))):
        (pictures / f"{index:04d}.png").write_bytes(encode_png(draw(COUNTED_CANVAS, puzzle.shapes)))
        images.append({"id": index, "file_name": f"{index:04d}.png"})
        for shape in puzzle.shapes:
            box = [shape.x, shape.y, shape.size, shape.size]
            category = kinds.setdefault(shape.kind, len(kinds))
            annotations.append({"image_id": index, "category_id": category, "bbox": box})
    categories = [{"id": index, "name": kind} for kind, index in kinds.items()]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "coco.json").write_text(json.dumps(coco))
    out = folder / "rows.csv"
    command = [sys.executable, str(ROOT / "data_gen" / "generate_data.py"), "preprocess_data", "--provider=selfsup"]
    command += [f"--source={pictures}", f"--out={out}", "--overwrite", f"--annotations={folder / 'coco.json'}"]
    subprocess.run([*command, "--tasks=count", "--rows_per_image=1", "--processes=1"], check=True)
    rows = [row for path in sorted((folder / "rows").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    for row in rows[:number]:
        count = row["answer_only"]
        said = rng.randint(1, 3) if rng.random() < HASTY else count
        reply = f"<think>\nThe count is {count}.\n</think>\n<answer>\n{said}\n</answer>"
        yield _row(row["images"]["bytes"], row["problem"], count, row["reward"], reply)


def _reply(observed: str, scene: dict[str, Any], thought: str, answer: str) -> str:
    parts = {"observe": observed, "scene": json.dumps(scene), "think": thought, "answer": answer}
    return "\n".join(f"<{tag}>\n{content}\n</{tag}>" for tag, content in parts.items())


def write_warm_up(folder: Path) -> Path:
    """Writes WARM_UP_ROWS training rows of each source to one file, prompts and replies alone; returns its path."""
    import pyarrow.parquet as pq

    rows = [
        row for name in SOURCES for row in pq.read_table(folder / name / "train.parquet").to_pylist()[:WARM_UP_ROWS]
    ]
    kept = ("images", "problem", "reply")
    write_rows(path := folder / "warm_up.parquet", [{key: row[key] for key in kept} for row in rows])
    return path

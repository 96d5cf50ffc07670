"""Rows in the exact columns of every benchmark, two each, written out by hand from the data sets' own pages."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import datasets
from PIL import Image


def png(size: tuple[int, int] = (40, 30), color: str = "red", **options: Any) -> bytes:
    """A small picture."""
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG", **options)
    return buffer.getvalue()


PICTURE = {"bytes": png(), "path": None}
LISTED = "Which animal is it?\n(A) dog\n(B) cat"


def _lettered(**more: Any) -> list[dict[str, Any]]:
    """Prompt with its options, a list of choices, the letter in parentheses or bare."""
    row = {"idx": 0, "image": PICTURE, "prompt": LISTED, "choices": ["dog", "cat"], "answer": "(A)"}
    return [row | more, row | more | {"idx": 1, "answer": "(B)"}]


def _cv_bench(*tasks: str) -> list[dict[str, Any]]:
    more = {"type": "2D", "filename": "a.png", "source": "COCO", "source_dataset": "x", "source_filename": "y"}
    first, second = _lettered(question="Which animal is it?", **more)
    return [first | {"task": tasks[0]}, second | {"task": tasks[-1]}]


def _blink(num_images: int = 1) -> list[dict[str, Any]]:
    images = {f"image_{i + 1}": PICTURE if i < num_images else None for i in range(4)}
    rows = _lettered(**images, sub_task="s", question="Which animal is it?", explanation="", answer="(A)")
    return [{key: value for key, value in row.items() if key not in ("image",)} for row in rows]


def _emma() -> list[dict[str, Any]]:
    images = {"image_1": PICTURE, "image_2": PICTURE} | {f"image_{i}": None for i in (3, 4, 5)}
    row = {
        "pid": "1",
        "question": "Which <image_1>?",
        "options": ["dog", "cat"],
        "answer": "A",
        "type": "Multiple Choice",
    }
    return [row | images, row | images | {"options": [], "answer": "7.5", "type": "Open-ended"}]


def _mmmu_vision() -> list[dict[str, Any]]:
    row = {"id": "1", "image": PICTURE, "options": "['dog', 'cat']", "answer": "A", "subject": "Art"}
    return [row, row | {"answer": "B", "options": '["dog", "cat"]'}]


def _robospatial() -> list[dict[str, Any]]:
    row = {
        "image": PICTURE,
        "depth_image": PICTURE,
        "prompt": "Does it fit?\n(A) yes\n(B) no",
        "options": ["yes", "no"],
    }
    return [row | {"answer": "A", "category": "configuration"}, row | {"answer": "B", "category": "compatibility"}]


def _circular() -> list[dict[str, Any]]:
    names = ("VIN6MS3J", "VIN6MS3J-1", "VIN6MS3J-flip", "VIN6MS3J-flip-1")
    row = {"question": "Which is higher?", "C": None, "D": None, "category": "height_higher", "image_source": "COCO"}
    row |= {"image": base64.b64encode(PICTURE["bytes"]).decode(), "image_url": "u"}
    return [
        row
        | {
            "index": i,
            "qid": name,
            "A": "dog" if i % 2 else "cat",
            "B": "cat" if i % 2 else "dog",
            "answer": "AB"[i % 2],
        }
        for i, name in enumerate(names)
    ]


def _hallusion() -> list[dict[str, Any]]:
    row = {"category": "VD", "subcategory": "illusion", "visual_input": "1", "set_id": "0", "figure_id": "0"}
    row |= {
        "sample_note": "",
        "question_id": "0",
        "question": "Is it so?",
        "gt_answer_details": "",
        "filename": "a.png",
    }
    return [row | {"gt_answer": "1", "image": PICTURE}, row | {"gt_answer": "0", "figure_id": "1", "image": PICTURE}]


ROWS: dict[str, list[dict[str, Any]]] = {
    "cv-bench": _cv_bench("Count", "Depth"),
    "cv-bench-2D": _cv_bench("Count", "Relation"),
    "cv-bench-3D": _cv_bench("Depth", "Distance"),
    "blink-spatial": _blink(),
    "blink-depth": _blink(),
    "blink-object": _blink(),
    "blink-counting": _blink(),
    "blink-multi-view": _blink(2),
    "blink-jigsaw": _blink(3),
    "realworld_qa": [
        {"image": PICTURE, "question": f"{LISTED}\nPlease answer directly with only the letter of it.", "answer": "B"},
        {
            "image": PICTURE,
            "question": "How many? Please answer directly with a single word or number.",
            "answer": "2",
        },
    ],
    "spatialbench": [
        {"image": PICTURE, "text": "Is the cup reachable?", "answer": "yes", "category": "reach"},
        {"image": PICTURE, "text": "How many cups?", "answer": "3", "category": "counting"},
    ],
    "mmvp": [
        {"image": PICTURE, "text": "Is it open? (a) Open (b) Closed", "label": "(a)"},
        {"image": PICTURE, "text": "Is it open? (a) Open (b) Closed", "label": "(b)"},
    ],
    "3dsrbench": _lettered(task="height"),
    "3dsrbench_full": _lettered(task="height"),
    "3dsrbench_circular": _circular(),
    "lego": _lettered(category="height", answer="A"),
    "spatialreasoner": _lettered(task="Depth"),
    "robospatial": _robospatial(),
    "robospatial_rgb": _robospatial(),
    "stvqa": [
        {
            "images": PICTURE,
            "problem": "<image>Look.\nImage size: (40 x 30)\nQ. Where?",
            "question_with_options": "Where is it? Options: (A) left (B) right",
            "question_only": "Where is it?",
            "options": ["left", "right"],
            "answer_only": letter,
            "answer_option_text": f'<scene>{{"objects": [], "relationships": []}}</scene><answer>({letter})</answer>',
            "category": "relation",
            "level": "easy",
        }
        for letter in "AB"
    ],
    "hallusionbench": _hallusion(),
    "mathvista": [
        {"pid": "1", "decoded_image": PICTURE, "query": LISTED, "choices": ["dog", "cat"], "answer": "cat"},
        {"pid": "2", "decoded_image": PICTURE, "query": "How long is it?", "choices": None, "answer": "7.5"},
    ],
    "mathvista_mcq": _lettered(answer="A"),
    "mathverse": [
        {
            "sample_index": "1",
            "image": PICTURE,
            "query_cot": f"{LISTED}",
            "answer": "B",
            "question_type": "multi-choice",
        },
        {
            "sample_index": "2",
            "image": PICTURE,
            "query_cot": "How long?",
            "answer": "12",
            "question_type": "free-form",
        },
    ],
    "mathverse_vision_mcq": _lettered(answer="A"),
    "mathvision": [
        {"id": "1", "question": "Which? <image1>", "options": ["dog", "cat"], "answer": "B", "decoded_image": PICTURE},
        {"id": "2", "question": "How many? <image1>", "options": [], "answer": "4", "decoded_image": PICTURE},
    ],
    "sftseed": [
        {"problem": "How long?", "answer": "3", "decoded_image": PICTURE},
        {"problem": LISTED, "answer": "B", "decoded_image": PICTURE},
    ],
    "emma-math": [
        {"image_1": PICTURE, "prompt": LISTED, "answer": letter, "choices": ["dog", "cat"], "category": "Path Tracing"}
        for letter in "AB"
    ],
    "emma-chem": _emma(),
    "emma-code": _emma(),
    "emma-physics": _emma(),
    "mmmu_pro": [
        {"id": "1", "question": "Which <image 1>?", "options": "['dog', 'cat']", "answer": letter, "image_1": PICTURE}
        | {"topic_difficulty": "Easy", "subject": "Art"}
        for letter in "AB"
    ],
    "mmmu_pro_vision_only": _mmmu_vision(),
    "mmmu-pro-vision": _mmmu_vision(),
    "mmstar": [
        {"index": i, "question": "Which is it?\nOptions: A: dog, B: cat, C: cow, D: hen", "image": PICTURE}
        | {"answer": letter, "category": "math", "l2_category": "geometry", "meta_info": {"source": "x"}}
        for i, letter in enumerate("AD")
    ],
    "vstar": [
        {"image": PICTURE, "text": f"{LISTED}\nAnswer with the option's letter from the given choices directly."}
        | {"category": "direct_attributes", "question_id": str(i), "label": letter}
        for i, letter in enumerate("AB")
    ],
    "mme-realworld-lite": [
        {"index": i, "bytes": base64.b64encode(PICTURE["bytes"]).decode(), "question": "Which is it?"}
        | {"multi-choice options": ["(A) dog", "(B) cat", "(C) none of them"], "answer": letter}
        | {"category": "Perception/Monitoring", "l2-category": "vehicle"}
        for i, letter in enumerate("AC")
    ],
    "mindcube-tiny": [
        {"id": f"among_{i}", "category": ["spatial"], "type": "among", "meta_info": "", "images": ["a.png", "b.png"]}
        | {"question": "What is behind you? A. Sofa B. Desk C. Wall", "gt_answer": letter}
        for i, letter in enumerate("BC")
    ],
}


def write_benchmark(name: str, folder: Path, split: str) -> None:
    """Write a benchmark's rows into a folder in the kind of file that its repository holds."""
    folder.mkdir(parents=True)
    rows = ROWS[name]
    if name == "mindcube-tiny":
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for image in ("a.png", "b.png"):
            (folder / image).write_bytes(PICTURE["bytes"])
        return
    if name == "3dsrbench_circular":
        datasets.Dataset.from_list(rows).to_csv(folder / f"{split}.tsv", sep="\t", index=False)
        return
    table = datasets.Dataset.from_list(rows)
    for column in rows[0]:
        if any(row[column] is PICTURE for row in rows):
            table = table.cast_column(column, datasets.Image())
    table.to_parquet(folder / f"{split}-00000-of-00001.parquet")

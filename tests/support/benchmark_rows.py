"""Rows in the exact columns of every benchmark, two each, written out by hand from the data sets' own pages."""

import base64
import io
import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import datasets
from PIL import Image


def png(size: tuple[int, int] = (40, 30), color: str = "red", **options: Any) -> bytes:
    """A small picture."""
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG", **options)
    return buffer.getvalue()


def video(num_frames: int = 40) -> bytes:
    """A small film, each frame a little brighter than the one before."""
    import cv2
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/video.mp4"
        writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*"mp4v"), 10, (40, 30))
        for i in range(num_frames):
            writer.write(np.full((30, 40, 3), 40 + 4 * i, np.uint8))
        writer.release()
        return Path(path).read_bytes()


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
        "context": "A zoo.",
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


MINDCUBE_IMAGES = ["other_all_image/among/a.png", "other_all_image/among/b.png"]


def _vsi() -> list[dict[str, Any]]:
    row = {"id": 0, "dataset": "arkitscenes", "scene_name": "41069025", "question": "Which is nearer to the door?"}
    choice = row | {"question_type": "object_rel_distance", "options": ["A. sofa", "B. desk"], "ground_truth": "B"}
    number = row | {"id": 1, "question_type": "object_counting", "question": "How many chairs are there?"}
    return [choice, number | {"options": None, "ground_truth": "4"}]


def _site(*files: str) -> list[dict[str, Any]]:
    row = {"question": "How many dogs are there?", "options": ["1", "2", "3"], "category": "counting & existence"}
    return [row | {"answer": letter, "dataset": "x", "visual": list(files)} for letter in "AC"]


def _masked(question: str, **more: Any) -> list[dict[str, Any]]:
    mask = {"bytes": png(color="white"), "path": None}
    row = {question: "Point at the free place.", "image": PICTURE, "mask": mask, "object": "place", "suffix": ""}
    return [row | more, row | more]


def _spbench(*images: str) -> list[dict[str, Any]]:
    row = {"id": 1, "dataset": "scannet", "scene_name": "scene0011_00", "images": list(images)}
    choice = row | {"question_type": "object_rel_distance", "question": "Which is nearer to the door?"}
    number = row | {"question_type": "object_abs_distance", "question": "How far is the sofa in meters?"}
    return [
        choice | {"options": ["A. sofa", "B. desk"], "ground_truth": "A"},
        number | {"options": None, "ground_truth": "2.5"},
    ]


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
    "blink-art-style": _blink(3),
    "blink-forensic": _blink(4),
    "blink-functional": _blink(2),
    "blink-iq": _blink(),
    "blink-reflectance": _blink(),
    "blink-semantic": _blink(2),
    "blink-similarity": _blink(3),
    "blink-correspondence": _blink(2),
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
        {"pid": "1", "decoded_image": PICTURE, "query": LISTED, "choices": ["dog", "cat"], "answer": "cat"}
        | {"precision": None},
        {"pid": "2", "decoded_image": PICTURE, "query": "How long is it?", "choices": None, "answer": "7.5"}
        | {"precision": 1.0},
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
        | {f"image_{i}": None for i in range(2, 8)}
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
        {"id": f"among_{i}", "category": ["spatial"], "type": "among", "meta_info": "", "images": MINDCUBE_IMAGES}
        | {"question": "What is behind you? A. Sofa B. Desk C. Wall", "gt_answer": letter}
        for i, letter in enumerate("BC")
    ],
    "vsi-bench": _vsi(),
    "mmsi-bench": [
        {"id": i, "images": [PICTURE["bytes"]] * 2, "question_type": "Positional Relationship (Cam.-Cam.)"}
        | {"question": "Where is the camera?\nOptions: A: Left, B: Right, C: Front, D: Back", "answer": letter}
        | {"thought": "x"}
        for i, letter in enumerate("AD")
    ],
    "viewspatial": [
        {"question_type": "Camera perspective - Relative Direction", "images": [PICTURE["bytes"]]}
        | {"question": "Where is the cup?", "choices": "A. left\nB. front-right\nC. right", "answer": answer}
        for answer in ("A. left", "B. front-right")
    ],
    "site-image": _site("images/x/0.png", "images/x/1.png"),
    "site-video": _site("videos/x/0.mp4"),
    "embspatial": [
        {"question_id": f"mp3d_{i}", "question": "How are the lamp and the bed placed?", "question_type": "x"}
        | {"image": base64.b64encode(PICTURE["bytes"]).decode(), "answer": i, "relation": "above"}
        | {"data_source": "mp3d", "answer_options": ["lamp above bed", "lamp under bed", "lamp left of bed"]}
        for i in (0, 2)
    ],
    "erqa": [
        {"question_id": f"ERQA_{i}", "question_type": "Spatial Reasoning", "visual_indices": [0]}
        | {
            "question": "Which is nearer? Choices: A. Cup. B. Pan. C. Lid. D. Box. "
            "Please answer directly with only the letter of the correct option and nothing else."
        }
        | {"images": [PICTURE["bytes"]], "answer": letter}
        for i, letter in enumerate("BD")
    ],
    "omnispatial": [
        {"id": f"0_{i}", "image_path": "image_files/Complex_Logic/1.png", "question": "How many faces?", "answer": i}
        | {"options": ["2", "1", "3"], "task_type": "Complex_Logic", "sub_task_type": "x", "gt": "ABC"[i]}
        for i in (0, 1)
    ],
    "spar-bench": [
        {"id": "0", "image": [PICTURE["bytes"]] * 2, "format_type": "select", "img_type": "mv", "source": "scannet"}
        | {"task": "obj_spatial_relation_oo_mv", "answer": "B"}
        | {"question": "Where is the sofa?\nA. left\nB. right\nC. above\nD. below"},
        {"id": "1", "image": [PICTURE["bytes"]], "format_type": "fill", "img_type": "sv", "source": "scannet"}
        | {"task": "depth_prediction_oc", "question": "How deep is it in meters?", "answer": "1.5"},
        {"id": "2", "image": [PICTURE["bytes"]] * 2, "format_type": "fill", "img_type": "mv", "source": "scannet"}
        | {"task": "view_change_infer", "question": "How did the camera move?"}
        | {"answer": "move_right:0.2,move_down:0.1,move_forward:1.0,rotate_left:15,rotate_up:3"},
    ],
    "spbench-si": _spbench("200.png"),
    "spbench-mv": _spbench("200.png", "300.png"),
    "sat": [
        {"question_id": i, "images": [PICTURE["bytes"]] * 2, "question": "Did the camera turn?"}
        | {
            "answers": ["turned left", "turned right"],
            "correct_answer": "turned left",
            "question_type": "ego_movement",
        }
        for i in (0, 1)
    ],
    "refspatial-location": _masked("prompt"),
    "refspatial-placement": _masked("prompt"),
    "refspatial-unseen": _masked("prompt"),
    "where2place": _masked("question", question_id="1", question_type="placement"),
    "robospatial-context": [
        {"img": row.pop("image")} | row for row in _masked("question", category="context", answer="", depth_image=None)
    ],
    "groundingme": [
        {"index": i, "image": base64.b64encode(PICTURE["bytes"]).decode(), "question": "the red one"}
        | {"answer": answer, "width": 40, "height": 30, "subtask_l1": kind, "subtask_l2": ""}
        for i, (answer, kind) in enumerate((("[4, 5, 20, 25]", "Spatial"), (None, "Rejection")))
    ],
    "multihopspatial": [
        {"id": i, "image_path": "000000579446.jpg", "image_resolution": "40x30", "hop": "2hop", "view": "exo"}
        | {"question_tag": "ATT,REL", "answer": answer, "bbox": [4.0, 5.0, 16.0, 20.0]}
        | {
            "question": "<REL>Second-closest</REL> to the wall, which is it <ATT>among the items</ATT>? <choice>(a) "
            "sink, (b) vase, (c) orange bag, (d) chair</choice> And provide the bounding box coordinate of the region."
        }
        for i, answer in enumerate(("(a) sink", "(c) orange bag"))
    ],
    "spatialviz": [
        {"Category": "MentalRotation", "Task": "2DRotation", "Level": "Level0", "Image_id": f"0-{i}"}
        | {
            "Question": "Which is turned?",
            "Choices": ["one", "two", "three", "four"],
            "Answer": letter,
            "Explanation": "",
        }
        for i, letter in enumerate("AC")
    ],
}


ARCHIVES: dict[str, dict[str, tuple[str, ...]]] = {
    "mindcube-tiny": {"data.zip": tuple(f"data/{name}" for name in MINDCUBE_IMAGES)},
    "vsi-bench": {"arkitscenes.zip": ("arkitscenes/41069025.mp4",), "scannet.zip": (), "scannetpp.zip": ()},
    "site-image": {"data_chunked_01.zip": ("images/x/0.png",), "data_chunked_02.zip": ("images/x/1.png",)},
    "site-video": {"data_chunked_01.zip": ("videos/x/0.mp4",)},
    "spbench-si": {"SPBench-SI-images.zip": ("SPBench-SI-images/scene0011_00/200.png",)},
    "spbench-mv": {
        "SPBench-MV-images.zip": (
            "SPBench-MV-images/scene0011_00/200.png",
            "SPBench-MV-images/scene0011_00/300.png",
        )
    },
    "spatialviz": {
        "images.zip": tuple(f"images/MentalRotation/2DRotation/Level0/0-{i}.png" for i in (0, 1)),
    },
}
"""Archive -> names of its files, in the layout of the data sets' own pages."""


def write_benchmark(name: str, folder: Path, split: str) -> None:
    """Write a benchmark's rows into a folder in the kind of file that its repository holds."""
    folder.mkdir(parents=True)
    rows = ROWS[name]
    for archive, members in ARCHIVES.get(name, {}).items():
        with zipfile.ZipFile(folder / archive, "w") as file:
            for member in members:
                file.writestr(member, video() if member.endswith(".mp4") else PICTURE["bytes"])
            if name == "mindcube-tiny":
                file.writestr(f"data/raw/{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
                return
    if name in ("3dsrbench_circular", "groundingme"):
        datasets.Dataset.from_list(rows).to_csv(folder / f"{split}.tsv", sep="\t", index=False)
        return
    if name == "multihopspatial":
        (folder / "data/images").mkdir(parents=True)
        (folder / "data/images/000000579446.jpg").write_bytes(PICTURE["bytes"])
        (folder / "data/multihop_test_4500.json").write_text(json.dumps(rows))
        return
    if name == "omnispatial":
        (folder / "image_files/Complex_Logic").mkdir(parents=True)
        (folder / "image_files/Complex_Logic/1.png").write_bytes(PICTURE["bytes"])
    table = datasets.Dataset.from_list(rows)
    for column in rows[0]:
        if column == "mask" or any(row[column] is PICTURE for row in rows):
            table = table.cast_column(column, datasets.Image())
    is_named = name.startswith("spbench")
    table.to_parquet(folder / (f"{split}.parquet" if is_named else f"{split}-00000-of-00001.parquet"))

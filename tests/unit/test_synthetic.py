import hashlib
import io
import json
import math
import random
import re
import subprocess
import sys
from collections import Counter

import pytest
from PIL import Image, ImageChops

from spatialthinker.prompts import parse_image_size
from spatialthinker.schema import CATEGORIES, LETTERS, LEVELS
from spatialthinker.shapes import FACINGS, KINDS, Canvas, Shape, draw, gap_px
from spatialthinker.synthetic import generate, gold_response, make_puzzle, reference_scene

CANVASES = [Canvas(), Canvas(448, 336)]
PAIRS = list(generate(900, seed=11))


def ink(canvas, shape):
    """A mask of the pixels that a shape alone changes."""
    return ImageChops.difference(draw(canvas, [shape]), draw(canvas, [])).convert("L").point([0] + [255] * 255)


def pixels(mask):
    return mask.histogram()[255]


def puzzles(category, number=60, canvas=CANVASES[0]):
    return [make_puzzle(category, random.Random(f"{category}{i}"), canvas) for i in range(number)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("facing", FACINGS)
@pytest.mark.parametrize("size", [16, 22, 28, 61])
def test_boxes_are_tight(kind, facing, size):
    shape = Shape(kind, "blue", 5, 9, size, facing if kind == "arrow" else "")
    assert ink(Canvas(), shape).getbbox() == shape.box


@pytest.mark.parametrize("canvas", CANVASES)
@pytest.mark.parametrize("category", CATEGORIES)
def test_scenes_are_legible(category, canvas):
    for puzzle in puzzles(category, 30, canvas):
        assert 2 <= len(puzzle.shapes) <= 4
        for i, shape in enumerate(puzzle.shapes):
            x1, y1, x2, y2 = shape.box
            assert 0 <= x1 < x2 <= canvas.width and 0 <= y1 < y2 <= canvas.height
            alone = ink(canvas, shape)
            hidden = sum(pixels(ImageChops.multiply(alone, ink(canvas, above))) for above in puzzle.shapes[i + 1 :])
            assert hidden <= 0.6 * pixels(alone)
        if category != "count":
            names = [shape.name for shape in puzzle.shapes]
            assert len(set(names)) == len(names)


def test_relation_and_existence_follow_the_boxes():
    checks = {
        "left of": lambda a, b: a[2] <= b[0],
        "right of": lambda a, b: a[0] >= b[2],
        "above": lambda a, b: a[3] <= b[1],
        "below": lambda a, b: a[1] >= b[3],
    }
    for puzzle in puzzles("relation") + puzzles("existence"):
        ((subject, predicate, object_),) = puzzle.relations
        a, b = puzzle.shapes[subject].box, puzzle.shapes[object_].box
        assert [name for name, holds in checks.items() if holds(a, b)] == [predicate]
        if puzzle.category == "existence":
            assert (puzzle.answer == "yes") == (f" {predicate} " in puzzle.question)
        else:
            assert puzzle.answer == predicate


def test_reach_and_depth_follow_the_pixels():
    seen = Counter()
    for puzzle in puzzles("reach", 200) + puzzles("depth", 100):
        ((subject, predicate, object_),) = puzzle.relations
        a, b = puzzle.shapes[subject], puzzle.shapes[object_]
        common = pixels(ImageChops.multiply(ink(Canvas(), a), ink(Canvas(), b)))
        seen[predicate] += 1
        if predicate in ("touching", "apart from"):
            assert common == 0
            assert gap_px(a, b) == 0 if predicate == "touching" else gap_px(a, b) >= 9
        else:
            assert common >= 20
            assert (predicate == "covered by") == (subject < object_)  # drawn first = below
    assert len(seen) == 5


def test_size_distance_location_orientation_count():
    for puzzle in puzzles("size"):
        a, b = (puzzle.shapes[i].size for i in puzzle.evidence)
        assert puzzle.answer == ("same size" if a == b else "larger" if a > b else "smaller")
        assert a == b or max(a, b) / min(a, b) > 1.25
    for puzzle in puzzles("distance"):
        anchor, near, far = (shape.centre for shape in puzzle.shapes[:3])
        assert math.dist(anchor, far) >= 1.6 * math.dist(anchor, near)
        assert puzzle.answer == puzzle.shapes[1].name
    for puzzle in puzzles("instance_location"):
        x, y = puzzle.shapes[0].centre
        rough = f"{'top' if y < 36 else 'bottom' if y > 76 else ''} {'left' if x < 36 else 'right' if x > 76 else ''}"
        assert puzzle.answer == (rough.strip() or "center")
    for puzzle in puzzles("orientation"):
        assert puzzle.answer == puzzle.shapes[0].facing
    for puzzle in puzzles("count"):
        (word,) = re.findall(r"How many (\w+?)s? (?:shapes )?are", puzzle.question)
        counted = [i for i, shape in enumerate(puzzle.shapes) if word in (shape.kind, shape.colour)]
        assert sorted(counted) == sorted(puzzle.evidence) and len(counted) == int(puzzle.answer)


def test_rows_keep_the_contract():
    for puzzle, row in PAIRS:
        scene = json.loads(*re.findall("<scene>(.*)</scene>", row.answer_option_text))
        assert scene == reference_scene(puzzle)
        ids = [item["id"] for item in scene["objects"]]
        assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-z_]+\.\d+", name) for name in ids)
        assert all({r["subject"], r["object"]} <= set(ids) for r in scene["relationships"])
        assert row.options[LETTERS.index(row.answer_only)] == row.answer_text_only == puzzle.answer
        assert row.level in LEVELS and parse_image_size(row.problem) == (112, 112)
        assert Image.open(io.BytesIO(row.images)).size == (112, 112)


def test_letters_and_answers_are_balanced():
    assert set(Counter(row.category for _, row in PAIRS).values()) == {100}
    for category in CATEGORIES:
        rows = [row for _, row in PAIRS if row.category == category]
        letters = Counter(row.answer_only for row in rows)
        numbers = [letters[letter] for letter in LETTERS[: len(rows[0].options)]]
        assert max(numbers) - min(numbers) <= 1  # a letter tells nothing about the category, nor the reverse
        if category not in ("depth", "distance"):
            texts = Counter(row.answer_text_only for row in rows)
            assert min(texts.values()) > 0.4 * 100 / len(texts)


def test_gold_response_is_complete():
    for _, row in PAIRS[:200]:
        text = gold_response(row)
        tags = re.findall(r"<(\w+)>\n.+\n</\1>", text)
        assert tags == ["observe", "scene", "think", "answer"]
        assert text.endswith(f"\n{row.answer_option_text_only}\n</answer>")


def test_gold_response_earns_the_full_reward():
    rewards = pytest.importorskip("spatialthinker.rewards")
    inputs = [rewards.RewardInput(gold_response(row), row.answer_option_text, row.problem) for _, row in PAIRS[:90]]
    for scores in rewards.REWARDS["spatial_sgg"](inputs):
        assert scores == pytest.approx(dict.fromkeys(scores, 1.0), abs=1e-5)  # eps of CIoU


def test_streams_are_seeded_sliceable_and_disjoint():
    assert [row for _, row in generate(9, seed=11, start=18)] == [row for _, row in PAIRS[18:27]]
    train = {puzzle.shapes for puzzle, _ in PAIRS}
    assert not train & {puzzle.shapes for puzzle, _ in generate(90, seed=11, split="val")}
    assert not train & {puzzle.shapes for puzzle, _ in generate(90, seed=12)}
    first = PAIRS[0][0].shapes
    assert next(generate(1, seed=11, exclude={first}))[0].shapes != first


def test_bad_requests():
    with pytest.raises(ValueError, match="unknown category 'colour'"):
        make_puzzle("colour", random.Random(0), Canvas())
    with pytest.raises(ValueError, match="40 x 112 px is too small"):
        Canvas(40, 112)


def test_command_line_writes_the_same_bytes_twice(tmp_path):
    digests = []
    for name in ("one", "two"):
        command = [sys.executable, "-m", "spatialthinker.synthetic", "--out", str(tmp_path / name)]
        command += ["--train", "27", "--val", "9", "--seed", "5", "--size", "168x112"]
        subprocess.run(command, check=True, capture_output=True)
        files = sorted((tmp_path / name).iterdir())
        assert [file.name for file in files] == ["train-00000-of-00001.parquet", "val-00000-of-00001.parquet"]
        digests.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
    assert digests[0] == digests[1]


@pytest.mark.parametrize("arguments", [["--size", "20"], ["--train", "-1"], ["--categories", "colour"]])
def test_command_line_refuses(tmp_path, arguments):
    command = [sys.executable, "-m", "spatialthinker.synthetic", "--out", str(tmp_path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr

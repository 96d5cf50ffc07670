"""Points in masks and boxes, by numbers worked by hand."""

import datasets
import pytest
from PIL import Image

from evaluation.benchmarks.rows import BENCHMARKS
from evaluation.benchmarks.samples import build_request, load_samples
from evaluation.scoring.areas import grade_box, grade_choice_and_box, grade_points, parse_box, parse_corner_box
from evaluation.scoring.strict import Reference
from spatialthinker.geometry import Box
from tests.support.benchmark_rows import ROWS, png

LEFT = Image.new("L", (40, 30))
LEFT.paste(255, (0, 0, 20, 30))
SQUARE = Reference(None, "[0, 0, 10, 10]", "box")


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("[(0.25, 0.5)]", 1),
        ("[(0.25, 0.5), (0.75, 0.5)]", 0.5),
        ('<answer>[{"point_2d": [10, 15], "label": "x"}]</answer>', 1),  # pixels
        ("[(10, 15), (500, 15)]", 0.5),  # outside the image is outside the mask
        ("[(-3, 15)]", 0),
        ("[(0.5, 0.5)]", 0),  # the first column that is not in it
        ("<think>(0.1, 0.1)</think> I cannot see it.", 0),
        ("", 0),
    ],
)
def test_points_score_by_their_share_inside_the_mask(answer, score):
    grade = grade_points(answer, "stop", LEFT)
    assert grade.score == score and grade.is_correct == (score == 1)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("[0, 0, 10, 10]", 1),
        ('{"bbox_2d": [0, 0, 10, 5]}', 0.5),
        ("[0, 0, 0.25, 0.5]", 2 / 3),  # fractions of 40 x 30: 10 x 15
        ("First [20, 20, 30, 30], no: [0, 0, 10, 10]", 1),
        ("[10, 10, 0, 0]", 0),
        ("null", 0),
        ("somewhere", 0),
    ],
)
def test_boxes_score_by_their_iou(answer, score):
    grade = grade_box(answer, "stop", SQUARE, (40, 30))
    assert grade.score == pytest.approx(score, abs=1e-6) and grade.is_correct == (score > 0.49)


@pytest.mark.parametrize(
    ("answer", "score"), [("null", 1), ("There is no such object.", 1), ("[0, 0, 1, 1]", 0), ("", 0)]
)
def test_where_nothing_is_to_be_found_saying_so_is_right(answer, score):
    assert grade_box(answer, "stop", Reference(None, "null", "box"), (40, 30)).score == score


@pytest.mark.parametrize("text", ["[1, 2, 3]", "left", "[5, 5, 1, 1]"])
def test_a_reference_that_is_no_box_is_named(text):
    with pytest.raises(ValueError, match="answer .*box"):
        parse_box(text)


@pytest.mark.parametrize("name", ["where2place", "refspatial-unseen"])
def test_a_mask_of_another_size_is_an_error_of_its_item(name, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [row | {"mask": {"bytes": png((30, 40)), "path": None}} for row in ROWS[name]]
    table = datasets.Dataset.from_list(rows)
    for column in ("image", "mask"):
        table = table.cast_column(column, datasets.Image())
    table.to_parquet(tmp_path / f"{BENCHMARKS[name].split}-0.parquet")
    sample, _ = load_samples(name, BENCHMARKS[name], str(tmp_path))
    with pytest.raises(ValueError, match="item 000000: its mask is 30 x 40, its image 40 x 30"):
        build_request(sample, "reasoning")


@pytest.mark.parametrize(
    ("text", "letter", "iou", "is_right"),
    [
        ("Answer: (b) vase\nBounding Box: [0, 0, 10, 10]", "B", 1, True),
        ('Answer: (b) vase\nBounding Box: {"bbox_2d": [0, 0, 0.25, 0.5]}', "B", 2 / 3, True),  # 10 x 15 of 40 x 30
        ("<answer>(B) vase [0, 0, 10, 5]</answer>", "B", 0.5, True),
        ("<answer>(B) vase</answer>\n[0, 0, 10, 10]", "B", 1, True),
        ("<answer>B, [0, 0, 10, 4]</answer>", "B", 0.4, False),
        ("(A) sink [0, 0, 10, 10]", "A", 1, False),
        ("(B) vase", "B", None, False),
        ("<scene>[0, 0, 10, 10]</scene><answer>(B) vase</answer>", "B", None, False),
        ("[0, 0, 10, 10]", None, 1, False),
        ("(A) or (B) [0, 0, 10, 10]", None, 1, False),
        ("", None, None, False),
    ],
)
def test_a_choice_counts_with_its_box(text, letter, iou, is_right):
    reference = Reference("B", "vase", box=Box(0, 0, 10, 10))
    grade = grade_choice_and_box(text, "stop", ("sink", "vase"), reference, (40, 30))
    assert (grade.letter, grade.is_correct, grade.facts) == (letter, is_right, {"choice": int(letter == "B")})
    assert grade.score == (None if iou is None else pytest.approx(iou, abs=1e-6))


@pytest.mark.parametrize("cell", [None, [1, 2, 3], "left", [0, 0, 0, 5], [0, 0, float("inf"), 1], [1, 2, 3, "x"]])
def test_a_cell_that_is_no_box_is_named(cell):
    with pytest.raises(ValueError, match="box"):
        parse_corner_box(cell)

"""The rewards of boxes and points, worked by hand."""

import json
from collections.abc import Sequence

import numpy as np
import pytest

from spatialthinker.rewards import REWARDS, ROW_CHECKS, RewardInput
from spatialthinker.rewards.gold import gold_response

PROBLEM = "<image> Find it.\nImage size: (200 x 100)\nQ. Where?"


def score(name, answer, truth, problem="", **kwargs):
    return REWARDS[name](
        [RewardInput(f"<think>[0, 0, 9, 9]</think>\n<answer>{answer}</answer>", truth, problem)], **kwargs
    )[0]


@pytest.mark.parametrize(
    ("answer", "truth", "iou", "f1"),
    [
        ("[0, 0, 10, 10]", [0, 0, 10, 10], 1.0, 1.0),
        ("[0, 0, 10, 5]", [0, 0, 10, 10], 0.5, 1.0),  # half of it
        ("[5, 0, 15, 10]", [0, 0, 10, 10], 1 / 3, 0.0),  # 50 of 150
        ("[[0, 0, 10, 10], [20, 20, 30, 30]]", [0, 0, 10, 10], 0.5, 2 / 3),  # one too many
        ("[0, 0, 10, 10]", [[0, 0, 10, 10], [20, 20, 30, 30]], 0.5, 2 / 3),  # one missing
        ("[[20, 20, 30, 30], [0, 0, 10, 5]]", [[0, 0, 10, 10], [20, 20, 30, 30]], 0.75, 1.0),
        ("[50, 50, 60, 60]", [0, 0, 10, 10], 0.0, 0.0),
        ("[10, 10, 0, 0]", [0, 0, 10, 10], 0.0, 0.0),  # corners out of order
        ("somewhere", [0, 0, 10, 10], 0.0, 0.0),
        ("[0, 0, 10]", [0, 0, 10, 10], 0.0, 0.0),
        ("[]", [], 1.0, 1.0),
        ("None.", "none", 1.0, 1.0),
        ("[0, 0, 10, 10]", [], 0.0, 0.0),
        ("I do not know", [], 0.0, 0.0),
    ],
)
def test_boxes_are_matched_one_to_one(answer, truth, iou, f1):
    result = score("boxes", answer, truth)
    assert result == pytest.approx({"overall": (iou + f1) / 2, "iou": iou, "f1": f1})
    assert score("boxes", answer, truth, f1_weight=0.0)["overall"] == pytest.approx(iou)
    text = truth if isinstance(truth, str) else json.dumps(truth)
    assert score("boxes", answer, f"<answer>{text}</answer>") == result


def test_the_threshold_counts_and_the_assignment_has_the_largest_sum():
    truth = [[0, 0, 10, 10], [8, 0, 18, 10]]
    answer = "[[4, 0, 14, 10], [0, 0, 10, 10]]"  # the first overlaps both: IoU 60/140 each; the second is the first
    result = score("boxes", answer, truth, iou_threshold=0.4)
    assert result["iou"] == pytest.approx((1 + 60 / 140) / 2) and result["f1"] == 1.0
    assert score("boxes", answer, truth)["f1"] == pytest.approx(2 * 1 / 4)


def test_labels_are_compared_where_both_sides_have_them():
    truth = [{"bbox": [0, 0, 10, 10], "label": "red Cat"}]
    assert score("boxes", '[{"bbox_2d": [0, 0, 10, 10], "label": "Red cat."}]', truth)["iou"] == pytest.approx(
        1, abs=1e-6
    )
    assert score("boxes", '```json\n[{"bbox_2d": [0, 0, 10, 10], "label": "dog"}]\n```', truth)["iou"] == 0.0
    assert score("boxes", "[0, 0, 10, 10]", truth)["iou"] == pytest.approx(1.0)
    scene = {"objects": [{"id": "red_cat.1", "bbox": [0, 0, 10, 10]}], "relationships": []}
    assert score("boxes", '{"box": [0, 0, 10, 10], "name": "red cat"}', scene)["iou"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    "truth", [[20, 10, 100, 50], [0.1, 0.1, 0.5, 0.5], {"bbox": [20, 10, 100, 50], "size": [200, 100]}]
)
def test_boxes_are_compared_in_pixels(truth):
    for answer, frame in (
        ("[20, 10, 100, 50]", "pixels"),
        ("[0.1, 0.1, 0.5, 0.5]", "pixels"),
        ("[100, 100, 500, 500]", "thousandths"),
    ):
        assert score("boxes", answer, truth, PROBLEM, frame=frame)["iou"] == pytest.approx(1.0), (
            answer,
            truth,
        )


def test_a_frame_needs_a_size_and_a_known_name():
    with pytest.raises(ValueError, match="needs the image's size"):
        score("boxes", "[1, 2, 3, 4]", [1, 2, 3, 4], frame="thousandths")
    for name in ("boxes", "points"):
        with pytest.raises(ValueError, match="got frame 'percent'; known: pixels, thousandths"):
            score(name, "", [1, 2, 3, 4], frame="percent")


@pytest.mark.parametrize(
    "truth",
    ["", "left", [1, 2, 3], [1, 2, 3, True], [3, 2, 1, 4], {"label": "cat"}, [[1, 2, 3, 4], None], [[[[1]]]], 7]
    + [{"bbox": [1, 2, 3, 4], "size": [0, 1]}, "[1, 2, 3, 1e99]", None],
)
def test_a_ground_truth_without_boxes_is_named(truth):
    for name in ("boxes", "points"):
        if name == "boxes" and truth is None:  # null: nothing to be found
            continue
        with pytest.raises(ValueError, match="the ground truth"):
            ROW_CHECKS[name](truth, "")
        with pytest.raises(ValueError, match="the ground truth"):
            score(name, "[1, 2, 3, 4]", truth)


MASK = [[0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]]  # pixels (2, 0), (3, 0) and (2, 1)
RUNS = {"size": [3, 4], "counts": [6, 2, 1, 1, 2]}  # down the columns


@pytest.mark.parametrize(
    "truth", [{"mask": MASK}, {"mask": np.array(MASK, bool)}, RUNS, {"mask": RUNS}, json.dumps(RUNS)]
)
@pytest.mark.parametrize(
    ("answer", "share"),
    [
        ("[(2, 0)]", 1.0),
        ("(2.9, 1.9)", 1.0),
        ("(3, 1)", 0.0),
        ("(2, 0), (3, 1)", 0.5),
        ('[{"point_2d": [3, 0], "label": "cat"}]', 1.0),
        ("(2, 0), (2, 0), (9, 9)", 2 / 3),
        ("(4, 0)", 0.0),
        ("(-1, 2)", 0.0),
        ("(0.6, 0.2)", 1.0),  # (2.4, 0.6)
        ("nowhere", 0.0),
    ],
)
def test_points_count_by_their_share_on_the_mask(truth, answer, share):
    assert score("points", answer, truth) == {"overall": pytest.approx(share)}


def test_points_in_boxes():
    assert score("points", "(10, 10), (50, 50)", [0, 0, 10, 10])["overall"] == 0.5
    assert score("points", "(5, 5), (25, 25)", [[0, 0, 10, 10], [20, 20, 30, 30]])["overall"] == 1.0
    assert score("points", "(100, 100)", [10, 0, 30, 20], PROBLEM, frame="thousandths")["overall"] == 1.0  # (20, 10)


def compress(counts: Sequence[int]) -> str:
    """Return COCO's text of runs, written from its description."""
    text = ""
    for i, count in enumerate(counts):
        value, is_last = count - (counts[i - 2] if i > 2 else 0), False
        while not is_last:
            digit, value = value & 31, value >> 5
            is_last = value == (-1 if digit & 16 else 0)
            text += chr(48 + digit + (0 if is_last else 32))
    return text


def test_compressed_runs_are_read():
    rng = np.random.default_rng(0)
    mask = rng.random((90, 70)) < 0.3
    flat = mask.T.ravel().astype(int)
    edges = [0, *(np.flatnonzero(np.diff(flat)) + 1).tolist(), flat.size]
    counts = [*([0] if flat[0] else []), *np.diff(edges).tolist()]
    truth = {"size": [90, 70], "counts": compress(counts)}
    for x, y in rng.integers(2, 70, (300, 2)).tolist():
        assert score("points", f"({x}, {y})", truth)["overall"] == float(mask[y, x])
    assert compress([6, 2, 1, 1, 2]) == "621O1"  # 6, 2, 1, 1 - 2 and 2 - 1


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ({"mask": [[0, 0], [0, 0]]}, "without a pixel"),
        ({"mask": [[0, 1], [0]]}, "is no mask"),
        ({"mask": []}, "is no mask"),
        ({"mask": "cat.png"}, "is no mask"),
        ({"size": [3, 4], "counts": [6, 2]}, "the runs end at 8, the mask has 3 x 4 pixels"),
        ({"size": [3, 4], "counts": [14, -2]}, "whole numbers"),
        ({"size": [3, 4], "counts": "62\x7f"}, "no sign of compressed runs"),
        ({"size": [3, 4], "counts": "62P"}, "cut off"),
        ({"counts": [12]}, "is no mask"),
    ],
)
def test_a_mask_that_is_none_is_named(truth, message):
    with pytest.raises(ValueError, match=message):
        ROW_CHECKS["points"](truth, "")


def test_a_mask_of_another_size_than_the_image_is_named():
    with pytest.raises(ValueError, match="a mask of 4 x 3 pixels for an image of 200 x 100"):
        ROW_CHECKS["points"]({"mask": MASK}, PROBLEM)
    ROW_CHECKS["points"](RUNS, "Image size: (4 x 3)")


@pytest.mark.parametrize(
    "truth", [RUNS, {"mask": MASK}, [20, 10, 100, 50], [0.1, 0.2, 0.3, 0.4], [[1, 2, 3, 4], [5, 6, 7, 8]]]
)
def test_the_gold_answer_scores_one(truth):
    for name in ("points", "boxes"):
        if name == "points" or isinstance(truth, list):
            item = RewardInput(gold_response(name, truth), truth)
            assert REWARDS[name]([item])[0]["overall"] == pytest.approx(1.0)

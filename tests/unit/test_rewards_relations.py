"""The reward of relation triplets, worked by hand."""

import json

import pytest

from spatialthinker.rewards import REWARDS, ROW_CHECKS, RewardInput
from spatialthinker.rewards.explain import explain
from spatialthinker.rewards.gold import gold_response

TRUTH = [["cat", "left of", "dog"], ["cat", "left of", "hen"], ["cat", "riding", "horse"]]
CAT, DOG, OTHER_DOG = [0, 0, 10, 10], [20, 0, 30, 10], [60, 0, 70, 10]


def scene(*relations, objects=(("cat.1", CAT), ("dog.1", DOG), ("dog.2", OTHER_DOG))):
    rows = [dict(zip(("subject", "predicate", "object"), row, strict=True)) for row in relations]
    return json.dumps({"objects": [{"id": i, "bbox": box} for i, box in objects], "relationships": rows})


def score(response, truth, **kwargs):
    return REWARDS["relations"]([RewardInput(response, truth)], **kwargs)[0]


def answer(*triplets):
    return f"<think>t</think>\n<answer>{json.dumps(triplets)}</answer>"


@pytest.mark.parametrize(
    ("stated", "recall", "precision"),
    [
        (TRUTH, 1.0, 1.0),
        (TRUTH[:2], 0.5, 1.0),  # two of "left of", which weigh a half each, of 0.5 + 0.5 + 1
        (TRUTH[2:], 0.5, 1.0),
        (TRUTH[:1], 0.25, 1.0),
        ([["Dog.", "to the right of", "the cat"[4:]]], 0.25, 1.0),  # the inverse, turned round
        ([["dog", "left of", "cat"]], 0.0, 0.0),
        ([["cat", "on the left side of", "dog"], ["cat", "above", "dog"]], 0.25, 0.5),
        ([TRUTH[2], TRUTH[2]], 0.5, 0.5),  # said twice, found once
        ([["x", "on", "y"]] * 6 + TRUTH, 0.0, 0.0),  # the first six of nine are compared
        ([["x", "on", "y"]] * 5 + TRUTH[2:], 0.5, 1 / 6),
        ([], 0.0, 0.0),
    ],
)
def test_recall_is_weighed_by_rarity(stated, recall, precision):
    assert score(answer(*stated), TRUTH) == pytest.approx(
        {"overall": recall, "recall": recall, "precision": precision}
    )
    assert score(answer(*stated), json.dumps(TRUTH)) == score(answer(*stated), TRUTH)


def test_the_weights_come_from_the_data_set_where_it_is_counted():
    counts = {"left of": 60, "on the right of": 4, "riding": 4}  # left and right are one: 64
    stated = answer(TRUTH[2])
    assert score(stated, TRUTH, predicate_counts=counts)["recall"] == pytest.approx((1 / 4) / (1 / 4 + 2 / 64))
    half = {"predicate_counts": counts, "rarity": 0.5}
    assert score(stated, TRUTH, **half)["recall"] == pytest.approx((1 / 2) / (1 / 2 + 2 / 8))
    assert score(stated, TRUTH, rarity=0)["recall"] == pytest.approx(1 / 3)
    assert score(stated, TRUTH, predicate_counts={"left of": 9})["recall"] == pytest.approx(1 / (1 + 2 / 9))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"predicate_counts": {"on": 0}}, r"predicate_counts\.on = 0: must be a number of 1 or more"),
        ({"predicate_counts": {"on": "many"}}, r"predicate_counts\.on = 'many'"),
        ({"surplus": 0.5}, r"surplus = 0\.5: must be 1 or more"),
    ],
)
def test_keywords_that_mean_nothing_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        score("", TRUTH, **kwargs)


def test_boxes_tell_two_things_of_one_name_apart():
    truth = f"<scene>{scene(('cat.1', 'left of', 'dog.2'))}</scene><answer>x</answer>"
    right = f"<scene>{scene(('cat.1', 'left of', 'dog.2'))}</scene>"
    wrong = f"<scene>{scene(('cat.1', 'left of', 'dog.1'))}</scene>"
    assert [score(text, truth)["overall"] for text in (right, wrong)] == [1.0, 0.0]
    assert score(wrong, truth, iou_threshold=0.0)["overall"] == 1.0
    moved = scene(("cat.1", "left of", "dog.2"), objects=(("cat.1", [0, 0, 10, 6]), ("dog.2", [62, 0, 70, 10])))
    assert score(f"<scene>{moved}</scene>", truth)["overall"] == 1.0  # IoU 0.6 and 0.8
    assert score(f"<scene>{moved}</scene>", truth, iou_threshold=0.7)["overall"] == 0.0
    both = scene(("cat.1", "left of", "dog.1"), ("dog.2", "right of", "cat.1"))
    assert score(f"<scene>{both}</scene>", both) == {"overall": 1.0, "recall": 1.0, "precision": 1.0}
    assert score(answer(["cat", "left of", "dog"]), truth)["overall"] == 1.0  # without boxes by names


def test_a_relation_of_two_has_no_direction():
    for stated in (["dog", "touching", "cat"], ["cat", "touches", "dog"]):
        assert score(answer(stated), [["cat", "touching", "dog"]])["overall"] == 1.0
    turned = scene(("dog.2", "touching", "dog.1"))
    assert score(f"<scene>{turned}</scene>", scene(("dog.1", "touching", "dog.2")))["overall"] == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "<answer>(cat, left of, dog), (cat, left of, hen), (cat, riding, horse)</answer>",
        "<answer>\n```json\n" + json.dumps(TRUTH) + "\n```\n</answer>",
        "<answer>1. <cat, left of, dog>\n2. <cat, left of, hen>\n3. <cat, riding, horse></answer>",
        "<answer>"
        + json.dumps([dict(zip(("subject", "predicate", "object"), row, strict=True)) for row in TRUTH])
        + "</answer>",
    ],
)
def test_lists_are_read_in_the_forms_that_models_write(text):
    assert score(text, TRUTH)["overall"] == 1.0


@pytest.mark.parametrize("truth", ["", "left", [], [["cat", "on"]], [["", "on", "mat"]], [1, 2, 3], 7, "{}", scene()])
def test_a_ground_truth_without_relations_is_named(truth):
    with pytest.raises(ValueError, match="the ground truth"):
        ROW_CHECKS["relations"](truth, "")


def test_gold_and_explanation():
    assert score(gold_response("relations", TRUTH), TRUTH)["overall"] == 1.0
    lines = list(explain("relations", RewardInput(answer(TRUTH[2]), TRUTH)))
    assert lines[0] == "triplets: 1, true 3"
    said = "left of dog: not found", "left of hen: not found", "riding horse: found"
    assert lines[1:] == [f"  cat {text}" for text in said]

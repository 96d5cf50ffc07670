"""The rewards of choices and orders, worked by hand."""

import pytest

from spatialthinker.prompts import render_prompt
from spatialthinker.rewards import REWARDS, ROW_CHECKS, RewardInput
from spatialthinker.rewards.gold import gold_response
from spatialthinker.rewards.options import stated_options

QUESTION = "Where is the cat?\nOptions:\n(A) left of it\n(B) right of it\n(C) above it"
PROBLEM = render_prompt("spatial_thinker_full", QUESTION, 100, 100)


def score(name, answer, truth, problem="", **kwargs):
    text = f"<think>A or B? right of it</think>\n<answer>{answer}</answer>"
    return REWARDS[name]([RewardInput(text, truth, problem)], **kwargs)[0]


@pytest.mark.parametrize("truth", ["B", "(B)", "(B) right of it", "right of it", "<answer>b</answer>"])
@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        ("B", True), ("(B) right of it", True), ("b.", True), ("Right of it.", True), ("The answer is B.", True),
        ("A", False), ("(A) left of it", False), ("A or B", False), ("(B) left of it", False), ("", False),
        ("not B", False), ("D", False), ("I cannot tell.", False), ("(A)(B)(C)", False), ("the dog", False),
    ],
)  # fmt: skip
def test_a_choice_is_read_as_the_evaluation_reads_it(answer, is_right, truth):
    assert score("choice", answer, truth, PROBLEM) == {"overall": float(is_right)}


def test_options_come_from_the_ground_truth_or_the_prompt():
    truth = {"answer": "two", "options": ["one", "two"]}
    assert score("choice", "(B)", truth)["overall"] == score("choice", "2nd: two", truth, PROBLEM)["overall"] == 1.0
    assert score("choice", "B", "B")["overall"] == 1.0  # nothing but letters is known
    assert stated_options(PROBLEM) == ("left of it", "right of it", "above it")
    assert stated_options("Which? Options: A. cat B. dog C: hen\nAnswer.") == ("cat", "dog", "hen")
    assert stated_options("See plan A. And then?\n(A) x (B) y (D) z\nA. ") == ("x", "y (D) z")
    assert stated_options("(A) x") == stated_options("") == stated_options("(B) x (C) y") == ()


@pytest.mark.parametrize(
    "truth",
    ["", "D", "somewhere", "A or B", None, 3, ["A"], {"answer": "A"}, {"answer": 1, "options": ["a", "b"]}]
    + [
        {"options": ["a", "b"]},
        {"answer": "A", "options": ["a"]},
        {"answer": "A", "options": [1, 2]},
        "(B) left of it",
    ],
)
def test_a_ground_truth_that_names_no_option_is_named(truth):
    with pytest.raises(ValueError, match="the ground truth"):
        ROW_CHECKS["choice"](truth, PROBLEM)
    with pytest.raises(ValueError, match="the ground truth"):
        score("choice", "A", truth, PROBLEM)


@pytest.mark.parametrize(
    ("answer", "exact", "pairs"),
    [
        ("cat, dog, hen, cow", 1.0, 1.0),
        ("Cat > Dog > Hen > Cow.", 1.0, 1.0),
        ("1. cat\n2. dog\n3. hen\n4. cow", 1.0, 1.0),
        ('["cat", "dog", "hen", "cow"]', 1.0, 1.0),
        ("The order is: cat, dog, hen, and cow", 1.0, 1.0),
        ("dog, cat, hen, cow", 0.0, 5 / 6),  # one of six pairs is wrong
        ("cow, hen, dog, cat", 0.0, 0.0),
        ("cat, dog", 0.0, 1 / 6),  # the other five pairs lack an item
        ("cat, dog, hen, cow, pig", 0.0, 1.0),
        ("cat, dog, hen, cow, cat", 0.0, 0.0),  # an item twice
        ("cat", 0.0, 0.0),
        ("", 0.0, 0.0),
        ("I do not know", 0.0, 0.0),
        ('{"a": 1}', 0.0, 0.0),
        ("[[1]]", 0.0, 0.0),
    ],
)
def test_an_order_counts_by_its_pairs(answer, exact, pairs):
    for truth in (["cat", "dog", "hen", "cow"], "cat, dog, hen, cow", "<answer>cat > dog > hen > cow</answer>"):
        result = score("ordering", answer, truth)
        overall = (exact + max(0.0, 2 * pairs - 1)) / 2
        assert result == pytest.approx({"overall": overall, "exact": exact, "pairs": pairs})
    assert score("ordering", answer, ["cat", "dog", "hen", "cow"], exact_weight=1.0)["overall"] == exact


def test_orders_of_numbers():
    for answer in ("3, 1, 2", "[3, 1, 2]", "(3, 1, 2)", "3 -> 1 -> 2", "[3.0, 1, 2]"):
        assert (
            score("ordering", answer, [3, 1, 2])["overall"] == score("ordering", answer, "3, 1, 2")["overall"] == 1.0
        )
    assert score("ordering", "1, 3, 2", "['3', '1', '2']")["pairs"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("truth", ["", "cat", [], ["cat"], ["cat", "Cat."], [1, None], {"a": 1}, 5, [[1], [2]], None])
def test_a_ground_truth_without_an_order_is_named(truth):
    with pytest.raises(ValueError, match="the ground truth"):
        ROW_CHECKS["ordering"](truth, "")
    with pytest.raises(ValueError, match="the ground truth"):
        score("ordering", "cat, dog", truth)


@pytest.mark.parametrize(
    ("name", "truth"),
    [("choice", "B"), ("choice", "right of it"), ("choice", {"answer": "b", "options": ["a", "b"]})]
    + [("ordering", [2, 1, 3]), ("ordering", "cat > dog")],
)
def test_the_gold_answer_scores_one(name, truth):
    assert REWARDS[name]([RewardInput(gold_response(name, truth), truth, PROBLEM)])[0]["overall"] == 1.0

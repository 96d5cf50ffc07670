"""The rewards of numbers and of length, worked by hand."""

import pytest

from spatialthinker.rewards import REWARDS, ROW_CHECKS, RewardInput
from spatialthinker.rewards.gold import gold_response


def score(answer, truth, **kwargs):
    return REWARDS["numbers"]([RewardInput(f"<think>9</think>\n<answer>{answer}</answer>", truth)], **kwargs)[0]


@pytest.mark.parametrize(
    ("answer", "truth", "mra", "smooth"),
    [
        ("2", 2, 1.0, 1.0),
        ("2.5", 2, 0.5, 0.75),  # error 0.25: below 0.5, 0.45, 0.4, 0.35 and 0.3 of the ten limits
        ("2.04", "2", 1.0, 0.98),  # error 0.02, below the strictest limit of 0.05
        ("3", 2, 0.0, 0.5),  # error 0.5 is not below 0.5
        ("1.1", 2, 0.1, 0.55),  # error 0.45: below 0.5 alone
        ("4", 2, 0.0, 0.0),
        ("-2", 2, 0.0, 0.0),
        ("-2", -2.5, 0.6, 0.8),  # error 0.2: below 0.5, ..., 0.25
        ("0", 0, 1.0, 1.0),
        ("0.001", 0, 0.0, 0.0),
        ("1e999", 2, 0.0, 0.0),
    ],
)
def test_accuracy_falls_with_the_relative_error(answer, truth, mra, smooth):
    result = score(answer, truth)
    assert result == pytest.approx({"overall": mra, "mra": mra, "smooth": smooth})
    assert score(answer, truth, smooth_weight=0.5)["overall"] == pytest.approx((mra + smooth) / 2)


@pytest.mark.parametrize(
    ("answer", "truth", "mra"),
    [
        ("250 cm", "2.5 m", 1.0),
        ("2.5 meters", {"value": 2.5, "unit": "m"}, 1.0),
        ("2.5", {"value": 2.5, "unit": "m"}, 1.0),
        ("2.5 s", "2.5 m", 0.0),
        ("two and a half meters", "2.5 m", 1.0),
        ("\\boxed{3}", '{"value": 3}', 1.0),
        ("The distance is 3 m.", "<answer>3</answer>", 1.0),
        ("There are three dogs", "3 dogs", 1.0),
        ("three cats", "3 dogs", 0.0),
        ("1/2", 0.5, 1.0),
        ("2 or 3", 3, 0.0),
        ("between 2 and 4", 3, 0.0),
        ("The answer is not 3", 3, 0.0),
        ("many", 3, 0.0),
        ("3 " * 3000, 3, 1.0),
        ("9**9**9", 3, 0.0),
    ],
)
def test_numbers_are_read_with_words_and_units(answer, truth, mra):
    assert score(answer, truth)["mra"] == mra


def test_a_number_outside_the_answer_does_not_count():
    assert REWARDS["numbers"]([RewardInput("<think>It is 2 m.</think> I cannot tell.", 2)])[0]["overall"] == 0.0
    assert REWARDS["numbers"]([RewardInput("It is 2 m.", 2)])[0]["overall"] == 1.0


@pytest.mark.parametrize("truth", ["", "some", "2 to 3", None, [2], True, {"unit": "m"}, {"value": None}, "1e999"])
def test_a_ground_truth_without_one_number_is_named(truth):
    with pytest.raises(ValueError, match="the ground truth"):
        ROW_CHECKS["numbers"](truth, "")
    with pytest.raises(ValueError, match="the ground truth"):
        score("2", truth)


@pytest.mark.parametrize("truth", [2, 2.5, -3, 0, "2.5 m", "two dogs", {"value": 12, "unit": "cm"}, 1e-7, 1e20])
def test_the_gold_answer_of_a_number_scores_one(truth):
    assert REWARDS["numbers"]([RewardInput(gold_response("numbers", truth), truth)])[0]["overall"] == 1.0


def test_length_falls_over_the_last_tokens():
    lengths = (0, 100, 300, 400, 425, 475, 500, 900)
    inputs = [RewardInput("x", None, response_length=number) for number in lengths]
    scores = [result["overall"] for result in REWARDS["length"](inputs, max_tokens=500, buffer_tokens=100)]
    assert scores == [1.0, 1.0, 1.0, 1.0, 0.75, 0.25, 0.0, 0.0]


def test_length_says_what_it_needs():
    with pytest.raises(ValueError, match="needs the number of tokens of each response"):
        REWARDS["length"]([RewardInput("x", "")])
    for limits in ({"max_tokens": 10}, {"buffer_tokens": 0}, {"max_tokens": -1}):
        with pytest.raises(ValueError, match="0 < buffer <= max"):
            REWARDS["length"]([RewardInput("x", "", response_length=3)], **limits)

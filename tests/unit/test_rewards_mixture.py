"""Sums and gates of rewards, worked by hand."""

import pytest

from spatialthinker.rewards import REWARDS, RewardInput


def mixed(spec, answers=("2.5", "2", "no"), truth=2, length=1792):
    inputs = [RewardInput(f"<think>t</think><answer>{answer}</answer>", truth, "", length) for answer in answers]
    return REWARDS["mixture"](inputs, **spec)


def overalls(spec, **kwargs):
    return [result["overall"] for result in mixed(spec, **kwargs)]


def test_a_sum_weighs_its_parts():
    # numbers: 0.5, 1 and 0; length: (2048 - 1792) / 512 = 0.5
    assert overalls({"sum": {"numbers": 0.8, "length": 0.2}}) == pytest.approx([0.5, 0.9, 0.1])
    assert mixed({"sum": {"numbers": 0.8, "length": 0.2}})[0] == pytest.approx(
        {"overall": 0.5, "numbers": 0.5, "length": 0.5}
    )


def test_a_gate_lets_through_from_its_limit_on():
    assert overalls({"gate": "numbers", "then": "length"}) == [0.0, 0.5, 0.0]
    assert overalls({"gate": "numbers", "then": "length", "at": 0.5}) == [0.5, 0.5, 0.0]


def test_parts_may_be_terms_have_keywords_and_be_nested():
    spec = {"sum": [{"reward": "numbers", "kwargs": {"smooth_weight": 1.0}, "weight": 1}]}
    assert overalls(spec) == pytest.approx([0.75, 1.0, 0.0])
    assert overalls({"sum": {"numbers.smooth": 0.5, "r1v.format": 0.5}}) == pytest.approx([0.875, 1.0, 0.5])
    nested = {"sum": [{"gate": "r1v.format", "then": "numbers", "weight": 0.5}, {"reward": "length", "weight": 0.5}]}
    assert overalls(nested) == pytest.approx([0.5, 0.75, 0.25])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "mixture: got the keys none"),
        ({"sum": {}}, "mixture.sum: got {}"),
        ({"sum": {"numbres": 1}}, "mixture.sum.numbres: no reward 'numbres'; did you mean numbers?"),
        ({"sum": {"numbers": -1}}, "mixture.sum.numbers: got -1; a number from 0 on"),
        ({"sum": {"numbers": float("nan")}}, "a number from 0 on"),
        ({"sum": {"numbers": True}}, "a number from 0 on"),
        ({"sum": {"numbers.accuracy": 1}}, "numbers has no term 'accuracy', only overall, mra, smooth"),
        ({"sum": ["numbers"]}, r"mixture.sum\[0\]: got 'numbers'; a part with a weight"),
        ({"sum": {"mixture": 1}}, "no reward 'mixture'"),
        ({"gate": "numbers"}, "mixture: got the keys gate; sum, or gate with then and at"),
        ({"gate": 3, "then": "numbers"}, "mixture.gate: got 3"),
        ({"sum": [{"reward": "numbers", "weight": 1, "scale": 2}]}, "got the keys scale beside"),
    ],
)
def test_a_mixture_that_is_none_is_named(spec, message):
    with pytest.raises(ValueError, match=message):
        mixed(spec)

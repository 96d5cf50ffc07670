"""The reward of answers that follow from the response's own scene."""

import json
import random

import pytest

from spatialthinker.rewards import REWARDS, RewardInput
from spatialthinker.rewards.explain import explain
from tests.support.hostile_responses import hostile_response

PROBLEM = "Image size: (100 x 100)\n\nQ. Where is the cat in relation to the dog?\nOptions:\n(A) left of\n(B) right of"
LEFT, RIGHT = [0, 0, 10, 10], [80, 0, 90, 10]


def item(answer, cat, problem=PROBLEM, dog="dog.2"):
    scene = {"objects": [{"id": "cat.1", "bbox": cat}, {"id": dog, "bbox": [40, 0, 50, 10]}], "relationships": []}
    return RewardInput(f"<scene>{json.dumps(scene)}</scene><think>t</think><answer>{answer}</answer>", "", problem)


def score(*args, undecided=0.0, **kwargs):
    return REWARDS["follows_scene"]([item(*args, **kwargs)], undecided=undecided)[0]["overall"]


@pytest.mark.parametrize(("cat", "letter"), [(LEFT, "A"), (RIGHT, "B")])
def test_the_scene_decides_what_may_be_answered(cat, letter):
    assert {x: score(x, cat) for x in "AB"} == {x: float(x == letter) for x in "AB"}
    assert f"leads to {letter}" in next(iter(explain("follows_scene", item("A", cat))))


def test_an_open_scene_and_a_missing_one():
    assert score("A", LEFT, dog="hen.2") == 0.0 and score("A", LEFT, dog="hen.2", undecided=0.5) == 0.5
    assert score("A", LEFT, PROBLEM.replace("Where is the cat in relation to the dog", "Who is happy")) == 1.0
    assert score("", LEFT) == 0.0
    assert REWARDS["follows_scene"]([RewardInput("<answer>A</answer>", "", PROBLEM)]) == [{"overall": 0.0}]


def test_hostile_responses_score_within_bounds():
    rng = random.Random(2)
    inputs = [RewardInput(hostile_response(rng), "", PROBLEM) for _ in range(300)]
    results = REWARDS["follows_scene"](inputs)
    assert {result["overall"] for result in results} <= {0.0, 1.0}
    assert results == [result for one in inputs for result in REWARDS["follows_scene"]([one])]

"""Nothing that a model writes makes a reward raise, leave [0, 1], depend on its neighbours, or work without bound."""

import json
import math
import random
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spatialthinker.matching import label_vectors
from spatialthinker.rewards import REWARDS, TEXT_REWARDS, RewardInput, format_failure
from spatialthinker.rewards.bench import random_input, random_scene
from tests.support.hostile_responses import hostile_input, hostile_response
from tests.support.hostile_work import LONG, MOST_WORK, around, count_work

BATCH = 25
DEFAULT_CASES, NIGHTLY_CASES = 5_000, 200_000
ABLATION = dict(format_gate=False, accuracy_gate=False, relation_weight=0.3, strict_boxes=False, overlap="giou")


def check(inputs, rng):
    for name in TEXT_REWARDS:
        reward = REWARDS[name]
        for kwargs in ({}, ABLATION) if name == "spatial_sgg" else ({},):
            results = reward(inputs, **kwargs)
            for item, result in zip(inputs, results, strict=True):
                assert all(math.isfinite(value) and 0.0 <= value <= 1.0 for value in result.values()), (item, result)
            order = rng.sample(range(len(inputs)), len(inputs))
            assert [results[i] for i in order] == reward([inputs[i] for i in order], **kwargs)
            some = rng.randrange(len(inputs))
            assert reward([inputs[some]], **kwargs) == [results[some]]
    for item in inputs:
        assert (format_failure(item.response) is None) == (REWARDS["spatial_sgg"]([item])[0]["format"] == 1.0)


def check_batch(seed):
    rng = random.Random(seed)
    check([hostile_input(rng) for _ in range(BATCH)], rng)


@settings(max_examples=DEFAULT_CASES // BATCH, deadline=None)
@given(st.integers(0, 2**64 - 1))
def test_hostile_responses(seed):
    check_batch(seed)


@pytest.mark.nightly
@settings(max_examples=NIGHTLY_CASES // BATCH, deadline=None)
@given(st.integers(0, 2**64 - 1))
def test_many_hostile_responses(seed):
    check_batch(seed)


def test_hostile_responses_reach_every_outcome():
    rng = random.Random(1)
    reasons = [format_failure(hostile_response(rng)) for _ in range(3000)]
    assert 0.05 < reasons.count(None) / len(reasons) < 0.6
    assert len(set(reasons)) >= 15, sorted(map(str, set(reasons)))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
objects = (
    st.fixed_dictionaries({"id": st.from_regex(r"[a-z_]{1,6}\.\d{1,2}", fullmatch=True) | json_values}) | json_values
)
boxes = st.lists(st.floats(-1e7, 1e7) | st.integers() | json_values, min_size=3, max_size=5)
scenes = st.fixed_dictionaries(
    {
        "objects": st.lists(
            st.builds(lambda a, b: a | {"bbox": b} if isinstance(a, dict) else a, objects, boxes), max_size=4
        )
    },
    optional={"relationships": st.lists(json_values, max_size=3) | json_values, "other": json_values},
)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(scenes.map(json.dumps) | st.text(), st.text(max_size=40), st.booleans(), st.randoms(use_true_random=False))
def test_any_scene_and_answer(scene, answer, is_right, rng):
    row = random_input(random.Random(7))
    answer = "(B) left of it" if is_right else answer
    text = f"<observe></observe><scene>{scene}</scene><think></think><answer>{answer}</answer>"
    check([RewardInput(text, row.ground_truth, row.problem), row], rng)


OBJECT_ID = re.compile(r"[a-zA-Z_]+\.\d+")
PIECES = (
    "\n", "\t", "\0", "\x7f", "\ufeff", "\u00a0", "\u0663", "\U0001f408", "é", "\\u0041", "\\/", "\\x", '"', "'",
    "1", ".", "e", "-", "0", "_", "null", "//", ",", "[]", "{}", '"a": 1,', '"id": "cat.1",', '"bbox": [1, 2, 3, 4],',
)  # fmt: skip


def is_scene_by_json(text):
    """True when Python's own JSON reader and the released checks, one by one, take a scene."""
    try:
        scene = json.loads(text)
    except ValueError:
        return False
    if not isinstance(scene, dict) or not scene:
        return False
    objects, relations = scene.get("objects", []), scene.get("relationships", [])
    if not isinstance(objects, list) or not isinstance(relations, list):
        return False
    if not all(isinstance(item, dict) and set(item) == {"id", "bbox"} for item in objects):
        return False
    if not all(isinstance(item, dict) and set(item) >= {"subject", "predicate", "object"} for item in relations):
        return False
    ids = [item["id"] for item in objects]
    ends = [item[key] for item in relations for key in ("subject", "object")]
    numbers = [number for item in objects if isinstance(item["bbox"], list) for number in item["bbox"]]
    return (
        all(isinstance(end, str) and OBJECT_ID.fullmatch(end) for end in ids + ends)
        and all(isinstance(item["predicate"], str) for item in relations)
        and all(isinstance(item["bbox"], list) and len(item["bbox"]) == 4 for item in objects)
        and all(isinstance(number, int | float) and abs(number) <= 1e6 for number in numbers)
        and len(set(ids)) == len(ids)
    )


def test_the_format_is_what_a_plain_json_reader_takes():
    rng = random.Random(2)
    outcomes = []
    for _ in range(3000):
        scene = random_scene(rng, rng.randint(1, 3), rng.randint(0, 2))
        for _ in range(rng.choice((1, 1, 2))):
            start = rng.randrange(len(scene))
            scene = scene[:start] + rng.choice(PIECES) + scene[start + rng.randrange(2) :]
        outcomes.append(format_failure(around(scene)) is None)
        assert outcomes[-1] == is_scene_by_json(scene), scene
    assert 200 < sum(outcomes) < 2000


@pytest.mark.parametrize("kind", LONG)
def test_a_long_response_costs_bounded_work(kind, monkeypatch):
    row = random_input(random.Random(11), (8, 8))
    assert row.ground_truth.count("predicate") == 6  # so that the relation term runs
    inputs = [RewardInput(LONG[kind], row.ground_truth, row.problem)]
    REWARDS["spatial_sgg"]([row], relation_weight=0.3)
    for name in TEXT_REWARDS:
        reward = REWARDS[name]
        for kwargs in ({}, {"relation_weight": 0.3}) if name == "spatial_sgg" else ({},):
            label_vectors()._rows.clear()  # as for labels never seen before
            counts = count_work(monkeypatch, lambda reward=reward, kwargs=kwargs: reward(inputs, **kwargs))
            assert not {work: number for work, number in counts.items() if number > MOST_WORK[work]}

"""Nothing that a model writes makes a reward raise, leave [0, 1], depend on its neighbours, or work without bound."""

import json
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import optimize

import spatialthinker
from spatialthinker import matching, scene_graph
from spatialthinker.matching import label_vectors
from spatialthinker.rewards import REWARDS, RewardInput, equality, format_failure
from spatialthinker.rewards.bench import random_input, random_scene
from tests.support.hostile_responses import hostile_input, hostile_response

PACKAGE = spatialthinker.__path__[0]
BATCH = 25
DEFAULT_CASES, NIGHTLY_CASES = 5_000, 200_000
ABLATION = dict(format_gate=False, accuracy_gate=False, relation_weight=0.3, strict_boxes=False, overlap="giou")


def check(inputs, rng):
    for name, reward in REWARDS.items():
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


def fill(unit, size=65_536):
    return (unit * (size // len(unit) + 1))[:size]


def around(scene, answer="(B) left of it"):
    return f"<observe></observe><scene>{scene}</scene><think></think><answer>{answer}</answer>"


def many(number, name):
    return json.dumps({"objects": [{"id": f"{name(i)}.{i}", "bbox": [i % 9, 1, 20, 9]} for i in range(number)]})


def word(number):
    return "".join(chr(97 + number // 26**k % 26) for k in range(3))


def many_relations(number, predicate):
    relations = [f'{{"subject":"a.1","predicate":"{predicate(i)}","object":"b.1"}}' for i in range(number)]
    return '{"relationships":[' + ",".join(relations) + "]}"


LONG = {
    **{
        f"only {unit!r}": fill(unit)
        for unit in (" ", "\n", "<", "< / > ", "9", "\0", "\ud800", "語", "[", '{"a":', "\\")
    },
    **{
        f"tags {unit!r}": fill(unit)
        for unit in ("<answer>", "</think>", "<answer>\n", "<answer></answer>", "<scene>{}")
    },
    "seams": "<observe>" + fill("</observe> ") + "</answer>",
    "answers": "<think>" + fill("</think> <answer>") + "</answer>",
    "boxes": "<think></think>" + fill("\\boxed{"),
    "braces": "<think></think>\\boxed{" + fill("{}"),
    "fractions": "<think></think><answer>" + fill("\\frac{1}{2}", 1000) + "</answer>",
    "wrappers": "<think></think><answer>" + fill("\\text{", 900) + fill("}", 100) + "</answer>",
    "digits": "<think></think><answer>" + fill("9", 60_000) + "</answer>",
    "blank answer": "<think></think><answer>1" + fill(" ", 1000) + "m</answer>",
    "deep scene": around(fill("[", 32_000)),
    "deeper scene": around(fill('{"a":', 32_000)),
    "long id": around(json.dumps({"objects": [{"id": "a" * 32_000 + ".1", "bbox": [1, 2, 3, 4]}]})),
    "huge integer": around('{"objects": [{"id": "a.1", "bbox": [1, 2, 3, ' + "9" * 30_000 + "]}]}"),
    "one label": around(many(600, lambda i: "cat")),
    "many labels": around(many(600, lambda i: "".join(chr(97 + i // 26**k % 26) for k in range(3)))),
    "special words": around(many(500, lambda i: "cant_im_" + chr(97 + i % 26) + chr(97 + i // 26))),
    "10,000 boxes": around(many(10_000, lambda i: "cat")),
    "same relations": around(many_relations(540, lambda i: "on")),
    "odd words": around(many_relations(185, lambda i: " ".join(f"{word(i * 37 + j)}'" for j in range(25)))),
    "few odd words": around(many_relations(480, lambda i: f"{word(2 * i)}' {word(2 * i + 1)}'")),
    "an odd word": around(many_relations(560, lambda i: f"'{word(i)}'")),
    "signs": around(many_relations(185, lambda i: "'" * 60 + word(i) + "'" * 60)),
    "plain words": around(many_relations(185, lambda i: " ".join(word(i * 37 + j) for j in range(30)))),
    "a long odd word": around(many_relations(1, lambda i: "\u8a9e" * 30_000)),
    "long words": around(many_relations(180, lambda i: chr(0x4E00 + i) * 120)),
}


MOST_WORK = {
    "decoded characters": 32_768,
    "compared characters": 512,
    "tokenized words": 600,
    "tokenized signs": 1_200,
    "longest tokenized word": 128,
    "looked-up tokens": 10_000,
    "similarities": 10_000,
    "assigned pairs": 10_000,
    "executed lines": 250_000,
}
"""Most of each kind that one response of 65,536 characters may cost."""


def count_work(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> Counter[str]:
    """Return how much of each kind of work a call does."""
    counts = Counter[str]()

    def count(owner: Any, name: str, measure: Callable[..., dict[str, int]]) -> None:
        function = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            result = None
            try:
                result = function(*args, **kwargs)
                return result
            finally:
                counts.update(measure(result, *args))

        patch.setattr(owner, name, counted)

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        counts["executed lines"] += event == "line"
        return trace

    solve = optimize.linear_sum_assignment

    def solve_counted(gain: Any, **kwargs: Any) -> Any:
        counts["assigned pairs"] += gain.size
        return solve(gain, **kwargs)

    def measure_word(_: object, __: object, word: str) -> dict[str, int]:
        counts["longest tokenized word"] = max(counts["longest tokenized word"], len(word))
        return {"tokenized words": 1, "tokenized signs": sum(not letter.isalpha() for letter in word)}

    with monkeypatch.context() as patch:
        patch.setattr(optimize, "linear_sum_assignment", solve_counted)
        count(matching, "label_similarity", lambda result, *_: {"similarities": result.size})
        count(matching.LabelVectors, "_split", measure_word)
        count(matching.LabelVectors, "_tokens", lambda result, *_: {"looked-up tokens": len(result)})
        count(equality, "_plain", lambda _, text: {"compared characters": len(text)})
        count(scene_graph, "_decode", lambda _, __, text: {"decoded characters": len(text)})
        sys.settrace(trace)
        try:
            work()
        finally:
            sys.settrace(None)
    return counts


@pytest.mark.parametrize("kind", LONG)
def test_a_long_response_costs_bounded_work(kind, monkeypatch):
    row = random_input(random.Random(11), (8, 8))
    assert row.ground_truth.count("predicate") == 6  # so that the relation term runs
    inputs = [RewardInput(LONG[kind], row.ground_truth, row.problem)]
    REWARDS["spatial_sgg"]([row], relation_weight=0.3)
    for name, reward in REWARDS.items():
        for kwargs in ({}, {"relation_weight": 0.3}) if name == "spatial_sgg" else ({},):
            label_vectors()._rows.clear()  # as for labels never seen before
            counts = count_work(monkeypatch, lambda reward=reward, kwargs=kwargs: reward(inputs, **kwargs))
            assert not {work: number for work, number in counts.items() if number > MOST_WORK[work]}

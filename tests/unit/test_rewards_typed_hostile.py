"""Nothing that a model writes makes a typed reward raise, leave [0, 1], depend on its neighbours, or work too long."""

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatialthinker.rewards import REWARDS, ROW_CHECKS, RewardInput
from spatialthinker.rewards.bench_typed import ROWS, typed_inputs
from spatialthinker.rewards.explain import EXPLANATIONS
from spatialthinker.rewards.gold import gold_response
from tests.support.hostile_responses import FRAGMENTS, NUMBERS, hostile_response, mutated
from tests.support.hostile_work import LONG, MOST_WORK, count_work

BATCH = 20
PIECES = (
    *FRAGMENTS,
    *NUMBERS,
    "<answer>",
    "[1, 2, 3, 4]",
    "(0.5, 0.5)",
    "(B)",
    " > ",
    ", ",
    "1/2",
    "-",
    "m",
    "left of",
    "(cat, left of, dog)",
    '[["cat", "left of", "dog"]]',
)


def hostile_answer(item: RewardInput, rng: random.Random) -> RewardInput:
    """Returns the item with its response cut, spliced and poisoned, or with another one."""
    kind = rng.random()
    text = item.response
    if kind < 0.2:
        text = hostile_response(rng)
    elif kind < 0.5:
        text = f"<think>t</think><answer>{''.join(rng.choices(PIECES, k=rng.randrange(1, 8)))}</answer>"
    for _ in range(rng.choice((0, 1, 2, 5))):
        start = text.rfind("<scene>" if "<scene>" in text and rng.random() < 0.5 else "<answer>")
        text = text[:start] + mutated(text[start:], rng)
    return replace(item, response=text)


def check(name, seed):
    rng = random.Random(seed)
    inputs = [hostile_answer(typed_inputs(name, rng, 1)[0], rng) for _ in range(BATCH)]
    results = REWARDS[name](inputs)
    for item, result in zip(inputs, results, strict=True):
        assert all(math.isfinite(value) and 0.0 <= value <= 1.0 for value in result.values()), (item, result)
        assert all(isinstance(line, str) for line in EXPLANATIONS[name](item))
    order = rng.sample(range(BATCH), BATCH)
    assert [results[i] for i in order] == REWARDS[name]([inputs[i] for i in order])
    assert [result for item in inputs for result in REWARDS[name]([item])] == results


@pytest.mark.parametrize("name", ROWS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**64 - 1))
def test_hostile_responses(name, seed):
    check(name, seed)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ROWS)
@settings(max_examples=2_000, deadline=None)
@given(seed=st.integers(0, 2**64 - 1))
def test_many_hostile_responses(name, seed):
    check(name, seed)


@pytest.mark.parametrize("kind", LONG)
def test_a_long_response_costs_bounded_work(kind, monkeypatch):
    for name in ROWS:
        row = typed_inputs(name, random.Random(11), 1)[0]
        for text in (LONG[kind], f"<answer>{LONG[kind]}</answer>"):
            item = replace(row, response=text)
            counts = count_work(monkeypatch, lambda name=name, item=item: REWARDS[name]([item]))
            assert not {work: number for work, number in counts.items() if number > MOST_WORK[work]}, name


@pytest.mark.parametrize("name", [name for name in ROWS if name != "follows_scene"])  # it has no ground truth
def test_the_gold_answer_scores_one_and_an_empty_one_nothing(name):
    rng = random.Random(5)
    for _ in range(50):
        row = typed_inputs(name, rng, 1)[0]
        if name in ROW_CHECKS:
            ROW_CHECKS[name](row.ground_truth, row.problem)
        gold = replace(row, response=gold_response(name, row.ground_truth), response_length=0)
        assert REWARDS[name]([gold])[0]["overall"] == pytest.approx(1.0)
        for text in ("", "<think>t</think><answer></answer>", "I do not know."):
            score = REWARDS[name]([replace(row, response=text, response_length=10_000)])[0]["overall"]
            assert score == 0.0

"""Prompts, the reading of replies, and the price of both."""

import json
import re

import pytest

from data_gen.curate.validation import read_choice_index
from data_gen.generate.estimate import (
    CACHE_SHARE,
    GRAPH_CHARS,
    REPAIR_SHARE,
    VG150_SHAPE,
    CallShape,
    describe,
    image_tokens,
    limits,
    plan_usage,
    released_cost_usd,
    ways,
)
from data_gen.generate.requests import Wish, make_request
from data_gen.questions.draft import Draft
from data_gen.questions.prompts import SYSTEM_PROMPT, ReplyFault, parse_reply
from data_gen.questions.quotas import LOOKBACK, Steering
from data_gen.scenes.scene import Scene
from spatialthinker.clients.prices import PRICES, Price, Usage, cost_usd, find_price
from spatialthinker.scene_graph import Relation, SceneObject


def test_replies_are_read_as_what_they_are():
    options = ("on", "under", "behind")
    texts = ('{"answer": "B"}', "The answer is B", "Based on the image, (C)", "I can't tell", "under", "")
    assert [read_choice_index(text, options) for text in texts] == [1, 1, 2, None, 1, None]
    values = {"question": "Where {a,b}?", "options": ["(A) on", "(B) in"], "answer": "(B)", "category": " Relation"}
    values |= {"level": "easy", "rating": 7, "evidence_ids": ["a.1"], "evidence_relations": []}
    wanted = Draft("relation", "easy", "Where {a,b}?", ("on", "in"), 1, 7, ("a.1",))
    for text in (json.dumps(values), f"Here {{it}} is:\n```json\n{json.dumps(values)}\n``` }}"):
        assert parse_reply(text) == wanted
    ratings = {"8/10": 8, "7": 7, "7.5": 7, "eight": 0, "0": 0, "11": 0}
    assert {r: parse_reply(json.dumps(values | {"rating": r})).rating for r in ratings} == ratings
    for bad in ("none", json.dumps(values)[:-20], json.dumps({"question": "?"}), json.dumps(values | {"answer": "C"})):
        with pytest.raises(ReplyFault):
            parse_reply(bad)


def test_the_static_part_comes_first_and_is_the_same_in_every_call():
    objects = tuple(SceneObject(f"object_{chr(97 + i)}.1", (10.0 * i, 20, 310, 480)) for i in range(12))
    relations = tuple(Relation(a.id, "to the left of", b.id) for a, b in zip(objects[:7], objects[1:8], strict=True))
    scene = Scene("1", b"", 800, 600, objects, relations)
    request = make_request(scene, Wish("depth", "easy", ("size",)), has_image=False, temperature=0.0)
    assert request.system == SYSTEM_PROMPT and not any(c in SYSTEM_PROMPT for c in "\t\b$\\")
    assert len(SYSTEM_PROMPT) / 4 > 1024
    assert 0.8 * VG150_SHAPE.changing < len(request.text) / GRAPH_CHARS < 1.3 * VG150_SHAPE.changing
    assert all(item.id in request.text for item in objects) and "800 x 600" in request.text


def test_prices_by_hand():
    price = Price(input=2, output=10, cache_read=0.5, cache_write=4)
    used = Usage(input=1_000_000, output=100_000, cache_read=2_000_000, cache_write=500_000)
    assert cost_usd(used, price) == pytest.approx(2 + 1 + 1 + 2)
    assert cost_usd(used, price, is_batch=True) == pytest.approx(3)
    shape = CallShape(static=1000, changing=100, image=50, output=20)
    assert plan_usage(shape, 100, 0.1, 0.9) == Usage(110 * 150 + 10 * 20, 2200, 99_000, 11_000)
    assert find_price("claude-sonnet-4-5-20250929") is PRICES["claude-sonnet-4-5"]
    assert find_price("gpt-4o-mini-2024") is PRICES["gpt-4o-mini"] and find_price("gpt-5") is None
    assert image_tokens(800, 600, "anthropic") == 640 and image_tokens(1024, 1024, "openai") == 765


def test_the_papers_run_costs_less_than_a_third_of_the_released_way():
    price = PRICES["claude-sonnet-4-5"]
    released = released_cost_usd(56_224, price)
    assert released == pytest.approx(235 * 3 + 5 * 15)
    usage, is_batch = ways(VG150_SHAPE, 56_224)["cache and batch"]
    assert is_batch and cost_usd(usage, price, is_batch) <= 0.3 * released
    least_cached, most_repairs = limits(VG150_SHAPE, price)
    assert 0.7 < least_cached < 0.8 and 0.2 < most_repairs < 0.3
    for repairs, cached in ((REPAIR_SHARE, least_cached), (most_repairs, CACHE_SHARE)):
        at_limit = cost_usd(plan_usage(VG150_SHAPE, 56_224, repairs, cached), price, is_batch=True)
        assert at_limit == pytest.approx(0.3 * released, rel=1e-3)


def test_the_printed_sum_is_the_printed_price():
    price = PRICES["claude-sonnet-4-5"]
    text = describe(VG150_SHAPE, 56_224, "claude-sonnet-4-5")
    printed = re.search(r"cache and batch = \((.*)\) / 2", text)
    dollars = re.search(r"cache and batch +\S+ +\S+ +\S+ +(\S+)", text)
    assert printed is not None and dollars is not None
    total = sum(float(a) * float(b) for a, b in (part.split(" x ") for part in printed[1].split(" + "))) / 2
    assert total == pytest.approx(float(dollars[1]), rel=0.005) and "90% of calls" in text
    assert price.cache_read == 0.3 and price.cache_write == 3.75


def test_steering_takes_outcomes_in_place_of_wishes():
    steering = Steering(50)
    for _ in range(4):
        steering.add(("relation", "easy"))
    assert steering.next_categories()[0] != "relation"
    for _ in range(4):
        steering.settle(None)
    assert steering.next_categories()[0] == "relation" and steering.categories.counts.total() == 0
    assert LOOKBACK >= 512

"""The answer that the typed rewards read is the evaluation's, and ground truths are read whatever their type."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from spatialthinker.response import find_answer
from spatialthinker.rewards.answers import read_answer
from spatialthinker.rewards.truths import decode_truth, truth_text
from tests.support.hostile_responses import hostile_response

PIECES = (
    "<answer>", "</answer>", "<ANSWER>", "< / answer >", "<think>", "</think>", "</scene>", "[THINK]", "[/think]", "B",
    "5", " ", "\n", "\u200b", "＜", "<|im_end|>", "</s>", "<|channel|>final<|message|>", "(B) left", "\uff1c/answer＞",
)  # fmt: skip


def test_the_shortcut_reads_what_the_evaluation_reads():
    rng = random.Random(3)
    texts = ["".join(rng.choices(PIECES, k=rng.randrange(9))) for _ in range(20_000)]
    texts += [
        text + end for text in texts[:5000] for end in ("<answer>5</answer>", "</think>\n<answer> 5\n</answer> ")
    ]
    texts += [hostile_response(rng) for _ in range(1000)]
    assert all(read_answer(text) == (find_answer(text) or "") for text in texts)


def test_the_shortcut_reads_recorded_answers_alike():
    rows = map(json.loads, (Path(__file__).parents[1] / "support" / "careful_answers.jsonl").open())
    for text in (row["text"] for row in rows):
        for response in (text, f"<answer>{text}</answer>", f"<think>A or B</think>\n<answer>\n{text}\n</answer>\n"):
            assert read_answer(response) == (find_answer(response) or "")


def test_an_answer_is_the_pair_of_tags_or_what_stands_outside_the_thinking():
    assert read_answer("<think>2 or 3</think>\n<answer> 3 m </answer>") == "3 m"
    assert read_answer("<think>2 or 3</think> It is 3 m.") == "It is 3 m."
    assert read_answer("3 m") == "3 m"
    assert read_answer("<think>3 m") == read_answer("") == read_answer("<answer></answer>") == ""


@pytest.mark.parametrize(
    ("truth", "text", "value"),
    [
        ("<scene>{}</scene>\n<answer>[1, 2]</answer>", "[1, 2]", [1, 2]),
        ("['left', 'right']", "['left', 'right']", ["left", "right"]),
        ({"bbox": [1, 2.5]}, '{"bbox":[1,2.5]}', {"bbox": [1, 2.5]}),
        (2.5, "2.5", 2.5),
        (np.array([[1, 0], [0, 1]]), "[[1,0],[0,1]]", [[1, 0], [0, 1]]),
        ({"value": np.float64(2.5)}, '{"value":2.5}', {"value": 2.5}),
    ],
)
def test_a_ground_truth_is_read_whatever_its_type(truth, text, value):
    assert truth_text(truth) == text
    assert decode_truth(text) == value


@pytest.mark.parametrize("truth", [object(), {1: {object()}}, lambda: 1, [b"\xff", object()]])
def test_a_ground_truth_of_no_form_is_named(truth):
    with pytest.raises(ValueError, match="the ground truth is no text, number, list or dictionary"):
        truth_text(truth)


@pytest.mark.parametrize("text", ["", "{", "left of", "__import__('os')", "[" * 100_000, "9" * 10_000, "\ud800"])
def test_a_text_that_holds_no_value_is_named(text):
    with pytest.raises(ValueError, match="the ground truth is no JSON"):
        decode_truth(text)

"""Recorded boxes are read whatever they hold, and relations are judged between the objects that were matched."""

import json

import pytest

from spatialthinker.rewards import format_failure
from spatialthinker.visualize import question_of, split_sections
from verl.viewer.scenes import compare_scenes, explain_failure, read_scenes

RECORD = {
    "predicted": [{"id": "cat.1", "box": [0, 0, 10, 10]}, {"id": "dog.1", "box": [20, 0, 30, 10]}],
    "reference": [{"id": "dog.2", "box": [20, 0, 30, 10]}, {"id": "cat.7", "box": [0, 0, 10, 20]}],
    "relations": [["cat.1", "left of", "dog.1"], ["dog.1", "left of", "cat.1"]],
    "reference_relations": [["cat.7", "left of", "dog.2"]],
    "matches": [{"predicted": 0, "reference": 1, "iou": 0.5, "label": 1.0}],
    "size": [100, 50],
}


def test_pairs_name_matched_missed_and_further_objects():
    assert read_scenes(json.dumps(RECORD)).pairs() == [
        {"predicted": "cat.1", "reference": "cat.7", "iou": 0.5, "label": 1.0},
        {"predicted": None, "reference": "dog.2"},
        {"predicted": "dog.1", "reference": None},
    ]


def test_a_relation_is_true_between_the_matched_objects_alone():
    matched = RECORD | {"matches": [*RECORD["matches"], {"predicted": 1, "reference": 0, "iou": 1.0, "label": 1.0}]}
    expected = [("cat.1 left of dog.1", True), ("dog.1 left of cat.1", False)]
    assert read_scenes(json.dumps(matched)).relations() == expected
    assert [is_true for _, is_true in read_scenes(json.dumps(RECORD)).relations()] == [False, False]


def test_boxes_are_laid_out_in_the_frame_of_the_record():
    layout = read_scenes(json.dumps(RECORD)).lay_out((999, 999), with_labels=True)
    assert layout is not None and (layout.width, layout.height) == (448, 224)
    assert ("cat.1", (0, 0, 44.8, 44.8), True) in [(n, tuple(round(x, 4) for x in b), p) for n, b, p in layout.boxes]
    assert read_scenes(None).lay_out(None, with_labels=True) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{",
        "[" * 100_000,
        '{"predicted": 3, "matches": 4, "size": [0, 0], "relations": "x"}',
        '{"predicted": [1, {"id": 2, "box": []}, {"id": "a.1", "box": [NaN, 1, 2, 3]}], "size": [1e99, 5]}',
        '{"predicted": [{"id": "a.1", "box": [1, 1, 2, 2]}], "matches": [{"predicted": 5, "reference": 0}, null]}',
        '{"size": ["a", "b"], "reference_relations": [[1, 2, 3], [1]]}',
    ],
)
def test_a_record_that_is_broken_is_read_as_far_as_it_goes(text):
    scenes = read_scenes(text)
    assert scenes.matches == [] and scenes.size is None
    scenes.lay_out((10, 10), with_labels=True)
    scenes.pairs(), scenes.relations()


def test_scenes_of_texts_are_matched_as_the_reward_matches_them():
    scene = '{"objects": [{"id": "cat.1", "bbox": [0, 0, 10, 10]}], "relationships": []}'
    true = '{"objects": [{"id": "cat.1", "bbox": [0, 0, 10, 20]}], "relationships": []}'
    scenes = compare_scenes(f"<scene>{scene}</scene>", f"<scene>{true}</scene>", "Image size: (50 x 40)")
    assert scenes.matches == [{"predicted": 0, "reference": 0, "iou": pytest.approx(0.5), "label": 1.0}]
    assert scenes.size == (50, 40)
    assert compare_scenes("no scene", "none either", "no size").matches == []


@pytest.mark.parametrize(
    ("response", "part"),
    [
        ("nothing", "no closed section <observe>"),
        ("<observe>a</observe><scene>{</scene><think>b</think><answer>c</answer>", "no JSON"),
        (
            '<observe>a</observe><scene>{"objects": [{"id": "cat", "bbox": [1,2,3,4]}]}</scene><think>b</think>'
            "<answer>c</answer>",
            "an id is not letters",
        ),
        (
            '<observe>a</observe><scene>{"objects": [{"id": "cat.1", "bbox": [1,2,3]}]}</scene><think>b</think>'
            "<answer>c</answer>",
            "$.objects[0].bbox",
        ),
    ],
)
def test_a_failure_is_explained_with_its_place(response, part):
    assert part in (explain_failure(format_failure(response), response) or "")


def test_no_failure_needs_no_words_and_an_unknown_one_is_itself():
    assert explain_failure(None, "") is None
    assert explain_failure("new_reason", "") == "new_reason"


def test_sections_joined_are_the_text():
    text = "before <think>a <scene>b</scene></think> between <answer>c</answer><observe>never closed"
    pieces = split_sections(text)
    assert "".join(piece for _, piece in pieces) == text
    assert [name for name, _ in pieces] == ["", "think", "", "answer", ""]
    assert split_sections("") == []


def test_the_question_stands_behind_the_instructions():
    assert question_of("Do this.\nQ. Where?\nOptions:\n(A) here") == "Where?\nOptions:\n(A) here"
    assert question_of("Where?") == "Where?"

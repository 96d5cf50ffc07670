"""Descriptions of responses where spaCy is not installed."""

import json

import pytest

from spatialthinker import matching
from spatialthinker.rewards.describe import describe

SCENE = '{"objects": [{"id": "cup.1", "bbox": [10, 10, 20, 20]}], "relationships": []}'
TEXT = f"<observe>o</observe><scene>{SCENE}</scene><think>t</think><answer>(A) yes</answer>"
PROBLEM = "Is it?\nImage size: (40 x 40)"


@pytest.mark.parametrize(("is_installed", "matches"), [(True, 1), (False, 0)])
def test_only_matches_need_spacy(monkeypatch, is_installed, matches):
    """A reward that compares no labels runs without it; those that do say how it is installed."""
    if not is_installed:
        matching.label_vectors.cache_clear()
        monkeypatch.setattr(matching, "find_spec", lambda _: None)
    [found] = describe("r1v_scene", [(TEXT, f"<scene>{SCENE}</scene><answer>(A) yes</answer>", PROBLEM)])
    boxes = json.loads(found["boxes"])
    assert len(boxes["matches"]) == matches
    assert boxes["predicted"] == boxes["reference"] == [{"id": "cup.1", "box": [10, 10, 20, 20]}]
    assert found["answer"] == "(A) yes"
    assert found["iou_mean"] == (1.0 if matches else None)

"""Descriptions of responses with spaCy and without it, in a recorder's process and in the viewer."""

import json
from types import SimpleNamespace

import pytest

from spatialthinker import matching
from spatialthinker.rewards.describe import describe
from verl.config.loading import load_config
from verl.trainer.rewards import build_recorder
from verl.viewer.scenes import compare_scenes

SCENE = '{"objects": [{"id": "cup.1", "bbox": [10, 10, 20, 20]}], "relationships": []}'
TEXT = f"<observe>o</observe><scene>{SCENE}</scene><think>t</think><answer>(A) yes</answer>"
ITEM = (TEXT, f"<scene>{SCENE}</scene><answer>(A) yes</answer>", "Is it?\nImage size: (40 x 40)")


def check(found: dict, num_matches: int) -> None:
    boxes = json.loads(found["boxes"])
    assert len(boxes["matches"]) == num_matches
    assert boxes["predicted"] == boxes["reference"] == [{"id": "cup.1", "box": [10, 10, 20, 20]}]
    assert found["answer"] == "(A) yes"
    assert found["iou_mean"] == (1.0 if num_matches else None)


def test_boxes_of_a_response_are_matched():
    check(describe("r1v_scene", [ITEM])[0], 1)
    assert len(compare_scenes(*ITEM).matches) == 1


def test_a_recorder_needs_no_spacy(tmp_path, monkeypatch):
    """A reward that compares no labels trains without it; the recorder's process looks for packages where tests do."""
    (tmp_path / "spacy.py").write_text("raise ModuleNotFoundError('No module named spacy')")
    monkeypatch.syspath_prepend(tmp_path)
    files = ["data.train_files=owner/name", "data.val_files=owner/name"]
    config = load_config(
        [*files, "worker.reward.score_function=r1v_scene", f"trainer.save_checkpoint_path={tmp_path}"]
    )
    recorder = build_recorder(config, SimpleNamespace(sets=[]), SimpleNamespace(sets=[]))
    try:
        [found] = recorder.background(recorder.describe, [ITEM])
    finally:
        recorder.close()
    check(found, 0)


def test_what_is_missing_for_matches_is_said_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(matching, "find_spec", lambda _: None)
    matching.label_vectors.cache_clear()
    with pytest.warns(UserWarning, match="without matched boxes: .* pip install spacy"):
        assert not matching.can_match.__wrapped__()


def test_the_viewer_shows_boxes_without_spacy(monkeypatch):
    monkeypatch.setattr(matching, "can_match", lambda: False)
    scenes = compare_scenes(*ITEM)
    assert scenes.matches == []
    assert len(scenes.predicted.objects) == len(scenes.reference.objects) == 1

"""A reward file in each of its forms: what it gets, and what is said of what it returns."""

import io
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from verl.reward import FileReward, RewardError, functions, items, scoring
from verl.reward.items import ScoringGroup


@pytest.fixture
def score(monkeypatch, tmp_path):
    """Scores groups by a function of a file's text, in this process, whose modules are left as they were."""

    def run(text: str, *groups: ScoringGroup, name: str = "main", **kwargs: Any) -> list[dict[str, float]]:
        path = tmp_path / "my_own_reward.py"
        path.write_text(text)
        monkeypatch.setattr(functions, "_modules", {})
        monkeypatch.setattr("sys.path", list(sys.path))
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
        monkeypatch.setattr(scoring, "_child", {"functions": {"": FileReward(str(path), name, kwargs)}})
        return scoring.score_groups(groups)[1]

    return run


def group(*responses: str, **fields: Any) -> ScoringGroup:
    return ScoringGroup(responses, **({"problem": "Which?", "ground_truth": 5, "uid": "7"} | fields))


def png(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (2, 3), color).save(file, "PNG")
    return file.getvalue()


def test_an_item_holds_the_row_its_images_its_group_and_the_step(score):
    text = """
def main(items):
    scores = []
    for item in items:
        assert item["ground_truth"] == {"box": [1, 2]} and item["row"]["mask"] == b"x" and item["level"] == 3
        assert item["problem"] == "Which?" and item["row"]["problem"] == "raw"
        assert item["images"][0].getpixel((0, 0)) == (255, 0, 0) and len(item["images"]) == 1
        others = [text for number, text in enumerate(item["group"]) if number != item["sample"]]
        cut = item["stop_reason"] == "length"
        scores.append({"overall": float(others == ["b"]), "step": item["step"], "cut": cut})
    return scores
"""
    columns = {"mask": b"x", "level": 3, "problem": "raw"}
    more = {"ground_truth": {"box": [1, 2]}, "columns": columns, "images": [png("red")], "step": 4}
    assert score(text, group("a", "b", **more)) == [
        {"overall": 1.0, "step": 4.0, "cut": 0.0},
        {"overall": 0.0, "step": 4.0, "cut": 0.0},
    ]


def test_an_image_is_decoded_when_it_is_asked_for_and_once_for_its_group(monkeypatch):
    decoded = []
    monkeypatch.setattr(items, "load_image", lambda data: decoded.append(data) or len(decoded))
    first, second = group("a", "b", images=[b"one", b"two"]).make_items(["a", "b"], ())
    assert len(first["images"]) == 2 and decoded == []
    assert (first["images"][1], second["images"][1], second["images"][-1]) == (1, 1, 1)
    assert decoded == [b"two"]
    assert list(second["images"]) == first["images"][:] == [2, 1] and decoded == [b"two", b"one"]


def test_a_response_was_cut_if_it_is_as_long_as_it_may_be_and_does_not_end():
    responses = [[5, 6, 7], [5, 6, 2], [5, 6]]
    for longest, reasons in ((3, ["length", "stop", "stop"]), (0, ["stop"] * 3)):
        made = ScoringGroup(responses, "p", "g", "7", max_length=longest).make_items(["a", "b", "c"], (2,))
        assert [item["stop_reason"] for item in made] == reasons
        assert [item["response_length"] for item in made] == [3, 3, 2]


TRL = """
def plain(completions, ground_truth, **kwargs):
    return [1.0 if text == str(truth) else 0.0 for text, truth in zip(completions, ground_truth)]
def full(prompts, completions, completion_ids, level, trainer_state, log_metric=None, log_extra=None, weight=1):
    log_extra("seen", completions)
    log_metric("mean_level", sum(level) / len(level))
    assert prompts == ["Which?"] * len(completions) and completion_ids == [[]] * len(completions)
    return [weight * (number + trainer_state.global_step) for number in level]
def tensors(completions, **kwargs):
    import torch
    return torch.arange(len(completions)).float()
def needs(completions, solution): return [0.0] * len(completions)
def may_need(completions, solution=None): return [float(solution is None)] * len(completions)
"""


def test_a_function_of_trls_form_gets_the_columns_as_keywords(score):
    rows = (group("5", "6", columns={"level": 2}), group("5", columns={"level": 5}, uid="8"))
    assert [value["overall"] for value in score(TRL, *rows, name="plain")] == [1.0, 0.0, 1.0]
    found = score(TRL, group("a", "b", columns={"level": 2}, step=4), name="full", weight=10)
    assert found == [{"overall": 60.0, "mean_level": 2.0}] * 2
    assert [value["overall"] for value in score(TRL, group("a", "b"), name="tensors")] == [0.0, 1.0]
    assert score(TRL, group("a"), name="may_need") == [{"overall": 1.0}]


def test_a_column_that_a_function_takes_and_a_row_lacks_is_named(score):
    with pytest.raises(RewardError, match="row 7 has no column 'solution', which .*:needs takes; its columns: level"):
        score(TRL, group("a", columns={"level": 1}), name="needs")
    rows = (group("a", columns={"solution": "x"}, uid="6"), group("a", columns={"level": 1}))
    with pytest.raises(RewardError, match="row 7 has no column 'solution'"):
        score(TRL, *rows, name="needs")


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ("None", "returned None instead of a list of dicts, one for each response, for row 7"),
        ("[None, 1.0]", "row 7: the reward function returned None as 'overall', which must be a finite number"),
        ("[float('nan'), 1.0]", "row 7: the reward function returned nan as 'overall'"),
        ("[1.0]", "returned 1 scores for 2 responses .*; the first without one is of row 7"),
        ("[1.0] * 3", "returned 3 scores for 2 responses"),
        ("__import__('torch').zeros(2, 2)", "(?s)returned tensor.* instead of a list"),
        ("[__import__('torch').zeros(2), 1.0]", r"row 7: the reward function returned tensor\(\[0., 0.\]\)"),
    ],
)
def test_what_is_no_list_of_numbers_is_named_in_one_message_with_the_row(score, returned, words):
    with pytest.raises(RewardError, match=words):
        score(f"def main(completions, **kwargs): return {returned}", group("a", "b"))


def test_a_class_of_the_file_can_be_pickled(score):
    text = """
from __future__ import annotations
import pickle
from dataclasses import dataclass
@dataclass
class Part:
    weight: float
def main(items):
    return [{"overall": pickle.loads(pickle.dumps(Part(0.5))).weight} for _ in items]
"""
    assert score(text, group("a")) == [{"overall": 0.5}]
    assert "my_own_reward" in sys.modules  # the name by which another process finds it too


def test_a_group_can_be_sent_to_a_scoring_process():
    sent = group("a", columns={"x": [1, {"y": b"z"}]}, images=[png("red")])
    assert pickle.loads(pickle.dumps(sent)) == sent


def test_the_functions_of_other_trainers_in_this_project_keep_their_form(monkeypatch):
    """easyr1_score of spatialthinker/rewards/adapters.py, by its file."""
    path = Path(__file__).parents[2] / "spatialthinker" / "rewards" / "adapters.py"
    monkeypatch.setattr(functions, "_modules", {})
    monkeypatch.setattr("sys.path", list(sys.path))
    reward = FileReward(str(path), "easyr1_score", {"reward": "math"})
    monkeypatch.setattr(scoring, "_child", {"functions": {"": reward}})
    (score,) = scoring.score_groups([group("\\boxed{5}", ground_truth="5")])[1]
    assert score["accuracy"] == 1.0

"""A response that earns the full reward, made of the ground truth alone."""

from collections.abc import Callable
from typing import Any

from spatialthinker.response import section
from spatialthinker.rewards.boxes import gold_boxes
from spatialthinker.rewards.choice import gold_choice
from spatialthinker.rewards.numeric import gold_number
from spatialthinker.rewards.ordering import gold_order
from spatialthinker.rewards.points import gold_point
from spatialthinker.rewards.relations import gold_relations

_THOUGHT = "The ground truth says so."
_ANSWERS: dict[str, Callable[[Any], str]] = {
    "numbers": gold_number,
    "points": gold_point,
    "boxes": gold_boxes,
    "relations": gold_relations,
    "ordering": gold_order,
    "choice": gold_choice,
}
"""Reward of typed ground truths -> the answer that is right."""


def gold_response(reward: str, ground_truth: Any) -> str:
    """The ground truth in the format that a reward of `REWARDS` requires; as text for any other name."""
    think = f"<think>{_THOUGHT}</think>\n"
    if reward in _ANSWERS:
        return f"{think}<answer>{_ANSWERS[reward](ground_truth)}</answer>"
    text = str(ground_truth)
    answer = (section(text, "answer") or text).strip()
    scene = section(text, "scene") or "{}"
    forms: dict[str, str] = {
        "spatial_sgg": f"<observe>{_THOUGHT}</observe>\n<scene>{scene}</scene>\n{think}<answer>{answer}</answer>",
        "r1v": f"{think}<answer>{answer}</answer>",
        "math": f"{think}\\boxed{{{answer}}}",
    }
    forms["follows_scene"] = forms["spatial_sgg"]
    forms["r1v_scene"] = forms["spatial_sgg"]
    return forms.get(reward, text)

"""Reward of boxes: one thing found, or all things of a kind.

    iou     = sum of the IoU of matched pairs / max(predicted, true)
    f1      = 2 TP / (predicted + true), TP = matched pairs with IoU >= iou_threshold
    overall = (1 - f1_weight) * iou + f1_weight * f1

Pairs are matched one to one by the Hungarian method for the largest sum of IoU. Sources: IoU as a reward,
https://arxiv.org/abs/2503.01785, section on detection rewards; one-to-one matching divided by the larger number,
https://arxiv.org/abs/2505.12081; why surplus boxes must cost, https://arxiv.org/abs/2504.07615, on reward hacking.
"""

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from spatialthinker.geometry import Box
from spatialthinker.rewards.answers import read_answer
from spatialthinker.rewards.coordinates import (
    BOX_KEYS,
    LabelledBox,
    TrueBoxes,
    check_frame,
    read_boxes,
    stated_size,
    to_pixels,
    true_boxes,
)
from spatialthinker.rewards.record import RewardInput
from spatialthinker.rewards.truths import truth_text

F1_WEIGHT = 0.5
IOU_THRESHOLD = 0.5
MAX_MATCHED = 100
"""Boxes of a response that are matched; the others count as surplus."""
_NOTHING = ("[]", "none", "null", "no box", "no object", "no such object", "nothing")


class _Score(NamedTuple):
    iou: float
    f1: float
    pairs: list[tuple[int, int, float]]
    """Index of the true and of the predicted box, and their IoU."""


def boxes(
    inputs: Sequence[RewardInput],
    *,
    f1_weight: float = F1_WEIGHT,
    iou_threshold: float = IOU_THRESHOLD,
    frame: str = "pixels",
) -> list[dict[str, float]]:
    """Returns overall, iou and f1 of each response's boxes, 0 for none that can be read.

    The ground truth is [x1, y1, x2, y2] or {"bbox": [...], "label": "cat"}, a list of these, [] for nothing to be
    found ("none" or [] is then right), or a scene. Boxes that both have a label match only where it is the same.
    `frame` is that of the responses: pixels (or fractions), or thousandths of the image's sides.
    """
    check_frame(frame)
    results = []
    for item in inputs:
        score = _score(item, iou_threshold, frame)
        overall = (1.0 - f1_weight) * score.iou + f1_weight * score.f1
        results.append({"overall": overall, "iou": score.iou, "f1": score.f1})
    return results


def check_boxes(ground_truth: Any, problem: str = "") -> None:
    """Raises ValueError for a ground truth that states no boxes."""
    _truth(truth_text(ground_truth), stated_size(problem))


def gold_boxes(ground_truth: Any) -> str:
    """Returns the answer that states the true boxes, with their labels where they have some."""
    found = true_boxes(truth_text(ground_truth)).boxes
    return json.dumps([{BOX_KEYS[0]: list(box)} | ({"label": label} if label else {}) for box, label in found])


def explain_boxes(item: RewardInput) -> Iterator[str]:
    """Yields a line on each true box and its match."""
    truth, found = _boxes(item, "pixels")
    yield f"boxes:    {len(found)}, true {len(truth)}"
    matched = {true: (predicted, overlap) for true, predicted, overlap in _match(truth, found, IOU_THRESHOLD).pairs}
    for i, (box, label) in enumerate(truth):
        name = f"{label} {_shown(box)}".strip()
        if i in matched:
            yield f"  {name} <- {_shown(found[matched[i][0]].box)}: IoU {matched[i][1]:.3f}"
        else:
            yield f"  {name} <- nothing"


def _shown(box: Box) -> str:
    return "[" + ", ".join(f"{value:g}" for value in box) + "]"


def _score(item: RewardInput, threshold: float, frame: str) -> _Score:
    truth, found = _boxes(item, frame)
    if not truth:
        is_right = not found and read_answer(item.response).lower().strip(" .`") in _NOTHING
        return _Score(float(is_right), float(is_right), [])
    return _match(truth, found, threshold)


def _boxes(item: RewardInput, frame: str) -> tuple[list[LabelledBox], list[LabelledBox]]:
    """Returns the true boxes and those of the response, in pixels where the image's size is known."""
    truth = _truth(truth_text(item.ground_truth), stated_size(item.problem))
    return truth.boxes, _in_pixels(read_boxes(read_answer(item.response)), truth.size, frame)


def _in_pixels(found: list[LabelledBox], size: tuple[int, int] | None, frame: str = "pixels") -> list[LabelledBox]:
    rows = [box for box, _ in found]
    corners = to_pixels(rows, size, frame)
    if corners is rows:
        return found
    return [LabelledBox(Box(*box), label) for box, (_, label) in zip(corners, found, strict=True)]


@lru_cache(maxsize=2048)
def _truth(text: str, size: tuple[int, int] | None) -> TrueBoxes:
    found = true_boxes(text)
    size = found.size or size
    return TrueBoxes(_in_pixels(found.boxes, size), size)


def _match(truth: list[LabelledBox], found: list[LabelledBox], threshold: float) -> _Score:
    if not truth or not found:
        return _Score(0.0, 0.0, [])
    pairs = _overlaps(truth, found[:MAX_MATCHED])
    if len({i for i, _, _ in pairs}) < len(pairs) or len({j for _, j, _ in pairs}) < len(pairs):
        pairs = _assigned(pairs)
    num_right = sum(value >= threshold for _, _, value in pairs)
    total = sum(value for _, _, value in pairs)
    return _Score(total / max(len(truth), len(found)), 2 * num_right / (len(truth) + len(found)), pairs)


def _assigned(pairs: list[tuple[int, int, float]]) -> list[tuple[int, int, float]]:
    """Returns the one-to-one part of some pairs that has the largest sum."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = ({index: k for k, index in enumerate(sorted({pair[end] for pair in pairs}))} for end in (0, 1))
    overlap = np.zeros((len(rows), len(columns)))
    by_place = {}
    for pair in pairs:
        overlap[rows[pair[0]], columns[pair[1]]] = pair[2]
        by_place[rows[pair[0]], columns[pair[1]]] = pair
    places = zip(*(side.tolist() for side in linear_sum_assignment(overlap, maximize=True)), strict=True)
    return [by_place[place] for place in places if place in by_place]


def _overlaps(truth: list[LabelledBox], found: list[LabelledBox]) -> list[tuple[int, int, float]]:
    """Returns the pairs of boxes that overlap, with their IoU, which has no term that keeps it from 1 or from 1/2."""
    pairs = []
    for i, ((x1, y1, x2, y2), name) in enumerate(truth):
        for j, ((u1, v1, u2, v2), label) in enumerate(found):
            if u1 >= x2 or u2 <= x1 or v1 >= y2 or v2 <= y1 or u1 >= u2 or v1 >= v2:
                continue
            if name and label and name != label:
                continue
            shared = (min(x2, u2) - max(x1, u1)) * (min(y2, v2) - max(y1, v1))
            union = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - shared
            if union > 0:  # areas of sides below 1e-154 are 0
                pairs.append((i, j, min(1.0, shared / union)))
    return pairs

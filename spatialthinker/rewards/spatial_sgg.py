"""The dense spatial reward: format, counts, answer and boxes of a scene graph, gated in this order.

    overall = [format] * (0.1 format + 0.2 count + 0.5 accuracy + 0.2 [accuracy] spatial)

Source: SpatialThinker, https://arxiv.org/abs/2511.07403, method section on the reward; where text and released
code differ, the released code decides.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from spatialthinker.geometry import OVERLAPS
from spatialthinker.matching import assign, label_similarity
from spatialthinker.response import SECTIONS, section
from spatialthinker.rewards.accuracy import is_same_text
from spatialthinker.rewards.record import RewardInput
from spatialthinker.scene_graph import SceneFormatError, SceneGraph, label_of, load_scene

FORMAT_WEIGHT = 0.1
COUNT_WEIGHT = 0.2
ACCURACY_WEIGHT = 0.5
SPATIAL_WEIGHT = 0.2
"""The four weights of the paper's reward."""

OBJECT_COUNT_WEIGHT = 0.7
RELATION_COUNT_WEIGHT = 0.3
"""Shares of objects and relations in the count term, the best of the paper's ablation."""

LABEL_COST = 2.0
OVERLAP_COST = 1.0
"""Weights of label and box in the matching cost."""

TRIPLE_WEIGHTS = (0.3, 0.4, 0.3)
"""Weights of subject, predicate and object in the similarity of two relations (released code)."""

_IMAGE_SIZE = re.compile(r"Image size: \((\d+) x (\d+)\)")


class _Truth(NamedTuple):
    """A row's ground truth, parsed once for all responses to it."""

    scene: SceneGraph
    answer: str


def check_ground_truth(ground_truth: str, problem: str) -> None:
    """Raises ValueError when the spatial reward cannot score against this row; called when data are loaded."""
    _truth(ground_truth)
    _image_size(problem)


@lru_cache(maxsize=8192)
def _truth(ground_truth: str) -> _Truth:
    try:
        scene = load_scene(section(ground_truth, "scene"), is_reference=True)
    except SceneFormatError as error:
        raise ValueError(f"the scene of the ground truth cannot be read ({error}): {ground_truth[:200]!r}") from None
    answer = (section(ground_truth, "answer") or "").strip()
    if not answer:
        raise ValueError(f"the ground truth has no text in <answer> tags: {ground_truth[-200:]!r}")
    return _Truth(scene, answer)


def _image_size(problem: str) -> tuple[int, int]:
    match = _IMAGE_SIZE.search(problem)
    if match is None or not int(match[1]) or not int(match[2]):
        raise ValueError(f"the problem has no line 'Image size: (W x H)' with W, H > 0: {problem[:200]!r}")
    return int(match[1]), int(match[2])


def format_failure(response: str) -> str | None:
    """Returns why a response fails the format, as a short name for a metric, or None when it holds.

    missing_<tag>, repeated_<tag>, scene_too_long, scene_not_json, scene_not_object, objects_not_list, bad_object,
    bad_id, duplicate_id, bad_box, bad_number, relationships_not_list, bad_relation.
    """
    scene = _formatted_scene(response)
    return scene if isinstance(scene, str) else None


def _formatted_scene(response: str) -> SceneGraph | str:
    """Returns the scene of a response in the right format, else the reason of its failure."""
    for tag in SECTIONS:
        if section(response, tag) is None:
            return f"missing_{tag}"
    for tag in SECTIONS:
        if response.count(f"<{tag}>") != 1:
            return f"repeated_{tag}"
    try:
        return load_scene(section(response, "scene"))
    except SceneFormatError as error:
        return error.reason


def spatial_sgg(
    inputs: Sequence[RewardInput],
    *,
    format_weight: float = FORMAT_WEIGHT,
    count_weight: float = COUNT_WEIGHT,
    accuracy_weight: float = ACCURACY_WEIGHT,
    spatial_weight: float = SPATIAL_WEIGHT,
    object_count_weight: float = OBJECT_COUNT_WEIGHT,
    relation_count_weight: float = RELATION_COUNT_WEIGHT,
    overlap: str = "ciou",
    strict_boxes: bool = True,
) -> list[dict[str, float]]:
    """Returns overall, format, count, accuracy and spatial_score of each response."""
    results = []
    for item in inputs:
        truth = _truth(item.ground_truth)
        scene = _formatted_scene(item.response)
        if isinstance(scene, str):
            results.append(dict.fromkeys(("overall", "format", "count", "accuracy", "spatial_score"), 0.0))
            continue
        count = _count_score(scene, truth.scene, object_count_weight, relation_count_weight)
        accuracy = float(is_same_text(section(item.response, "answer"), truth.answer))
        spatial = (
            _spatial_score(scene, truth.scene, _image_size(item.problem), overlap, strict_boxes) if accuracy else 0.0
        )
        overall = format_weight + count_weight * count + accuracy_weight * accuracy + spatial_weight * spatial
        results.append(
            {"overall": overall, "format": 1.0, "count": count, "accuracy": accuracy, "spatial_score": spatial}
        )
    return results


def _count_score(scene: SceneGraph, truth: SceneGraph, object_weight: float, relation_weight: float) -> float:
    if not scene.has_objects_key:
        return 0.0
    objects = _closeness(len(scene.ids), len(truth.ids))
    if not truth.triples:
        return objects
    return object_weight * objects + relation_weight * _closeness(len(scene.triples), len(truth.triples))


def _closeness(predicted: int, true: int) -> float:
    """Returns max(0, 1 - |predicted - true| / max(true, 1))."""
    return max(0.0, 1.0 - abs(predicted - true) / max(true, 1))


def _spatial_score(
    scene: SceneGraph, truth: SceneGraph, size: tuple[int, int], overlap: str, strict_boxes: bool
) -> float:
    if not truth.ids:
        return float(bool(truth.triples) or not scene.ids)
    if not scene.ids:
        return 0.0
    unit = np.array([*size, *size], dtype=np.float64)
    true_boxes = np.array(truth.boxes, dtype=np.float64) / unit
    boxes = np.array(scene.boxes, dtype=np.float64) / unit
    overlaps = OVERLAPS[overlap](true_boxes[:, None], boxes[None])
    if strict_boxes:
        overlaps[:, (boxes[:, 0] >= boxes[:, 2]) | (boxes[:, 1] >= boxes[:, 3])] = 0.0
    similarity = label_similarity([label_of(i) for i in truth.ids], [label_of(i) for i in scene.ids])
    rows, columns = assign(LABEL_COST * (1.0 - similarity) + OVERLAP_COST * (1.0 - overlaps))
    return float(np.clip(overlaps[rows, columns].sum() / len(truth.ids), 0.0, 1.0))

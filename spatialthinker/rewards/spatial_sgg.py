"""The dense spatial reward: format, counts, answer and boxes of a scene graph, gated in this order.

    overall = [format] * (0.1 format + 0.2 count + 0.5 accuracy + 0.2 [accuracy] spatial)

Source: SpatialThinker, https://arxiv.org/abs/2511.07403, method section on the reward; where text and released
code differ, the released code decides.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from spatialthinker.matching import LABEL_COST, OVERLAP_COST, Matches, match_objects, match_relations
from spatialthinker.prompts import parse_image_size
from spatialthinker.response import SECTIONS, Response, parse_response, section
from spatialthinker.rewards.accuracy import is_same_text
from spatialthinker.rewards.record import RewardInput
from spatialthinker.scene_graph import MAX_COORDINATE_PX, SceneFormatError, SceneGraph, load_scene

FORMAT_WEIGHT = 0.1
COUNT_WEIGHT = 0.2
ACCURACY_WEIGHT = 0.5
SPATIAL_WEIGHT = 0.2
"""The four weights of the paper's reward."""

OBJECT_COUNT_WEIGHT = 0.7
RELATION_COUNT_WEIGHT = 0.3
"""Shares of objects and relations in the count term, the best of the paper's ablation."""

RELATION_WEIGHT = 0.0
"""Share of the relation similarity in the spatial term; the released code computes it without effect."""


class _Truth(NamedTuple):
    """A row's ground truth, parsed once for all responses to it."""

    scene: SceneGraph
    answer: str


def check_ground_truth(ground_truth: str, problem: str) -> None:
    """Raises ValueError when the spatial reward cannot score against this row; called when data are loaded."""
    _truth(ground_truth)
    _image_size(problem)


def doubt_frame(ground_truth: str, problem: str, image_size: tuple[int, int]) -> str | None:
    """A warning where the boxes of a row may lie in another frame than its image; None if they fit.

    A reward over boxes in the wrong frame stays near 0, and nothing else shows it.
    """
    stated = _image_size(problem)
    if stated != image_size:
        return (
            f"the prompt states an image of {stated[0]} x {stated[1]} pixels, and the image has {image_size[0]} x "
            f"{image_size[1]}: boxes are read in the stated frame; give both the same size"
        )
    for item in _truth(ground_truth).scene.objects:
        left, top, right, bottom = item.bbox
        if min(left, top) < 0 or right > stated[0] or bottom > stated[1]:
            corners = ", ".join(f"{corner:g}" for corner in item.bbox)
            return f"the box of {item.id}, [{corners}], leaves the image of {stated[0]} x {stated[1]} pixels"
    return None


@lru_cache(maxsize=2048)
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
    width, height = parse_image_size(problem)
    if not 0 < width <= MAX_COORDINATE_PX or not 0 < height <= MAX_COORDINATE_PX:
        raise ValueError(f"the problem states an image of {width} x {height} pixels")
    return width, height


def format_failure(response: str) -> str | None:
    """Returns why a response fails the format, as a short name for a metric, or None when it holds.

    missing_<tag>, repeated_<tag>, scene_too_long, scene_not_json, scene_not_object, objects_not_list, bad_object,
    bad_id, duplicate_id, bad_box, bad_number, relationships_not_list, bad_relation.
    """
    scene = _formatted_scene(response, parse_response(response))
    return scene if isinstance(scene, str) else None


def _formatted_scene(response: str, sections: Response) -> SceneGraph | str:
    """Returns the scene of a response in the right format, else the reason of its failure."""
    if None in sections:
        return f"missing_{SECTIONS[sections.index(None)]}"
    if response.count("<") > 2 * len(SECTIONS):
        for tag in SECTIONS:
            if response.count(f"<{tag}>") != 1:
                return f"repeated_{tag}"
    try:
        return load_scene(sections.scene_text)
    except SceneFormatError as error:
        return error.reason


class _Parsed(NamedTuple):
    """Parsed response: its scene, None unless the format is right, and the correctness of its answer."""

    scene: SceneGraph | None
    is_right: bool


def spatial_sgg(
    inputs: Sequence[RewardInput],
    *,
    format_weight: float = FORMAT_WEIGHT,
    count_weight: float = COUNT_WEIGHT,
    accuracy_weight: float = ACCURACY_WEIGHT,
    spatial_weight: float = SPATIAL_WEIGHT,
    object_count_weight: float = OBJECT_COUNT_WEIGHT,
    relation_count_weight: float = RELATION_COUNT_WEIGHT,
    relation_weight: float = RELATION_WEIGHT,
    format_gate: bool = True,
    accuracy_gate: bool = True,
    label_cost: float = LABEL_COST,
    overlap_cost: float = OVERLAP_COST,
    overlap: str = "ciou",
    matching_overlap: str | None = None,
    strict_boxes: bool = True,
) -> list[dict[str, float]]:
    """Returns overall, format, count, accuracy and spatial_score of each response.

    format: `format_failure` finds nothing. count: object_count_weight * closeness of the numbers of objects
    + relation_count_weight * closeness of the numbers of relations, the former alone where the ground truth has no
    relations; closeness = max(0, 1 - |predicted - true| / max(true, 1)). accuracy: `is_same_text`. spatial: mean over
    the true objects of the overlap with their match, 0 for an unmatched one (see matching.match_objects), mixed
    with the relations' mean similarity by `relation_weight`.

    format_gate: without the format every term is 0. accuracy_gate: without the right answer the spatial term is 0.
    Raises ValueError for a ground truth or problem that check_ground_truth refuses, never for a response.
    """
    truths = [_truth(item.ground_truth) for item in inputs]
    parsed = [_parse(item.response, truth, format_gate) for item, truth in zip(inputs, truths, strict=True)]
    rated = [i for i, (scene, is_right) in enumerate(parsed) if scene is not None and (is_right or not accuracy_gate)]
    spatial = _spatial_scores(
        [truths[i].scene for i in rated],
        [scene for i in rated if (scene := parsed[i].scene) is not None],
        [_image_size(inputs[i].problem) for i in rated],
        relation_weight,
        {"label_cost": label_cost, "overlap_cost": overlap_cost, "strict_boxes": strict_boxes}
        | {"overlap": overlap, "matching_overlap": matching_overlap},
    )
    spatial_by_input = dict(zip(rated, spatial, strict=True))
    results = []
    for i, (truth, (scene, is_right)) in enumerate(zip(truths, parsed, strict=True)):
        formatted, accuracy = (0.0 if scene is None else 1.0), (1.0 if is_right else 0.0)
        count = _count_score(scene, truth.scene, object_count_weight, relation_count_weight)
        score = spatial_by_input.get(i, 0.0)
        overall = format_weight * formatted + count_weight * count + accuracy_weight * accuracy
        results.append(
            {
                "overall": overall + spatial_weight * score,
                "format": formatted,
                "count": count,
                "accuracy": accuracy,
                "spatial_score": score,
            }
        )
    return results


def _parse(response: str, truth: _Truth, format_gate: bool) -> _Parsed:
    sections = parse_response(response)
    scene = _formatted_scene(response, sections)
    if isinstance(scene, str):
        if format_gate:
            return _Parsed(None, False)
        scene = None
    return _Parsed(scene, is_same_text(sections.answer, truth.answer))


def _count_score(scene: SceneGraph | None, truth: SceneGraph, object_weight: float, relation_weight: float) -> float:
    if scene is None or not scene.has_objects_key:
        return 0.0
    objects = _closeness(len(scene.objects), len(truth.objects))
    if not truth.relations:
        return objects
    return object_weight * objects + relation_weight * _closeness(len(scene.relations), len(truth.relations))


def _closeness(predicted: int, true: int) -> float:
    return max(0.0, 1.0 - abs(predicted - true) / max(true, 1))


def _spatial_scores(
    truths: list[SceneGraph],
    scenes: list[SceneGraph],
    image_sizes: list[tuple[int, int]],
    relation_weight: float,
    matching_options: dict[str, Any],
) -> list[float]:
    """Returns each scene's spatial term in [0, 1]."""
    objects = _sums(match_objects(truths, scenes, image_sizes, **matching_options), len(scenes))
    scores = [
        # a shifted CIoU can be negative, and boxes that are not strict can give anything
        min(max(total / len(truth.objects), 0.0), 1.0)
        if truth.objects
        else float(bool(truth.relations) or not scene.objects)
        for total, truth, scene in zip(objects, truths, scenes, strict=True)
    ]
    if not relation_weight:
        return scores
    relations = _sums(match_relations(truths, scenes), len(scenes))
    return [
        score + relation_weight * (total / len(truth.relations) - score) if truth.relations else score
        for score, total, truth in zip(scores, relations, truths, strict=True)
    ]


def _sums(matches: Matches, num_scenes: int) -> list[float]:
    """Returns the sum of the overlaps in each scene, added in the order of the true objects."""
    return np.bincount(matches.scene, weights=matches.overlap, minlength=num_scenes).tolist()

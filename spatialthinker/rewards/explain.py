"""Explanation of a response's reward: what was read in it, and what that was compared with."""

from collections.abc import Callable, Iterator

import numpy as np

from spatialthinker.geometry import iou
from spatialthinker.matching import match_objects
from spatialthinker.prompts import parse_image_size
from spatialthinker.response import parse_response, section
from spatialthinker.rewards.boxes import explain_boxes
from spatialthinker.rewards.choice import explain_choice
from spatialthinker.rewards.follows_scene import explain_follows_scene
from spatialthinker.rewards.length import explain_length
from spatialthinker.rewards.numeric import explain_numbers
from spatialthinker.rewards.ordering import explain_ordering
from spatialthinker.rewards.points import explain_points
from spatialthinker.rewards.record import RewardInput
from spatialthinker.rewards.relations import explain_relations
from spatialthinker.rewards.spatial_sgg import format_failure
from spatialthinker.scene_graph import SceneFormatError, load_scene


def explain(reward: str, item: RewardInput) -> Iterator[str]:
    """Yields lines on one response's reward, by a name of EXPLANATIONS."""
    return EXPLANATIONS[reward](item)


def explain_scene(item: RewardInput) -> Iterator[str]:
    """Yields lines on format, counts, answer and matched objects of one response.

    Raises ValueError for a ground truth that check_ground_truth refuses.
    """
    truth = load_scene(section(item.ground_truth, "scene"), is_reference=True)
    sections = parse_response(item.response)
    failure = format_failure(item.response)
    yield f"format:   {f'fails, {failure}' if failure else 'holds'}"
    yield f"answer:   {sections.answer!r}, true {(section(item.ground_truth, 'answer') or '').strip()!r}"
    try:
        scene = load_scene(sections.scene_text)
    except SceneFormatError as error:
        yield f"scene:    cannot be read, {error}"
        return
    yield f"objects:  {len(scene.objects)}, true {len(truth.objects)}"
    yield f"relations: {len(scene.relations)}, true {len(truth.relations)}"
    matches = match_objects([truth], [scene], [parse_image_size(item.problem)])
    unmatched = set(range(len(truth.objects)))
    for true, predicted, overlap, similarity in zip(
        matches.true.tolist(), matches.predicted.tolist(), matches.overlap, matches.similarity, strict=True
    ):
        unmatched.discard(true)
        pair = truth.objects[true], scene.objects[predicted]
        plain_iou = float(np.clip(iou(pair[0].bbox, pair[1].bbox), 0.0, 1.0))
        yield (
            f"  {pair[0].id} {_corners(pair[0].bbox)} <- {pair[1].id} {_corners(pair[1].bbox)}: "
            f"overlap {overlap:.3f}, IoU {plain_iou:.3f}, label similarity {similarity:.3f}"
        )
    for true in sorted(unmatched):
        yield f"  {truth.objects[true].id} {_corners(truth.objects[true].bbox)} <- nothing"


def _corners(bbox: tuple[float, float, float, float]) -> str:
    return "[" + ", ".join(f"{value:g}" for value in bbox) + "]"


EXPLANATIONS: dict[str, Callable[[RewardInput], Iterator[str]]] = {
    "spatial_sgg": explain_scene,
    "numbers": explain_numbers,
    "points": explain_points,
    "boxes": explain_boxes,
    "relations": explain_relations,
    "ordering": explain_ordering,
    "choice": explain_choice,
    "follows_scene": explain_follows_scene,
    "length": explain_length,
}

"""Boxes, matches and relations of a response beside those of its ground truth, as the record of a rollout holds them.

Record: {"predicted": [{"id", "box"}], "reference": [...], "relations": [[s, p, o]], "reference_relations": [...],
"matches": [{"predicted": i, "reference": j, "iou", "label"}], "size": [w, h]}.
"""

import json
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spatialthinker.geometry import iou
from spatialthinker.prompts import parse_image_size
from spatialthinker.response import SECTIONS, parse_response, section
from spatialthinker.scene_graph import (
    MAX_COORDINATE_PX,
    Relation,
    SceneFormatError,
    SceneGraph,
    SceneObject,
    load_scene,
    parse_scene,
)
from spatialthinker.visualize import Layout, lay_out, relation_text

MAX_OBJECTS = 500
"""More boxes than this are not drawn: they would hide the picture."""

FAILURES = {
    "scene_too_long": "the scene is too long to be read",
    "scene_not_json": "the scene is no JSON",
    "scene_not_object": "the scene is no JSON object with objects or relationships",
    "objects_not_list": "objects is no list",
    "bad_object": "an object is not {id, bbox}",
    "bad_id": "an id is not letters or underscores, a dot and digits",
    "duplicate_id": "two objects have the same id",
    "bad_box": "a box is not four numbers",
    "bad_number": "a coordinate of a box is out of range",
    "relationships_not_list": "relationships is no list",
    "bad_relation": "a relation is not {subject, predicate, object} of ids",
}


@dataclass(frozen=True)
class Scenes:
    """Both scenes of a response; None where there is none that can be read."""

    predicted: SceneGraph | None = None
    reference: SceneGraph | None = None
    matches: list[dict[str, Any]] = field(default_factory=list)
    size: tuple[int, int] | None = None
    """Width and height in pixels of the frame in which the boxes are."""

    def lay_out(self, size: tuple[int, int] | None, with_labels: bool) -> Layout | None:
        """Return the drawing of both scenes; None without a size, the record's or else this one."""
        size = self.size or size
        return lay_out(size, self.predicted, self.reference, with_labels=with_labels) if size else None

    def pairs(self) -> list[dict[str, Any]]:
        """Return one entry per object of either scene: matched ones with their IoU, then the others."""
        predicted, reference = (graph.ids if graph else [] for graph in (self.predicted, self.reference))
        found, left, right = [], set(range(len(predicted))), set(range(len(reference)))
        for match in self.matches:
            i, j = match["predicted"], match["reference"]
            found.append({"predicted": predicted[i], "reference": reference[j]})
            found[-1] |= {"iou": match["iou"], "label": match["label"]}
            left.discard(i)
            right.discard(j)
        found += [{"predicted": None, "reference": reference[j]} for j in sorted(right)]
        return found + [{"predicted": predicted[i], "reference": None} for i in sorted(left)]

    def relations(self) -> list[tuple[str, bool | None]]:
        """Return each predicted relation as text and whether the reference has it between the matched objects."""
        if not self.predicted:
            return []
        if not self.reference:
            return [(relation_text(relation), None) for relation in self.predicted.relations]
        ids, true_ids = self.predicted.ids, self.reference.ids
        matched = {ids[match["predicted"]]: true_ids[match["reference"]] for match in self.matches}
        true = {(r.subject, r.predicate, r.object) for r in self.reference.relations}
        return [
            (relation_text(r), (matched.get(r.subject), r.predicate, matched.get(r.object)) in true)
            for r in self.predicted.relations
        ]


def read_scenes(text: str | None) -> Scenes:
    """Return the scenes of a record's JSON; whatever in it is not of the form above is left out."""
    try:
        record = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        record = {}
    if not isinstance(record, dict):
        return Scenes()
    predicted = _graph(record.get("predicted"), record.get("relations"))
    reference = _graph(record.get("reference"), record.get("reference_relations"))
    counts = [len(graph.objects) if graph else 0 for graph in (predicted, reference)]
    matches = [match for match in _items(record.get("matches")) if _is_match(match, *counts)]
    is_size = len(sides := _items(record.get("size"))) == 2 and all(_is_number(side) and side >= 1 for side in sides)
    return Scenes(predicted, reference, matches, (round(sides[0]), round(sides[1])) if is_size else None)


def compare_scenes(response: str, ground_truth: str, problem: str) -> Scenes:
    """Return the scenes of a response and its ground truth, matched as the dense spatial reward matches them.

    Without spaCy they have no matches.
    """
    from spatialthinker.matching import can_match, match_objects

    predicted = parse_scene(parse_response(response).scene_text)
    reference = parse_scene(section(ground_truth, "scene"), is_reference=True)
    try:
        size = parse_image_size(problem)
    except ValueError:
        size = None
    if predicted is None or reference is None or not size or not min(size) or not can_match():
        return Scenes(predicted, reference, [], size)
    found = match_objects([reference], [predicted], [size])
    matches = [
        {
            "predicted": i,
            "reference": j,
            "iou": float(np.clip(iou(reference.objects[j].bbox, predicted.objects[i].bbox), 0.0, 1.0)),
            "label": float(label),
        }
        for i, j, label in zip(found.predicted.tolist(), found.true.tolist(), found.similarity, strict=True)
    ]
    return Scenes(predicted, reference, matches, size)


def explain_failure(reason: str | None, response: str) -> str | None:
    """Return a sentence on why a response fails the format, with the place where its scene breaks it."""
    if not reason:
        return None
    kind, _, tag = reason.partition("_")
    if tag in SECTIONS and kind in ("missing", "repeated"):
        how = "has no" if kind == "missing" else "has more than one"
        return f"the response {how} closed section <{tag}>"
    try:
        load_scene(parse_response(response).scene_text)
    except SceneFormatError as error:
        if error.reason == reason:
            return f"{FAILURES.get(reason, reason)} ({error})"
    return FAILURES.get(reason, reason)


def _graph(objects: Any, relations: Any) -> SceneGraph | None:
    if not isinstance(objects, list):
        return None
    found = [
        SceneObject(item["id"], tuple(item["box"]))
        if isinstance(item, dict) and isinstance(item.get("id"), str) and _is_box(item.get("box"))
        else SceneObject("?", (0.0, 0.0, 0.0, 0.0))  # keeps the numbers that matches name
        for item in objects[:MAX_OBJECTS]
    ]
    triples = [item for item in _items(relations) if isinstance(item, list) and len(item) == 3]
    return SceneGraph(found, [Relation(*map(str, triple)) for triple in triples[:MAX_OBJECTS]])


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and abs(value) <= MAX_COORDINATE_PX


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


def _is_match(match: Any, predicted: int, reference: int) -> bool:
    if not isinstance(match, dict):
        return False
    places = [(match.get("predicted"), predicted), (match.get("reference"), reference)]
    is_placed = all(isinstance(place, int) and 0 <= place < count for place, count in places)
    return is_placed and all(_is_number(match.get(name)) for name in ("iou", "label"))

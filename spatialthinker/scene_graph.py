"""Scene graphs: the objects and relations that a response or a data row states as JSON.

    {"objects": [{"id": "traffic_light.1", "bbox": [x1, y1, x2, y2]}, ...],
     "relationships": [{"subject": "car.2", "predicate": "left of", "object": "traffic_light.1"}, ...]}

Boxes are in pixels of the image. A model's scene is read strictly, a data row's scene (`is_reference=True`) may
use any label and carry extra keys. The graph is held as columns, the form in which the reward consumes it.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

from spatialthinker.geometry import Box

MAX_SCENE_CHARS = 32_768
"""Longer scene text is refused unread, so that one runaway response cannot hold up a batch."""

MAX_COORDINATE_PX = 1_000_000.0
"""Larger coordinates (infinities included) are no image coordinates; they would overflow the areas."""

_ID = re.compile(r"[a-zA-Z_]+\.\d+")
_NUMBERS = {int, float}


class SceneFormatError(ValueError):
    """A scene text that breaks the format; `reason` is a short name fit for a metric."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class SceneObject(NamedTuple):
    """One object: its id (label, dot, number) and its box in pixels."""

    id: str
    box: Box

    @property
    def label(self) -> str:
        return label_of(self.id)


class Relation(NamedTuple):
    """One triple; subject and object are object ids."""

    subject: str
    predicate: str
    object: str


@dataclass(frozen=True, slots=True)
class SceneGraph:
    """A scene by columns: `ids[i]` has `boxes[i]`; `objects` and `relations` are the same by rows."""

    ids: list[str] = field(default_factory=list)
    boxes: list[list[float]] = field(default_factory=list)
    triples: list[tuple[str, str, str]] = field(default_factory=list)
    has_objects_key: bool = True

    @property
    def objects(self) -> tuple[SceneObject, ...]:
        return tuple(
            SceneObject(object_id, Box(*map(float, box))) for object_id, box in zip(self.ids, self.boxes, strict=True)
        )

    @property
    def relations(self) -> tuple[Relation, ...]:
        return tuple(Relation(*triple) for triple in self.triples)

    @property
    def labels(self) -> list[str]:
        return [label_of(object_id) for object_id in self.ids]


def label_of(object_id: str) -> str:
    """Returns the words of an id: "Traffic_light.2" -> "traffic light"."""
    return object_id.split(".", 1)[0].lower().replace("_", " ").replace("-", " ")


def parse_scene(text: str | None, *, is_reference: bool = False) -> SceneGraph | None:
    """Returns the scene graph of a JSON text, or None when it breaks the format."""
    try:
        return load_scene(text, is_reference=is_reference)
    except SceneFormatError:
        return None


def load_scene(text: str | None, *, is_reference: bool = False) -> SceneGraph:
    """Returns the scene graph of a JSON text.

    A model's scene must be a non-empty JSON object whose `objects` and `relationships` (both optional) are lists,
    whose objects have exactly `id` (letters or underscores, dot, digits; each once) and `bbox` (four finite
    numbers), and whose relations have the strings `subject`, `predicate` and `object`, subject and object in id
    form. For `is_reference` an id is any string, extra keys are allowed and objects may repeat.

    Raises SceneFormatError with a `reason` otherwise.
    """
    if text is None:
        raise SceneFormatError("missing_scene")
    if len(text) > MAX_SCENE_CHARS:
        raise SceneFormatError("scene_too_long", f"{len(text)} characters, at most {MAX_SCENE_CHARS}")
    scene = _load_json(text)
    if type(scene) is not dict or not scene:
        raise SceneFormatError("scene_not_object", "expected a non-empty JSON object")
    ids, boxes = _read_objects(scene.get("objects", []), is_reference)
    triples = _read_relations(scene.get("relationships", []), is_reference)
    return SceneGraph(ids, boxes, triples, "objects" in scene)


def _refuse_constant(name: str) -> NoReturn:
    raise SceneFormatError("bad_number", f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _load_json(text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except SceneFormatError:
        raise
    except ValueError as error:
        raise SceneFormatError("scene_not_json", str(error)) from None
    except RecursionError:
        raise SceneFormatError("scene_not_json", "nested too deep") from None


def _all_of(types: set[type], values: Iterable[Any]) -> bool:
    """Whether every value has exactly one of these types (a boolean is no int here)."""
    return set(map(type, values)) <= types


def _read_objects(objects: Any, is_reference: bool) -> tuple[list[str], list[list[float]]]:
    if type(objects) is not list:
        raise SceneFormatError("objects_not_list")
    if not objects:
        return [], []
    if not _all_of({dict}, objects):
        raise SceneFormatError("bad_object", "an object is not a JSON object")
    if not is_reference and set(map(len, objects)) != {2}:
        raise SceneFormatError("bad_object", "an object has exactly the keys id and bbox")
    try:
        ids = [item["id"] for item in objects]
        boxes = [item["bbox"] for item in objects]
    except KeyError as error:
        raise SceneFormatError("bad_object", f"key {error} is missing") from None
    if not _all_of({str}, ids) or not (is_reference or all(map(_ID.fullmatch, ids))):
        raise SceneFormatError("bad_id", "an id is letters or underscores, a dot and digits")
    if not is_reference and len(set(ids)) != len(ids):
        raise SceneFormatError("duplicate_id")
    if not _all_of({list}, boxes) or set(map(len, boxes)) != {4}:
        raise SceneFormatError("bad_box", "bbox is a list of four numbers")
    coordinates = [value for box in boxes for value in box]
    if not _all_of(_NUMBERS, coordinates):
        raise SceneFormatError("bad_box", "bbox is a list of four numbers")
    if max(coordinates) > MAX_COORDINATE_PX or min(coordinates) < -MAX_COORDINATE_PX:
        raise SceneFormatError("bad_number", f"a coordinate is beyond {MAX_COORDINATE_PX:g} px")
    return ids, boxes


def _read_relations(relations: Any, is_reference: bool) -> list[tuple[str, str, str]]:
    if type(relations) is not list:
        raise SceneFormatError("relationships_not_list")
    if not relations:
        return []
    if not _all_of({dict}, relations):
        raise SceneFormatError("bad_relation", "a relation is not a JSON object")
    try:
        triples = [(item["subject"], item["predicate"], item["object"]) for item in relations]
    except KeyError as error:
        raise SceneFormatError("bad_relation", f"key {error} is missing") from None
    if not all(_all_of({str}, triple) for triple in triples):
        raise SceneFormatError("bad_relation", "subject, predicate and object are strings")
    if not is_reference and not all(_ID.fullmatch(end) for subject, _, target in triples for end in (subject, target)):
        raise SceneFormatError("bad_relation", "subject and object are ids")
    return triples

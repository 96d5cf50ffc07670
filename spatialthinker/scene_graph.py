"""Scene graphs: the objects and relations that a response or a data row states as JSON.

    {"objects": [{"id": "traffic_light.1", "bbox": [x1, y1, x2, y2]}, ...],
     "relationships": [{"subject": "car.2", "predicate": "left of", "object": "traffic_light.1"}, ...]}

Boxes are in pixels of the image. A model's scene is read strictly, a data row's scene (`is_reference=True`) may
use any label and carry extra keys. The graph is held as columns, the form in which the reward consumes it.
"""

import json
import re
from itertools import chain
from typing import Any, NamedTuple, NoReturn

from spatialthinker.geometry import Box

MAX_SCENE_CHARS = 32_768
"""Longer scene text is refused unread, so that one runaway response cannot hold up a batch."""

MAX_COORDINATE_PX = 1_000_000.0
"""Larger coordinates (infinities included) are no image coordinates; they would overflow the areas."""

_ID = re.compile(r"[a-zA-Z_]+\.\d+")
_NUMBERS = frozenset({int, float})


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


class SceneGraph(NamedTuple):
    """A scene by columns: object i is `ids[i]` with the box `coordinates[4 * i : 4 * i + 4]`.

    `objects` and `relations` are the same by rows, for readers; the reward scores thousands of scenes at a time
    and lives on the columns.
    """

    ids: list[str]
    coordinates: list[float]
    relationships: list[dict[str, Any]]
    has_objects_key: bool = True

    @property
    def objects(self) -> tuple[SceneObject, ...]:
        numbers = map(float, self.coordinates)
        return tuple(
            SceneObject(object_id, Box(*box))
            for object_id, box in zip(self.ids, zip(numbers, numbers, numbers, numbers, strict=True), strict=True)
        )

    @property
    def relations(self) -> tuple[Relation, ...]:
        return tuple(Relation(item["subject"], item["predicate"], item["object"]) for item in self.relationships)


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
    ids, coordinates = _read_objects(scene.get("objects", []), is_reference)
    relationships = scene.get("relationships", [])
    _check_relations(relationships, is_reference)
    return SceneGraph(ids, coordinates, relationships, "objects" in scene)


def _refuse_constant(name: str) -> NoReturn:
    raise SceneFormatError("bad_number", f"{name} is not JSON")


_scan = json.JSONDecoder(parse_constant=_refuse_constant).scan_once
"""The scanner in C behind `json.loads`: (text, start) -> (value, end)."""


def _load_json(text: str) -> Any:
    text = text.strip(" \t\n\r")
    try:
        value, end = _scan(text, 0)
    except SceneFormatError:
        raise
    except StopIteration:
        raise SceneFormatError("scene_not_json", "no JSON value") from None
    except (ValueError, RecursionError) as error:
        raise SceneFormatError("scene_not_json", str(error)) from None
    if end != len(text):
        raise SceneFormatError("scene_not_json", "text after the JSON value")
    return value


def _read_objects(objects: Any, is_reference: bool) -> tuple[list[str], list[float]]:
    """Returns ids and coordinates.

    Values are used as what they should be and a TypeError tells that they are not: of JSON's types only an object
    has string keys and only a list of numbers holds numbers.
    """
    if type(objects) is not list:
        raise SceneFormatError("objects_not_list")
    if not objects:
        return [], []
    try:
        ids = [item["id"] for item in objects]
        boxes = [item["bbox"] for item in objects]
    except (KeyError, TypeError):
        raise SceneFormatError("bad_object", "an object has the keys id and bbox") from None
    if not is_reference and max(map(len, objects)) != 2:
        raise SceneFormatError("bad_object", "an object has no other key than id and bbox")
    _check_ids(ids, is_reference, "bad_id")
    if not is_reference and len(set(ids)) != len(ids):
        raise SceneFormatError("duplicate_id")
    try:
        coordinates = [*chain.from_iterable(boxes)]
        is_box_list = set(map(len, boxes)) == {4} and _NUMBERS.issuperset(map(type, coordinates))
    except TypeError:
        is_box_list = False
    if not is_box_list:
        raise SceneFormatError("bad_box", "bbox is a list of four numbers")
    if max(coordinates) > MAX_COORDINATE_PX or min(coordinates) < -MAX_COORDINATE_PX:
        raise SceneFormatError("bad_number", f"a coordinate is beyond {MAX_COORDINATE_PX:g} px")
    return ids, coordinates


def _check_relations(relationships: Any, is_reference: bool) -> None:
    if type(relationships) is not list:
        raise SceneFormatError("relationships_not_list")
    if not relationships:
        return
    try:
        ends = [item["subject"] for item in relationships]
        ends += [item["object"] for item in relationships]
        "".join([item["predicate"] for item in relationships])
    except (KeyError, TypeError):
        raise SceneFormatError("bad_relation", "a relation has the strings subject, predicate and object") from None
    _check_ids(ends, is_reference, "bad_relation")


def _check_ids(ids: list[Any], is_reference: bool, reason: str) -> None:
    try:
        is_valid = bool(all(map(_ID.fullmatch, ids)) if not is_reference else ["".join(ids)])
    except TypeError:
        is_valid = False
    if not is_valid:
        raise SceneFormatError(reason, "an id is a string of letters or underscores, a dot and digits")

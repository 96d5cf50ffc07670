"""Scene graphs: the objects and relations that a response or a data row states as JSON.

    {"objects": [{"id": "traffic_light.1", "bbox": [x1, y1, x2, y2]}, ...],
     "relationships": [{"subject": "car.2", "predicate": "left of", "object": "traffic_light.1"}, ...]}

Boxes are in pixels of the image. A model's scene is read strictly; a data row's scene (`is_reference=True`) may
use any label and carry extra keys. The classes below are the schema by which msgspec decodes and checks the text
in one pass; that is what makes the reward cheap.
"""

import re
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from spatialthinker.geometry import Box

MAX_SCENE_CHARS = 32_768
"""Longer scene text is refused unread, so that one runaway response cannot hold up a batch."""

MAX_COORDINATE_PX = 1_000_000.0
"""Larger coordinates (infinities included) are no image coordinates; they would overflow the areas."""

Coordinate = Annotated[float, Meta(ge=-MAX_COORDINATE_PX, le=MAX_COORDINATE_PX)]


class SceneObject(Struct, frozen=True, gc=False):
    """One object: its id (label, dot, number) and the corners of its box in pixels."""

    id: str
    bbox: tuple[Coordinate, Coordinate, Coordinate, Coordinate]

    @property
    def box(self) -> Box:
        return Box(*self.bbox)

    @property
    def label(self) -> str:
        return label_of(self.id)


class Relation(Struct, frozen=True, gc=False):
    """One triple; subject and object are object ids."""

    subject: str
    predicate: str
    object: str


class SceneGraph(NamedTuple):
    """The objects and relations of one scene."""

    objects: list[SceneObject]
    relations: list[Relation]
    has_objects_key: bool = True
    """False when the text left `objects` out, which the count term scores lower than an empty list."""

    @property
    def ids(self) -> list[str]:
        return [item.id for item in self.objects]

    @property
    def boxes(self) -> list[Box]:
        return [item.box for item in self.objects]


class SceneFormatError(ValueError):
    """A scene text that breaks the format; `reason` is a short name fit for a metric."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class _StrictObject(SceneObject, frozen=True, gc=False, forbid_unknown_fields=True):
    pass


class _StrictScene(Struct, gc=False):
    objects: list[_StrictObject] | UnsetType = UNSET
    relationships: list[Relation] | UnsetType = UNSET


class _ReferenceScene(Struct, gc=False):
    objects: list[SceneObject] | UnsetType = UNSET
    relationships: list[Relation] | UnsetType = UNSET


_decode_strict = msgspec.json.Decoder(_StrictScene).decode
_decode_reference = msgspec.json.Decoder(_ReferenceScene).decode

_EMPTY = re.compile(r"\{[ \t\n\r]*\}")
_ID_LINES = re.compile(r"(?:[a-zA-Z_]+\.\d+\n)*")
_ERROR_PATH = re.compile(r"at `\$([^`]*)`$")
_REASONS = (
    (re.compile(r"\.objects\[[^]]*\]\.bbox"), "bad_box"),
    (re.compile(r"\.objects\[[^]]*\]\.id"), "bad_id"),
    (re.compile(r"\.objects\["), "bad_object"),
    (re.compile(r"\.objects"), "objects_not_list"),
    (re.compile(r"\.relationships\["), "bad_relation"),
    (re.compile(r"\.relationships"), "relationships_not_list"),
)


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
    whose objects have exactly `id` (letters or underscores, dot, digits; each once) and `bbox` (four numbers within
    MAX_COORDINATE_PX), and whose relations have the strings `subject`, `predicate` and `object`, subject and object
    in id form. For `is_reference` an id is any string, extra keys are allowed and ids may repeat.

    Raises SceneFormatError with a `reason` otherwise.
    """
    if text is None:
        raise SceneFormatError("missing_scene")
    text = text.strip()  # of every blank, as no-break spaces and form feeds, of which JSON knows four
    if len(text) > MAX_SCENE_CHARS:
        raise SceneFormatError("scene_too_long", f"{len(text)} characters, at most {MAX_SCENE_CHARS}")
    scene = _decode(_decode_reference if is_reference else _decode_strict, text)
    objects = [] if scene.objects is UNSET else scene.objects
    relations = [] if scene.relationships is UNSET else scene.relationships
    if not objects and not relations and _EMPTY.fullmatch(text):
        raise SceneFormatError("scene_not_object", "the JSON object is empty")
    if not is_reference:
        _check_ids([item.id for item in objects], relations)
    return SceneGraph(objects, relations, scene.objects is not UNSET)


def _check_ids(ids: list[str], relations: list[Relation]) -> None:
    ends = [item.subject for item in relations] + [item.object for item in relations]
    if not _are_ids(ids + ends):
        reason = "bad_relation" if _are_ids(ids) else "bad_id"
        raise SceneFormatError(reason, "an id is letters or underscores, a dot and digits")
    if len(set(ids)) != len(ids):
        raise SceneFormatError("duplicate_id")


def _are_ids(ids: list[str]) -> bool:
    """True when all are ids, by one regular expression over one id a line."""
    lines = "\n".join(ids) + "\n" if ids else ""
    return _ID_LINES.fullmatch(lines) is not None and lines.count("\n") == len(ids)


def _decode(decode: Any, text: str) -> Any:
    try:
        return decode(text)
    except msgspec.ValidationError as error:
        raise SceneFormatError(_reason(str(error)), str(error)) from None
    except (msgspec.DecodeError, UnicodeEncodeError) as error:
        raise SceneFormatError("scene_not_json", str(error)) from None
    except RecursionError:
        raise SceneFormatError("scene_not_json", "nested too deep") from None


def _reason(message: str) -> str:
    """Returns the reason behind a validation error, which ends in the path: "... - at `$.objects[0].bbox[3]`"."""
    match = _ERROR_PATH.search(message)
    for pattern, reason in _REASONS:
        if match is not None and pattern.match(match[1]):
            is_magnitude = reason == "bad_box" and ("out of range" in message or "=" in message)
            return "bad_number" if is_magnitude else reason
    return "scene_not_object"

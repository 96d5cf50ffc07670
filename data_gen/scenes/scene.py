"""Scene graphs as sources write them, made fit for questions; what cannot be used is said, never guessed.

A source row holds `image_id`, an encoded image (`image` or `images`), `objects` and `relationships` (lists, or JSON
texts of lists) as in Visual Genome's VG150:

    {"id": "traffic light.1", "bbox": [x1, y1, x2, y2]}    {"subject": id, "predicate": text, "object": id}

A box may also stand under keys: x, y and w or width, h or height. A list of four numbers holds corners; sources of
lists with width and height are turned into corners by `boxes.py`.
"""

import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

from data_gen.scenes.naming import latin, may_be_confused
from spatialthinker.geometry import Box
from spatialthinker.plain_text import printable
from spatialthinker.scene_graph import MAX_COORDINATE_PX, Relation, SceneObject
from spatialthinker.storage.images import BrokenImage, check_image, find_image, read_file

IMAGE_COLUMNS = ("image", "images")
UNREADABLE = "unreadable"
"""Key of a row that could not be read; its value is the reason."""

MAX_PREDICATE_CHARS = 120
MIN_SIDE_PX = 1.0
"""Objects that are thinner inside the image are left out."""


class SceneFault(ValueError):
    """A row that no question can be built on; the message is the reason that its quarantine line gives."""


@dataclass(frozen=True)
class Scene:
    """One image and its graph: ids are unique and of the form the reward reads, boxes lie in the upright image."""

    image_id: str
    image: bytes
    width: int
    height: int
    objects: tuple[SceneObject, ...]
    relations: tuple[Relation, ...]
    notes: tuple[str, ...] = field(default=())
    """Repairs and omissions."""

    @cached_property
    def by_id(self) -> dict[str, SceneObject]:
        return {item.id: item for item in self.objects}

    @cached_property
    def unique_names(self) -> frozenset[str]:
        """Names that denote exactly one object, whatever a reader may call the others."""
        labels = [item.label for item in self.objects]
        kinds = set(labels)
        doubtful = {a for a in kinds if labels.count(a) > 1 or any(a != b and may_be_confused(a, b) for b in kinds)}
        return frozenset(kinds - doubtful)

    def graph(self) -> dict[str, list[dict[str, Any]]]:
        """The whole graph in the form of a reference scene."""
        return reference_scene(self.objects, self.relations)


def reference_scene(objects: tuple[SceneObject, ...], relations: tuple[Relation, ...]) -> dict[str, Any]:
    """Objects and relations as the JSON value of `<scene>`."""
    return {
        "objects": [{"id": item.id, "bbox": [_number(x) for x in item.bbox]} for item in objects],
        "relationships": [{"subject": r.subject, "predicate": r.predicate, "object": r.object} for r in relations],
    }


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else round(value, 1)


def read_image_id(row: dict[str, Any], index: int) -> str:
    """The row's id as text; SceneFault where it has none."""
    if UNREADABLE in row:
        raise SceneFault(row[UNREADABLE])
    value = row.get("image_id")
    if value is None or not str(value).strip():
        raise SceneFault(f"row {index} has no image_id")
    if str(value) != printable(str(value)):
        raise SceneFault(f"the image_id of row {index} holds control signs, broken characters or outer blanks")
    return str(value)


def read_scene(row: dict[str, Any], index: int = 0, root: Path = Path(".")) -> Scene:
    """The scene of a source row. Raises SceneFault with the reason where there is none.

    Names of several words get underscores; an id without a number gets the next free one; boxes are cut at the
    border of the image, and objects outside of it left out; a second object of the same id gets a new number, and
    relations that name the id are left out, since they may mean either.
    """
    image_id = read_image_id(row, index)
    items, triples = _read_list(row, "objects"), _read_list(row, "relationships")
    image, width, height = read_image(row, root)
    notes: list[str] = []
    objects, id_of = _read_objects(items, width, height, notes)
    if not objects:
        raise SceneFault("no object has a name and a box inside the image" + (f": {notes[0]}" if notes else ""))
    relations = _read_relations(triples, id_of, notes)
    return Scene(image_id, image, width, height, tuple(objects), tuple(relations), tuple(notes))


def read_image(row: dict[str, Any], root: Path = Path(".")) -> tuple[bytes, int, int]:
    """The encoded image and the width and height of its upright form; SceneFault for a missing or broken one."""
    value = image_bytes(row, root)
    try:
        width, height = check_image(value)
    except BrokenImage as error:
        raise SceneFault(f"its image cannot be decoded: {error}") from None
    return value, width, height


def image_bytes(row: dict[str, Any], root: Path = Path(".")) -> bytes:
    """The encoded image of a row, undecoded; a path is read from `root`. SceneFault where there is none."""
    value = next((row[name] for name in IMAGE_COLUMNS if row.get(name) is not None), None)
    if isinstance(value, list):
        value = value[0] if value else None
    try:
        source = find_image(value, root)
        if source is not None:
            return read_file(source)
    except ValueError as error:
        raise SceneFault(f"its image file cannot be read: {error}") from None
    raise SceneFault(f"no image in the columns {' or '.join(IMAGE_COLUMNS)}")


def _read_list(row: dict[str, Any], key: str) -> list[Any]:
    if key not in row:
        raise SceneFault(f"the row has no key {key!r}; its keys: {', '.join(map(str, row))}")
    value = row[key]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise SceneFault(f"{key} is no JSON: {error}") from None
    if value is None:
        return []
    if not isinstance(value, list):
        raise SceneFault(f"{key} must be a list, got {type(value).__name__}")
    return value


def _read_objects(
    items: list[Any], width: int, height: int, notes: list[str]
) -> tuple[list[SceneObject], dict[str, str | None]]:
    """The usable objects, and the id that each source id became: None where it names several objects."""
    objects: list[SceneObject] = []
    id_of: dict[str, str | None] = {}
    first_box: dict[str, Box] = {}
    taken = {_clean_id(item["id"]) for item in items if isinstance(item, dict) and isinstance(item.get("id"), str)}
    used: set[str] = set()
    for item in items:
        try:
            source_id, box = _read_object(item, width, height)
        except SceneFault as fault:
            notes.append(f"left out {fault}")
            continue
        if source_id in id_of:
            if first_box[source_id] == box:
                notes.append(f"object {source_id!r} stands twice")
                continue
            notes.append(f"the id {source_id!r} names several objects; relations with it are left out")
            id_of[source_id] = None
        object_id = _clean_id(source_id)
        if object_id is None or object_id in used:
            label = _clean_label(source_id)
            object_id = next(free for i in count(1) if (free := f"{label}.{i}") not in taken)
            taken.add(object_id)
        used.add(object_id)
        first_box.setdefault(source_id, box)
        id_of.setdefault(source_id, object_id)
        objects.append(SceneObject(object_id, (box.x1, box.y1, box.x2, box.y2)))
    return objects, id_of


def _read_object(item: Any, width: int, height: int) -> tuple[str, Box]:
    """The source id and the box inside the image; SceneFault where either is missing."""
    if not isinstance(item, dict) or not isinstance(item.get("id"), str) or not _clean_label(item["id"]):
        raise SceneFault(f"an object without a name: {str(item)[:80]}")
    source_id, corners = item["id"], corners_of(item)
    if not isinstance(corners, list | tuple) or len(corners) != 4:
        raise SceneFault(f"{source_id!r}: its bbox is not four numbers: {str(corners)[:60]}")
    if not all(map(is_coordinate, corners)):
        raise SceneFault(f"{source_id!r}: its bbox is not four finite numbers: {str(corners)[:60]}")
    x1, y1, x2, y2 = (float(x) for x in corners)
    box = Box(max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
    if box.width < MIN_SIDE_PX or box.height < MIN_SIDE_PX:
        raise SceneFault(f"{source_id!r}: its bbox {list(corners)} is not inside {width} x {height}")
    return source_id, box


def corners_of(item: dict[str, Any]) -> Any:
    """The value of an object's box: corners where it says so by its keys, else what the source wrote."""
    box = item.get("bbox", item)
    if not isinstance(box, dict):
        return box
    numbers: list[Any] = [box.get("x"), box.get("y"), box.get("w", box.get("width")), box.get("h", box.get("height"))]
    if not all(map(is_coordinate, numbers)):
        return None
    x, y, width, height = numbers
    return [x, y, x + width, y + height]


def is_coordinate(value: Any) -> bool:
    """True for a number that a box in an image may have."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and -MAX_COORDINATE_PX <= value <= MAX_COORDINATE_PX


_ID = re.compile(r"(.*?)\.([0-9]+)", re.DOTALL)


def _clean_label(source_id: str) -> str:
    label = _ID.fullmatch(source_id)
    return re.sub(r"[^a-z]+", "_", latin(label[1] if label else source_id)).strip("_")


def _clean_id(source_id: str) -> str | None:
    match = _ID.fullmatch(source_id)
    label = _clean_label(source_id)
    return f"{label}.{match[2]}" if match and label else None


def _read_relations(items: list[Any], id_of: dict[str, str | None], notes: list[str]) -> list[Relation]:
    relations: dict[tuple[str, str, str], Relation] = {}
    for item in items:
        keys = ("subject", "predicate", "object")
        parts = [part for key in keys if isinstance(part := item.get(key), str)] if isinstance(item, dict) else []
        if len(parts) != len(keys) or not all(part.strip() for part in parts):
            notes.append(f"left out a relation that is not three texts: {str(item)[:80]}")
            continue
        subject, predicate, target = id_of.get(parts[0]), printable(parts[1]).lower(), id_of.get(parts[2])
        if not predicate or len(predicate) > MAX_PREDICATE_CHARS or set(predicate) & set("<>|"):
            notes.append(f"left out a relation whose predicate is empty, too long, or holds a tag: {predicate[:80]!r}")
            continue
        if not subject or not target or subject == target:
            notes.append(f"left out a relation whose ends are not two known objects: {' '.join(parts)[:80]}")
            continue
        relations.setdefault((subject, predicate, target), Relation(subject, predicate, target))
    return list(relations.values())

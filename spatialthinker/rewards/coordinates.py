"""Points and boxes as answers and ground truths state them, in pixels of the image.

Coordinates that all lie between 0 and 1 are fractions of the image's width and height where its size is known.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec

from spatialthinker.answer_grammar import normalize
from spatialthinker.geometry import Box
from spatialthinker.prompts import parse_image_size
from spatialthinker.rewards.truths import bad_truth, decode_truth
from spatialthinker.scene_graph import MAX_COORDINATE_PX, Coordinate, label_of

FRAMES = ("pixels", "thousandths")
"""Frames that answers may be in; thousandths of the image's sides are what Qwen3-VL writes."""
MAX_ANSWER_CHARS = 20_000
MAX_FOUND = 1000
MAX_NAME_CHARS = 64
BOX_KEYS = ("bbox_2d", "bbox", "box_2d", "box")
LABEL_KEYS = ("label", "name", "category")

Size = tuple[int, int]
_NUMBER = r"\s{0,4}([-+]?\d{1,6}(?:\.\d{1,20})?)\s{0,4}"
_POINT = re.compile(rf"[\[(]{_NUMBER},{_NUMBER}[\])]")
_BOX = re.compile(rf"[\[(]{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}[\])]")


class LabelledBox(NamedTuple):
    """A box and the normalized name of what it holds, "" for none."""

    box: Box
    label: str


@lru_cache(maxsize=2048)
def stated_size(problem: str) -> Size | None:
    """Returns the image's width and height that a prompt states, None where it states none."""
    try:
        return parse_image_size(problem)
    except ValueError:
        return None


def check_frame(frame: str) -> None:
    """Raises ValueError for a frame of coordinates that is not known."""
    if frame not in FRAMES:
        raise ValueError(f"got frame {frame!r}; known: {', '.join(FRAMES)}")


def to_pixels(rows: Sequence[Sequence[float]], size: Size | None, frame: str = "pixels") -> Sequence[Sequence[float]]:
    """Returns x, y, x, y, ... of each row in pixels, the same rows where they are. [N, 2 or 4]

    Raises ValueError for thousandths of an unknown size.
    """
    if frame == "thousandths":
        if size is None:
            raise ValueError("frame='thousandths' needs the image's size; neither problem nor ground truth states it")
        return [tuple(v * size[i % 2] / 1000 for i, v in enumerate(row)) for row in rows]
    if size is None or not all(0 <= value <= 1 for row in rows for value in row):
        return rows
    return [tuple(value * size[i % 2] for i, value in enumerate(row)) for row in rows]


def read_points(answer: str) -> list[tuple[float, float]]:
    """Returns the points (x, y) of an answer as they are written, at most MAX_FOUND."""
    return [(float(x), float(y)) for x, y in _POINT.findall(answer[:MAX_ANSWER_CHARS])[:MAX_FOUND]]


def read_boxes(answer: str) -> list[LabelledBox]:
    """Returns the boxes of an answer as they are written, at most MAX_FOUND: from JSON with labels, else from text."""
    answer = answer[:MAX_ANSWER_CHARS]
    boxes = _boxes_of_json(answer) if "{" in answer else None
    if boxes is None:
        boxes = [LabelledBox(Box(*map(float, found)), "") for found in _BOX.findall(answer)]
    return boxes[:MAX_FOUND]


class _Found(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    """A box as most models write it; others are read value by value."""

    bbox_2d: tuple[Coordinate, Coordinate, Coordinate, Coordinate]
    label: str = ""


_decode_found = msgspec.json.Decoder(list[_Found]).decode


def _boxes_of_json(answer: str) -> list[LabelledBox] | None:
    start = min((found for mark in "[{" if (found := answer.find(mark)) >= 0), default=-1)
    end = max(answer.rfind("]"), answer.rfind("}")) + 1
    text = answer[start:end]
    try:
        return [LabelledBox(Box(*found.bbox_2d), _name(found.label)) for found in _decode_found(text)]
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        pass
    try:
        return list_boxes(msgspec.json.decode(text))
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError, ValueError):
        return None


def _name(label: str) -> str:
    return _short_name(label) if len(label) <= MAX_NAME_CHARS else normalize(label)


_short_name = lru_cache(maxsize=4096)(normalize)


def list_boxes(value: Any) -> list[LabelledBox]:
    """Returns the boxes of a decoded value. Raises ValueError for a value that holds something else.

    A value is a list [x1, y1, x2, y2] or a dictionary with such a list under one of BOX_KEYS and perhaps a name, a
    list of these, or a scene: a dictionary with `objects` or `boxes`.
    """
    if isinstance(value, dict):
        for key in ("objects", "boxes"):
            if isinstance(value.get(key), list):
                return list_boxes(value[key])
        corners = next((value[key] for key in BOX_KEYS if key in value), None)
        label = next((value[key] for key in LABEL_KEYS if isinstance(value.get(key), str)), None)
        if label is None and isinstance(value.get("id"), str):
            label = label_of(value["id"])
        return [LabelledBox(_box(corners), _name(label or ""))]
    if not isinstance(value, list | tuple):
        raise ValueError(f"{str(value)[:80]!r} is no box [x1, y1, x2, y2]")
    if value and not isinstance(value[0], list | tuple | dict):
        return [LabelledBox(_box(value), "")]
    if any(isinstance(item, list | tuple) and item and isinstance(item[0], list | tuple | dict) for item in value):
        raise ValueError("the boxes are nested too deep")
    return [box for item in value for box in list_boxes(item)]


def _box(corners: Any) -> Box:
    is_box = isinstance(corners, list | tuple) and len(corners) == 4
    if not is_box or not all(type(v) in (int, float) and abs(v) <= MAX_COORDINATE_PX for v in corners):
        raise ValueError(f"{str(corners)[:80]!r} is no box [x1, y1, x2, y2]")
    return Box(*map(float, corners))


class TrueBoxes(NamedTuple):
    """The boxes of a ground truth as it states them, and the image's size if it does."""

    boxes: list[LabelledBox]
    size: Size | None


def true_boxes(text: str) -> TrueBoxes:
    """Returns the boxes of a ground truth's text. Raises ValueError for another content or corners out of order."""
    if text.lower() in ("none", "null"):
        return TrueBoxes([], None)
    value = decode_truth(text)
    try:
        boxes = list_boxes(value)
    except (ValueError, RecursionError) as error:
        raise bad_truth(f"states no boxes ({error})", text) from None
    if not all(box.is_proper for box, _ in boxes):
        raise bad_truth("has a box whose corners are not in order", text)
    return TrueBoxes(boxes, _size(value.get("size"), text) if isinstance(value, dict) and "size" in value else None)


def _size(value: Any, text: str) -> Size:
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(type(v) is int and v > 0 for v in value):
        raise bad_truth(f"states the size {value!r} instead of [width, height]", text)
    return value[0], value[1]

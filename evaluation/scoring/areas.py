"""Points and boxes in an answer, against a mask or a box. Pure functions.

Coordinates are fractions of the image's width and height where all are from 0 to 1, else pixels of the image.
"""

import ast
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from evaluation.scoring.strict import Grade, Reference, grade_response
from spatialthinker.geometry import Box, iou
from spatialthinker.response import find_answer

if TYPE_CHECKING:
    from PIL import Image

MIN_IOU = 0.5
"""IoU from which a box counts as right."""
MAX_POINTS = 1000

_NUMBER = r"\s*(-?\d{1,6}(?:\.\d{1,12})?)\s*"
_POINT = re.compile(rf"[\[(]{_NUMBER},{_NUMBER}[\])]")
_BOX = re.compile(rf"[\[(]{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}[\])]")
_NAMED_BOX = re.compile(
    rf"(?:bounding box|bbox|box)?[\s:=]{{0,4}}(?:\{{\s?\"?\w{{1,20}}\"?\s?:\s?)?{_BOX.pattern}\s?\}}?", re.IGNORECASE
)
_NO_BOX = re.compile(r"\bnull\b|\bnone\b|\bno (?:such |matching )?(?:object|box)\b", re.IGNORECASE)


def read_points(answer: str, size: tuple[int, int]) -> list[tuple[float, float]]:
    """Return the points of an answer in pixels, at most MAX_POINTS."""
    found = [(float(x), float(y)) for x, y in _POINT.findall(answer)[:MAX_POINTS]]
    if all(0 <= value <= 1 for point in found for value in point):
        return [(x * size[0], y * size[1]) for x, y in found]
    return found


def read_box(answer: str, size: tuple[int, int]) -> Box | None:
    """Return the last box of an answer in pixels, None for none or one whose corners are not in order."""
    found = _BOX.findall(answer)
    if not found:
        return None
    x1, y1, x2, y2 = map(float, found[-1])
    if all(0 <= value <= 1 for value in (x1, y1, x2, y2)):
        x1, y1, x2, y2 = x1 * size[0], y1 * size[1], x2 * size[0], y2 * size[1]
    box = Box(x1, y1, x2, y2)
    return box if box.is_proper else None


def parse_box(reference: str) -> Box | None:
    """Return a reference's box, None where nothing is to be found. Errors: ValueError for another text."""
    if reference.strip().lower() in ("", "[]", "null", "none", "[0, 0, 0, 0]"):
        return None
    try:
        box = Box(*map(float, ast.literal_eval(reference)))
    except (SyntaxError, TypeError, ValueError):
        raise ValueError(f"answer {reference!r} is no box [x1, y1, x2, y2]") from None
    if not box.is_proper:
        raise ValueError(f"answer {reference!r}: a box's corners must be in order")
    return box


def grade_points(response: str, finish_reason: str | None, mask: "Image.Image") -> Grade:
    """Return the grade of points: the share of them inside the mask; one outside the image is outside the mask."""
    answer = find_answer(response, finish_reason)
    points = [] if answer is None else read_points(answer, mask.size)
    if not points:
        return Grade("truncated" if finish_reason == "length" else "unparsed", None, answer, False, 0.0)
    width, height = mask.size
    inside = [(int(x), int(y)) for x, y in points if 0 <= x < width and 0 <= y < height]
    score = sum(mask.getpixel(point) != 0 for point in inside) / len(points)
    return Grade("text", None, answer, score == 1, score)


def grade_box(response: str, finish_reason: str | None, reference: Reference, size: tuple[int, int]) -> Grade:
    """Return the grade of a box: its IoU, right from MIN_IOU on; no box where there is none to find scores 1."""
    answer = find_answer(response, finish_reason)
    found, wanted = (None if answer is None else read_box(answer, size)), parse_box(reference.text or "")
    denies = answer is not None and found is None and bool(_NO_BOX.search(answer))
    if found is None and not denies:
        return Grade("truncated" if finish_reason == "length" else "unparsed", None, answer, False, 0.0)
    score = round(float(iou(found, wanted)), 6) if found and wanted else float(found is wanted)
    return Grade("text", None, answer, score >= MIN_IOU, score)


def grade_choice_and_box(
    response: str, finish_reason: str | None, choices: Sequence[str], reference: Reference, size: tuple[int, int]
) -> Grade:
    """Return the grade of a choice with its box: right where the choice is and the box has MIN_IOU.

    The box may stand in the answer or after its closing tag. The score is the box's IoU, None without a box.
    """
    answer = find_answer(response, finish_reason)
    choice = grade_response(_NAMED_BOX.sub("\n", answer or ""), choices, reference, finish_reason)
    after = response.rpartition("</answer>")[2] if "</answer>" in response else ""
    box = read_box(answer or "", size) or (None if answer is None else read_box(after, size))
    score = round(float(iou(box, reference.box)), 6) if box and reference.box else None
    is_right = choice.is_correct and score is not None and score >= MIN_IOU
    return replace(choice, is_correct=is_right, score=score, facts={"choice": int(choice.is_correct)})


def parse_corner_box(cell: Any) -> Box:
    """Return the box of a cell [x, y, width, height] in pixels. Errors: ValueError for another content."""
    try:
        x, y, width, height = map(float, cell)
    except (TypeError, ValueError):
        raise ValueError(f"box {cell!r} is not [x, y, width, height]") from None
    box = Box(x, y, x + width, y + height)
    if not box.is_proper or not all(map(math.isfinite, box)):
        raise ValueError(f"box {cell!r}: width and height must be above 0")
    return box

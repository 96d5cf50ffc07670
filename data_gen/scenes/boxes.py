"""Formats of boxes: corners (x1, y1, x2, y2), or a corner with width and height, told by a source's first boxes."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from data_gen.scenes.scene import SceneFault, is_coordinate, read_image
from data_gen.scenes.sources import Row, Source, open_source

CORNERS, XYWH, AUTO = "corners", "xywh", "auto"
BOX_FORMATS = (AUTO, CORNERS, XYWH)
SAMPLE_ROWS, SAMPLE_BOXES = 50, 300
"""Read from the start of a source to tell its format."""


def open_scenes(locator: str, box_format: str = AUTO) -> Source:
    """The source of a locator, its boxes as corners. Raises ValueError where that cannot be told."""
    source = open_source(locator).check()
    if box_format == AUTO:
        box_format = tell_format(source)
    if box_format == CORNERS:
        return source

    def rows(start: int = 0) -> Iterator[Row]:
        for row in source.rows(start):
            yield row | {"objects": [_with_corners(item) for item in _objects(row)]} if _objects(row) else row

    return replace(source, rows=rows)


def tell_format(source: Source) -> str:
    """The format of a source's boxes.

    A box of corners has x1 < x2 and y1 < y2; one of x, y, width and height ends inside the image. Boxes that fit
    both tell nothing. Raises ValueError where some boxes speak for each.
    """
    if source.locator.startswith("synthetic:"):
        return CORNERS
    number = only_corners = only_sides = 0
    for row in islice(source.rows(), SAMPLE_ROWS):
        boxes = [item["bbox"] for item in _objects(row) if _is_box(item)]
        if not boxes or number >= SAMPLE_BOXES:
            continue
        try:
            _, width, height = read_image(row, source.root)
        except SceneFault:
            continue
        for a, b, c, d in boxes:
            are_corners, are_sides = a < c and b < d, c > 0 and d > 0 and a + c <= width + 1 and b + d <= height + 1
            number += 1
            only_corners += are_corners and not are_sides
            only_sides += are_sides and not are_corners
    if 2 * only_sides <= only_corners:
        return CORNERS
    if 2 * only_corners <= only_sides and 4 * only_sides >= number:
        return XYWH
    raise ValueError(
        f"--source {source.locator}: of its first {number} boxes {only_corners} can only be corners (x1, y1, x2, y2) "
        f"and {only_sides} only x, y, width and height; say which by --box_format={CORNERS} or --box_format={XYWH}"
    )


def _objects(row: Row) -> list[Any]:
    """The objects of a row; none where they cannot be read, which the reader of scenes reports."""
    value = row.get("objects")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    return value if isinstance(value, list) else []


def _is_box(item: Any) -> bool:
    box = item.get("bbox") if isinstance(item, dict) else None
    return isinstance(box, list | tuple) and len(box) == 4 and all(map(is_coordinate, box))


def _with_corners(item: Any) -> Any:
    if not _is_box(item):
        return item
    x, y, width, height = item["bbox"]
    return item | {"bbox": [x, y, x + width, y + height]}

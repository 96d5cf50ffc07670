"""Reward of points: the share of them that lie on what is asked for.

    overall = points inside the mask or one of the boxes / points stated

Source: the success rate of RefSpatial-Bench, https://arxiv.org/abs/2506.04308, section on the benchmark; a point
outside the image is outside the mask.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from spatialthinker.geometry import Box
from spatialthinker.rewards.answers import read_answer
from spatialthinker.rewards.coordinates import Size, check_frame, read_points, stated_size, to_pixels, true_boxes
from spatialthinker.rewards.record import RewardInput
from spatialthinker.rewards.truths import bad_truth, decode_truth, truth_text

MAX_MASK_PIXELS = 100_000_000


class Mask(NamedTuple):
    """A mask as the ends of its runs, outside and inside in turn, down one column after the other."""

    width: int
    height: int
    ends: list[int]

    def holds(self, x: float, y: float) -> bool:
        """True for a point in pixels on the mask."""
        if not (0 <= x < self.width and 0 <= y < self.height):
            return False
        return bisect_right(self.ends, int(x) * self.height + int(y)) % 2 == 1


class _Region(NamedTuple):
    mask: Mask | None
    boxes: list[Box]
    size: Size | None

    def holds(self, x: float, y: float) -> bool:
        if self.mask is not None:
            return self.mask.holds(x, y)
        return any(box.x1 <= x <= box.x2 and box.y1 <= y <= box.y2 for box in self.boxes)


def points(inputs: Sequence[RewardInput], *, frame: str = "pixels") -> list[dict[str, float]]:
    """Returns the share of each response's points on the mask or in a box, 0 where it states none.

    The ground truth is a box or a list of boxes as for the reward `boxes`, or {"mask": M} with M rows of 0 and 1 or
    COCO's {"size": [height, width], "counts": runs or their text}. `frame` is that of the responses: pixels (or
    fractions), or thousandths of the image's sides.
    """
    check_frame(frame)
    results = []
    for item in inputs:
        region, found = _read(item, frame)
        inside = sum(region.holds(x, y) for x, y in found)
        results.append({"overall": inside / len(found) if found else 0.0})
    return results


def check_points(ground_truth: Any, problem: str = "") -> None:
    """Raises ValueError for a ground truth without box or mask, and for a mask of another size than the image."""
    _region(truth_text(ground_truth), stated_size(problem))


def gold_point(ground_truth: Any) -> str:
    """Returns the answer that states a point of the first box or of the mask's longest run, in its own frame."""
    text = truth_text(ground_truth)
    mask = _region(text, None).mask
    if mask is None:
        box = true_boxes(text).boxes[0].box
        return f"({(box.x1 + box.x2) / 2!r}, {(box.y1 + box.y2) / 2!r})"
    runs = list(zip(mask.ends[::2], mask.ends[1::2], strict=False))
    start, end = max(runs, key=lambda run: run[1] - run[0])
    x, y = divmod((start + end - 1) // 2, mask.height)
    return f"({x}, {y})"


def explain_points(item: RewardInput) -> Iterator[str]:
    """Yields a line on each point."""
    region, found = _read(item, "pixels")
    yield f"points:   {len(found)}"
    yield from (f"  ({x:g}, {y:g}) {'inside' if region.holds(x, y) else 'outside'}" for x, y in found[:20])


def _read(item: RewardInput, frame: str) -> tuple[_Region, Sequence[Sequence[float]]]:
    region = _region(truth_text(item.ground_truth), stated_size(item.problem))
    return region, to_pixels(read_points(read_answer(item.response)), region.size, frame)


@lru_cache(maxsize=1024)
def _region(text: str, size: Size | None) -> _Region:
    value = decode_truth(text)
    if isinstance(value, dict) and ("mask" in value or "counts" in value):
        mask = _mask(value.get("mask", value), text)
        if size is not None and size != (mask.width, mask.height):
            raise bad_truth(
                f"is a mask of {mask.width} x {mask.height} pixels for an image of {size[0]} x {size[1]}", text
            )
        return _Region(mask, [], (mask.width, mask.height))
    truth = true_boxes(text)
    if not truth.boxes:
        raise bad_truth("has no box or mask for points to lie in", text)
    size = truth.size or size
    return _Region(None, [Box(*box) for box in to_pixels([box for box, _ in truth.boxes], size)], size)


def _mask(value: Any, text: str) -> Mask:
    try:
        mask = _mask_of_runs(value) if isinstance(value, dict) else _mask_of_rows(value)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise bad_truth(f"is no mask of rows or of COCO's runs ({error})", text) from None
    if not any(start < end for start, end in zip(mask.ends[::2], mask.ends[1::2], strict=False)):
        raise bad_truth("is a mask without a pixel", text)
    return mask


def _mask_of_rows(rows: Any) -> Mask:
    array = np.asarray(rows)
    if array.ndim != 2 or array.size == 0 or array.dtype.kind not in "bif":
        raise ValueError("rows of equal length with 0 and 1 are needed")
    columns = (array != 0).T.ravel()
    changes = np.flatnonzero(np.diff(columns, prepend=False)).tolist()
    return Mask(array.shape[1], array.shape[0], [*changes, columns.size])


def _mask_of_runs(value: dict[str, Any]) -> Mask:
    height, width = value["size"]
    counts = value["counts"]
    counts = _counts_of_text(counts) if isinstance(counts, str) else counts
    if not all(type(count) is int and count >= 0 for count in (height, width, *counts)):
        raise ValueError("size and counts must be whole numbers")
    ends = list(accumulate(counts))
    if not ends or ends[-1] != height * width or height * width > MAX_MASK_PIXELS:
        raise ValueError(f"the runs end at {ends[-1] if ends else 0}, the mask has {height} x {width} pixels")
    return Mask(width, height, ends)


def _counts_of_text(text: str) -> list[int]:
    """Returns the runs of COCO's compressed text: base-32 digits, lowest first, as differences to two runs before."""
    counts: list[int] = []
    value = shift = 0
    for char in text:
        digit = ord(char) - 48
        if not 0 <= digit < 64 or shift > 60:
            raise ValueError(f"{char!r} is no sign of compressed runs")
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("the compressed runs are cut off")
    return counts

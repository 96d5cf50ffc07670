"""Bounding boxes and their overlap: IoU, generalised IoU, complete IoU, L1.

Every function takes boxes as `[..., 4]` (x1, y1, x2, y2: a `Box`, a list or an array), broadcasts the leading
shapes against each other and returns float64 of the broadcast shape. The unit is the caller's (pixels, or
fractions of the image), the same for both arguments: IoU and its relatives do not depend on it.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

EPS = 1e-7
"""Keeps unions, diagonals and aspect ratios away from zero, as in the released reward."""


class Box(NamedTuple):
    """An axis-aligned box by its top left and bottom right corner."""

    x1: float
    y1: float
    x2: float
    y2: float

    @property
    def width(self) -> float:
        return self.x2 - self.x1

    @property
    def height(self) -> float:
        return self.y2 - self.y1

    @property
    def is_proper(self) -> bool:
        """True when the corners are in order: x1 < x2 and y1 < y2."""
        return self.x1 < self.x2 and self.y1 < self.y2


def _corners(boxes: ArrayLike) -> tuple[Array, Array, Array, Array]:
    array = np.asarray(boxes, dtype=np.float64)
    return array[..., 0], array[..., 1], array[..., 2], array[..., 3]


class _Pair(NamedTuple):
    """IoU, union and enclosing sides of pairs of boxes, from as few passes over all pairs as there can be.

    The enclosing sides follow from max(p, q) = p + q - min(p, q), without minima and maxima of their own.
    """

    overlap: Array  # IoU
    union: Array
    enclosing_width: Array
    enclosing_height: Array


def _pair(a: ArrayLike, b: ArrayLike) -> _Pair:
    ax1, ay1, ax2, ay2 = _corners(a)
    bx1, by1, bx2, by2 = _corners(b)
    a_width, a_height, b_width, b_height = ax2 - ax1, ay2 - ay1, bx2 - bx1, by2 - by1
    width = np.minimum(ax2, bx2) - np.maximum(ax1, bx1)  # negative: the gap between them
    height = np.minimum(ay2, by2) - np.maximum(ay1, by1)
    intersection = np.maximum(width, 0.0) * np.maximum(height, 0.0)
    union = a_width * a_height + (b_width * b_height + EPS) - intersection
    return _Pair(intersection / union, union, a_width + b_width - width, a_height + b_height - height)


def iou(a: ArrayLike, b: ArrayLike) -> Array:
    """Intersection over union in [0, 1]: |A n B| / (|A u B| + EPS)."""
    return _pair(a, b).overlap


def giou(a: ArrayLike, b: ArrayLike) -> Array:
    """Generalised IoU in [-1, 1]: IoU - (|E| - |A u B|) / |E| with E the smallest box around both.

    Source: Rezatofighi et al. 2019, https://arxiv.org/abs/1902.09630, algorithm 1.
    """
    pair = _pair(a, b)
    enclosing = pair.enclosing_width * pair.enclosing_height + EPS
    return pair.overlap - (enclosing - pair.union) / enclosing


def ciou(a: ArrayLike, b: ArrayLike) -> Array:
    """Complete IoU in [-1.5, 1]: IoU - d^2 / c^2 - alpha * v.

    d is the distance of the centres and c the diagonal of the smallest box around both;
    v = 4/pi^2 * (atan(w_a / h_a) - atan(w_b / h_b))^2 compares the aspect ratios, alpha = v / (1 - IoU + v).
    Source: Zheng et al. 2020, https://arxiv.org/abs/1911.08287, equations 7 to 11.
    """
    ax1, ay1, ax2, ay2 = _corners(a)
    bx1, by1, bx2, by2 = _corners(b)
    pair = _pair(a, b)
    diagonal = pair.enclosing_width**2 + pair.enclosing_height**2 + EPS
    distance = ((ax1 + ax2) / 2.0 - (bx1 + bx2) / 2.0) ** 2 + ((ay1 + ay2) / 2.0 - (by1 + by2) / 2.0) ** 2
    a_angle, b_angle = np.arctan((ax2 - ax1) / (ay2 - ay1 + EPS)), np.arctan((bx2 - bx1) / (by2 - by1 + EPS))
    aspect = (2.0 / np.pi * a_angle - 2.0 / np.pi * b_angle) ** 2
    return pair.overlap - distance / diagonal - aspect * aspect / (aspect - pair.overlap + (1.0 + EPS))


def l1(a: ArrayLike, b: ArrayLike) -> Array:
    """Mean absolute difference of the four coordinates, in the boxes' unit."""
    return np.abs(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)).mean(axis=-1)


OVERLAPS: dict[str, Callable[[ArrayLike, ArrayLike], Array]] = {
    "iou": iou,
    "giou": lambda a, b: (giou(a, b) + 1.0) / 2.0,
    "ciou": lambda a, b: (ciou(a, b) + 1.0) / 2.0,
}
"""Overlaps as scores, 1 for equal boxes: GIoU and CIoU are shifted by (x + 1) / 2 as in the released reward."""

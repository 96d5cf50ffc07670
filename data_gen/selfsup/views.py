"""Tasks: the same place after a change of view, among marked points and as a point.

The second view is a perspective warp of the picture: with a flat scene, what a camera sees from elsewhere. Its corners
lie inside the picture, so that no border of it shows.
"""

import math
from random import Random

import numpy as np
from PIL import Image

from data_gen.selfsup.puzzle import Puzzle, View, blend, choose
from data_gen.selfsup.sheets import beside, dot
from data_gen.selfsup.turned import TRIES

VIEW_PX = 320
"""Longest side of each of the two views."""
EDGE = 0.1
"""Points keep this share of the sides away from the edge."""
REACH_PX = (20, 10)
"""An answer may miss the place by so much to each side, at difficulty 0 and at 1."""
_LOOK_PX = 12
Point = tuple[float, float]


def view_match(view: View, rng: Random, difficulty: float) -> Puzzle | None:
    """A marked point of the picture and four in a second view; the answer is the same place. Harder: nearer points,
    a stronger change of view."""
    change = _change_view(view, rng, difficulty)
    least = blend(0.34, 0.16, difficulty) * min(change.second.size)
    points: list[Point] = []
    for _ in range(10 * TRIES):
        point = _random_point(change.second, rng)
        is_apart = all(math.dist(point, other) >= least for other in points)
        if is_apart and change.is_rich(point):
            points.append(point)
        if len(points) == 4:
            break
    else:
        return None
    first = change.first.copy()
    dot(first, change.seen_in_first(points[0]))
    second = change.second.copy()
    numbers = rng.sample("1234", 4)
    for number, point in zip(numbers, points, strict=True):
        dot(second, point, number)
    sheet, _ = beside([first, second])
    question = (
        "Both pictures show the same, the right one from another viewpoint. Which numbered point on the right is at "
        "the same place as the ring on the left?"
    )
    options, index = choose(rng, f"point {numbers[0]}", [f"point {number}" for number in numbers[1:]])
    return Puzzle(sheet, question, "relation", "choice", options, index)


def view_point(view: View, rng: Random, difficulty: float) -> Puzzle | None:
    """A marked point of the picture; the answer is the pixel of the same place in a second view.

    The ground truth is the box in which an answer is right. Harder: a smaller box, a stronger change of view.
    """
    change = _change_view(view, rng, difficulty)
    point = next((p for _ in range(TRIES) if change.is_rich(p := _random_point(change.second, rng))), None)
    if point is None:
        return None
    first = change.first.copy()
    dot(first, change.seen_in_first(point))
    sheet, corners = beside([first, change.second])
    x, y = round(corners[1][0] + point[0]), round(point[1])
    question = (
        "Both pictures show the same, the right one from another viewpoint. Give the pixel on the right that is at "
        "the same place as the ring on the left, as (x, y) in pixels of the whole image."
    )
    reach = round(blend(*REACH_PX, difficulty))
    answer = str([x - reach, y - reach, x + reach, y + reach])
    return Puzzle(sheet, question, "instance_location", "points", answer=answer)


class Change:
    """Two views of a picture, and the map between them."""

    def __init__(self, image: Image.Image, corners: list[Point], view: View) -> None:
        """`corners`: what the second view shows at its top left, top right, bottom right and bottom left corner."""
        scale = min(1.0, VIEW_PX / max(image.size))
        size = (round(image.width * scale), round(image.height * scale))
        self.first = image.resize(size, Image.Resampling.BICUBIC)
        self.shape = (size[0] / image.width, size[1] / image.height)
        width, height = size
        self.coefficients = solve_homography([(0, 0), (width, 0), (width, height), (0, height)], corners)
        self.second = image.transform(size, Image.Transform.PERSPECTIVE, self.coefficients, Image.Resampling.BICUBIC)
        self.view = view

    def in_picture(self, point: Point) -> Point:
        """The place in the picture that a point of the second view shows."""
        a, b, c, d, e, f, g, h = self.coefficients
        x, y = point
        scale = g * x + h * y + 1
        return (a * x + b * y + c) / scale, (d * x + e * y + f) / scale

    def seen_in_first(self, point: Point) -> Point:
        """The place in the first view of a point of the second."""
        x, y = self.in_picture(point)
        return x * self.shape[0], y * self.shape[1]

    def is_rich(self, point: Point) -> bool:
        """True for a point whose surroundings are not empty."""
        x, y = map(round, self.in_picture(point))
        return self.view.is_rich((max(x - _LOOK_PX, 0), max(y - _LOOK_PX, 0), x + _LOOK_PX, y + _LOOK_PX))


def _change_view(view: View, rng: Random, difficulty: float) -> Change:
    """A second view whose corners are moved inwards, each by another length."""
    most = blend(0.12, 0.32, difficulty)
    width, height = view.image.size
    corners = []
    for x, y in ((0, 0), (1, 0), (1, 1), (0, 1)):
        dx, dy = (rng.uniform(0.02, most) for _ in range(2))
        corners.append((width * abs(x - dx), height * abs(y - dy)))
    return Change(view.image, corners, view)


def _random_point(image: Image.Image, rng: Random) -> Point:
    return rng.uniform(EDGE, 1 - EDGE) * image.width, rng.uniform(EDGE, 1 - EDGE) * image.height


def solve_homography(points: list[Point], targets: list[Point]) -> tuple[float, ...]:
    """The eight coefficients of the projective map of four points to four targets.

    x' = (a x + b y + c) / (g x + h y + 1), y' = (d x + e y + f) / (g x + h y + 1); Hartley and Zisserman, Multiple
    View Geometry, 2nd edition, section 2.3.
    """
    rows, values = [], []
    for (x, y), (u, v) in zip(points, targets, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return tuple(map(float, np.linalg.solve(np.array(rows, float), np.array(values, float))))

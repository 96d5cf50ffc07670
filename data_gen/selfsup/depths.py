"""Tasks on pictures with depth: the nearer of two points, points in the order of depth, the distance of a point."""

import math
from collections.abc import Callable
from random import Random

import numpy as np

from data_gen.selfsup.puzzle import Puzzle, View, blend, choose
from data_gen.selfsup.sheets import dot

WINDOW_PX = 3
"""The depth around a point, so far to each side, must be known and nearly even."""
MAX_SPREAD = 0.05
MIN_APART = 0.15
"""Distance of two points in the picture, in shorter sides."""
_TRIES = 200
Spot = tuple[int, int, float]
"""x, y in pixels, and depth."""


def nearer(view: View, rng: Random, difficulty: float) -> Puzzle | None:
    """Two marked points; the answer is the nearer one. Harder: a smaller ratio of their depths.

    In half of the rows the nearer point lies higher in the picture, against what floors teach.
    """
    ratio = blend(1.8, 1.15, difficulty)
    is_higher = rng.random() < 0.5

    def fits(spots: list[Spot]) -> bool:
        near, far = sorted(spots, key=lambda spot: spot[2])
        return far[2] >= ratio * near[2] and (near[1] < far[1]) == is_higher

    if (spots := _find_spots(view, rng, 2, fits)) is None:
        return None
    sheet = view.image.copy()
    for number, (x, y, _) in enumerate(spots, 1):
        dot(sheet, (x, y), str(number))
    near = min((0, 1), key=lambda i: spots[i][2])
    options, index = choose(rng, f"point {near + 1}", [f"point {2 - near}"])
    question = "Which of the two marked points is nearer to the camera?"
    return Puzzle(sheet, question, "depth", "choice", options, index)


def depth_order(view: View, rng: Random, difficulty: float) -> Puzzle | None:
    """Three to five marked points; the answer is their order from near to far."""
    number = 3 + min(int(3 * difficulty), 2)
    ratio = blend(1.3, 1.1, difficulty)

    def fits(spots: list[Spot]) -> bool:
        depths = sorted(spot[2] for spot in spots)
        return all(far >= ratio * near for near, far in zip(depths, depths[1:], strict=False))

    if (spots := _find_spots(view, rng, number, fits)) is None:
        return None
    sheet = view.image.copy()
    for i, (x, y, _) in enumerate(spots, 1):
        dot(sheet, (x, y), str(i))
    order = sorted(range(number), key=lambda i: spots[i][2])
    example = ", ".join(map(str, rng.sample(range(1, number + 1), number)))
    question = f"Order the marked points from the nearest to the farthest. Give their numbers, such as {example}."
    return Puzzle(sheet, question, "depth", "ordering", answer=", ".join(str(i + 1) for i in order))


def depth_distance(view: View, rng: Random, difficulty: float) -> Puzzle | None:
    """One marked point; the answer is its distance in metres. Harder: farther away."""
    if not view.is_metric or view.depth is None or not np.isfinite(view.depth).any():
        return None
    low, high = np.nanquantile(view.depth, (blend(0.0, 0.5, difficulty), blend(0.5, 1.0, difficulty)))
    spots = _find_spots(view, rng, 1, lambda found: low <= found[0][2] <= high)
    if spots is None:
        return None
    (x, y, depth), sheet = spots[0], view.image.copy()
    dot(sheet, (x, y))
    question = (
        "How far is the surface at the ring from the camera, along the direction in which the camera looks? Answer "
        "with a number of metres."
    )
    return Puzzle(sheet, question, "distance", "numbers", answer=f"{depth:.2f}")


def _find_spots(view: View, rng: Random, number: int, fits: Callable[[list[Spot]], bool]) -> list[Spot] | None:
    """So many points apart from each other whose depth is certain, in a random order; None where none fit."""
    if view.depth is None:
        return None
    least = MIN_APART * view.short_side
    for _ in range(_TRIES):
        spots: list[Spot] = []
        for _ in range(number):
            x, y = rng.randint(12, view.width - 13), rng.randint(12, view.height - 13)
            depth = _depth_at(view.depth, x, y)
            if depth is None or any(math.dist((x, y), spot[:2]) < least for spot in spots):
                break
            spots.append((x, y, depth))
        if len(spots) == number and fits(spots):
            return spots
    return None


def _depth_at(depth: np.ndarray, x: int, y: int) -> float | None:
    """The depth around a pixel; None where it is unknown or an edge runs through."""
    window = depth[y - WINDOW_PX : y + WINDOW_PX + 1, x - WINDOW_PX : x + WINDOW_PX + 1]
    low, high = float(window.min()), float(window.max())
    return float(depth[y, x]) if math.isfinite(low + high) and 0 < low and high <= (1 + MAX_SPREAD) * low else None

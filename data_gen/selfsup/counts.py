"""Tasks on annotated objects: their number, and their boxes."""

from random import Random

from data_gen.selfsup.puzzle import PixelBox, Puzzle, Thing, View

COUNTS = ((1, 2), (3, 5), (6, 20))
"""Numbers of objects for the easy, the medium and the hard third."""
MAX_BOXES = 6
MIN_BOX_PX = 8.0
"""Shorter side of the smallest object that a box is asked of."""


def count(view: View, rng: Random, difficulty: float) -> Puzzle | None:
    """The number of annotated objects of one name."""
    groups = _by_name(view)
    low, high = COUNTS[min(int(3 * difficulty), 2)]
    names = sorted(name for name, things in groups.items() if low <= len(things) <= high)
    if not names:
        return None
    name = rng.choice(names)
    evidence = tuple((name, _pixels(thing)) for thing in groups[name])
    question = f"How many objects of the kind {name!r} does the picture show? Answer with a whole number."
    return Puzzle(view.image, question, "count", "numbers", answer=str(len(evidence)), evidence=evidence)


def boxes(view: View, rng: Random, difficulty: float) -> Puzzle | None:
    """The boxes of all annotated objects of one name. Harder: more objects."""
    groups = _by_name(view)
    most = 1 if difficulty < 1 / 3 else 3 if difficulty < 2 / 3 else MAX_BOXES
    least = 1 if difficulty < 1 / 3 else 2
    names = sorted(
        name for name, things in groups.items() if least <= len(things) <= most and all(map(_is_visible, things))
    )
    if not names:
        return None
    name = rng.choice(names)
    found = [_pixels(thing) for thing in groups[name]]
    question = (
        f"Give the box of every object of the kind {name!r} in the picture as [[x1, y1, x2, y2], ...] in pixels."
    )
    evidence = tuple((name, box) for box in found)
    answer = str([list(box) for box in found])
    return Puzzle(view.image, question, "instance_location", "boxes", answer=answer, evidence=evidence)


def _by_name(view: View) -> dict[str, list[Thing]]:
    groups: dict[str, list[Thing]] = {}
    for thing in view.things:
        groups.setdefault(thing.name, []).append(thing)
    return groups


def _is_visible(thing: Thing) -> bool:
    x1, y1, x2, y2 = thing.box
    return min(x2 - x1, y2 - y1) >= MIN_BOX_PX


def _pixels(thing: Thing) -> PixelBox:
    x1, y1, x2, y2 = map(round, thing.box)
    return x1, y1, x2, y2

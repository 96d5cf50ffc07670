"""Spatial predicates: the ways in which each is said, its inverse, and its truth by two boxes.

Centres decide sides, areas and sides of boxes decide sizes, overlap decides reach. Depth is none that boxes decide.
"""

import math
import re
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import NamedTuple

from spatialthinker.answer_grammar import MAX_CACHED_CHARS, normalize
from spatialthinker.geometry import Box

MARGIN = 0.25
"""Distance of two centres along an axis, in mean sides, below which neither side is meant."""
MIN_RATIO = 1.1
"""Ratio of two sizes or distances below which they count as equal."""
TOUCH_PX = 2.0
INSIDE_SHARE = 0.95


class Predicate(NamedTuple):
    """A spatial predicate."""

    words: str
    """Regular expression of the ways in which it is said."""
    inverse: str
    """The predicate of object and subject."""
    holds: Callable[[Box, Box], bool | None] | None = None
    """Its truth by boxes, None where they leave it open."""
    is_projective: bool = True
    """True where boxes and a stated relation must agree; sizes in an image may differ from those in the world."""


def _is_before(a: tuple[float, float], b: tuple[float, float]) -> bool | None:
    """True where interval a lies before b by their centres; None where they are level."""
    distance, scale = (sum(b) - sum(a)) / 2, (a[1] - a[0] + b[1] - b[0]) / 2
    return None if abs(distance) < MARGIN * scale else distance > 0


def _is_left(a: Box, b: Box) -> bool | None:
    return _is_before((a.x1, a.x2), (b.x1, b.x2))


def _is_above(a: Box, b: Box) -> bool | None:
    return _is_before((a.y1, a.y2), (b.y1, b.y2))


def gap(a: Box, b: Box) -> float:
    """The distance of two boxes, negative by the depth of their overlap."""
    x, y = max(a.x1, b.x1) - min(a.x2, b.x2), max(a.y1, b.y1) - min(a.y2, b.y2)
    return math.hypot(max(x, 0.0), max(y, 0.0)) if max(x, y) > 0 else max(x, y)


def _is_inside(a: Box, b: Box) -> bool:
    width, height = min(a.x2, b.x2) - max(a.x1, b.x1), min(a.y2, b.y2) - max(a.y1, b.y1)
    return max(width, 0.0) * max(height, 0.0) >= INSIDE_SHARE * a.width * a.height and _area(a) < _area(b)


def _area(box: Box) -> float:
    return box.width * box.height


def _is_more(key: Callable[[Box], float], a: Box, b: Box) -> bool | None:
    return None if max(key(a), key(b)) < MIN_RATIO * min(key(a), key(b)) else key(a) > key(b)


def _is_less(key: Callable[[Box], float], a: Box, b: Box) -> bool | None:
    return _is_more(key, b, a)


def _compared(more: str, less: str, key: Callable[[Box], float]) -> dict[str, Predicate]:
    """The pair of predicates of a measure, by the stems of its two adjectives."""
    names = (f"{more}er than", f"{less}er than")
    words = (rf"(?:{stem})(?:er(?: than)?|est)" for stem in (more, less))
    rows = zip(names, words, names[::-1], (_is_more, _is_less), strict=True)
    return {name: Predicate(said, other, partial(test, key), False) for name, said, other, test in rows}


def _may_cover(a: Box, b: Box) -> bool | None:
    """False for boxes that do not overlap; of two that do, boxes do not say which lies on top."""
    return None if gap(a, b) < -TOUCH_PX else False


PREDICATES: Mapping[str, Predicate] = {
    "left of": Predicate(r"left(?: hand)?(?: side)?(?: of)?|leftmost", "right of", _is_left),
    "right of": Predicate(r"right(?: hand)?(?: side)?(?: of)?|rightmost", "left of", lambda a, b: _is_left(b, a)),
    "above": Predicate(r"above|over|higher(?: than)?|highest|topmost", "below", _is_above),
    "below": Predicate(
        r"below|under|underneath|beneath|lower(?: than)?|lowest|bottommost", "above", lambda a, b: _is_above(b, a)
    ),
    "inside": Predicate(r"inside(?: of)?|within|contained (?:in|by)|enclosed (?:in|by)", "containing", _is_inside),
    "containing": Predicate(r"contain(?:s|ing)|enclos(?:es|ing)|around", "inside", lambda a, b: _is_inside(b, a)),
    "apart from": Predicate(
        r"apart(?: from)?|separated?(?: from)?|not touching", "apart from", lambda a, b: gap(a, b) > TOUCH_PX
    ),
    "touching": Predicate(
        r"(?<!not )touch(?:es|ing)?|in contact with", "touching", lambda a, b: abs(gap(a, b)) <= TOUCH_PX
    ),
    "overlapping": Predicate(
        r"(?:overlap|intersect)(?:s|p?ing)?(?: with)?", "overlapping", lambda a, b: gap(a, b) < -TOUCH_PX
    ),
    "covering": Predicate(r"cover(?:s|ing)", "covered by", _may_cover),
    "covered by": Predicate(r"covered by", "covering", _may_cover),
    "in front of": Predicate(r"in front(?: of)?", "behind"),
    "behind": Predicate(r"behind", "in front of"),
    "nearer to": Predicate(r"(?:near|clos)(?:er|est)(?: to)?", ""),
    "farther from": Predicate(r"f[au]rth(?:er|est)(?: away)?(?: from)?", ""),
    "same size as": Predicate(
        r"(?:the )?same size(?: as)?|equally (?:big|large)|as (?:big|large) as",
        "same size as",
        lambda a, b: _is_more(_area, a, b) is None,
        is_projective=False,
    ),
    **_compared("larg|bigg|great", "small", _area),
    **_compared("tall", "short", lambda box: box.height),
    **_compared("wid", "narrow", lambda box: box.width),
}
_SAID = {name: re.compile(rf"\b(?:{row.words})(?!\w)") for name, row in PREDICATES.items()}
ANY_WORDS = "|".join(row.words for row in PREDICATES.values())
"""Regular expression of all ways in which predicates are said."""
FILLERS = re.compile(
    r"\b(?:to|on|in|at|it|is|the|of|and|its|side|directly|than|from|are|a|an|they|that|which)\b"
    r"|[^\w ]"
)


def name_predicate(text: str) -> str:
    """Return the predicate of which a text holds the longest words; "" for none."""
    found = [(match.end() - match.start(), name) for name, said in _SAID.items() if (match := said.search(text))]
    return max(found)[1] if found else ""


def name_predicates(text: str) -> frozenset[str]:
    """Return the predicates that a text consists of; none where it says anything else."""
    return _name_short(text) if len(text) <= MAX_CACHED_CHARS else _name_all(text)


def _name_all(text: str) -> frozenset[str]:
    rest, found = normalize(text), set()
    for name, said in _SAID.items():
        if said.search(rest):
            rest = said.sub(" ", rest)
            found.add(name)
    return frozenset() if FILLERS.sub(" ", rest).strip() else frozenset(found)


_name_short = lru_cache(maxsize=4096)(_name_all)

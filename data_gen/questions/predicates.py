"""Predicates of a scene graph: spatial families, contradictions, and relations that boxes decide.

Visual Genome's predicates are free text; each belongs to one family here or to none.
"""

from spatialthinker.geometry import Box

FAMILIES: dict[str, tuple[str, ...]] = {
    "left": ("to the left of", "left of", "on the left of", "on left of"),
    "right": ("to the right of", "right of", "on the right of", "on right of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "beneath", "underneath"),
    "front": ("in front of", "before"),
    "behind": ("behind", "in back of", "at the back of"),
    "on": ("on", "on top of", "sitting on", "standing on", "lying on", "laying on", "parked on", "mounted on"),
    "inside": ("in", "inside", "within", "inside of"),
}
SPATIAL = {predicate: family for family, predicates in FAMILIES.items() for predicate in predicates}

OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above", "front": "behind", "behind": "front"}

SPOKEN = {family: predicates[0] for family, predicates in FAMILIES.items()} | {"inside": "inside"}
"""The words in which an option states a family."""

_COMPATIBLE = {
    "above": ("on",),
    "on": ("above", "front", "inside"),
    "inside": ("on", "front", "behind"),
    "front": ("on", "inside"),
    "behind": ("inside",),
}
"""Families that may be true together with another one, apart from what boxes decide."""

CONTACTS = ("touching", "covering", "covered by", "apart from")
"""Contact of two things; of the first three one is listed, the last is a question's wrong option against it."""

_ACTIONS = ("holding", "riding", "eating", "standing on", "lying on", "leaning against", "hanging from")
"""Interactions that a question offers as wrong."""

# Interactions by what may be true beside them and is no wrong option for that reason.
_MAY_BE_TOO: dict[tuple[str, ...], tuple[str, ...]] = {
    ("holding", "carrying", "using", "playing", "swinging", "pulling", "hitting", "playing with"): (
        *("holding", "eating", "hanging from"),
    ),
    ("riding", "on back of"): ("riding", "standing on", "lying on"),
    ("sitting on",): ("riding", "lying on", "leaning against"),
    ("eating", "drinking"): ("eating", "holding", "leaning against"),
    ("standing on", "walking on", "walking in"): ("standing on", "riding"),
    ("parked on",): ("standing on", "leaning against"),
    ("lying on", "laying on", "sleeping on"): ("lying on", "riding", "leaning against"),
    ("leaning on", "leaning against"): ("leaning against", "lying on", "standing on"),
    ("hanging from",): ("hanging from", "holding", "leaning against"),
}
_BESIDE = {action: others for actions, others in _MAY_BE_TOO.items() for action in actions}


def false_contacts(predicate: str, listed: set[str]) -> list[str]:
    """Interactions that are safely untrue of two objects beside the given one; none for one that is no interaction.

    `listed` are all predicates between the two.
    """
    if predicate in CONTACTS[:3]:  # what covers a thing also touches it
        return [other for other in CONTACTS[1:] if other not in listed]
    if predicate not in _BESIDE:
        return []
    true = {other for name in listed for other in (name, *_BESIDE.get(name, ()))}
    return [other for other in _ACTIONS if other not in true]


def box_families(subject: Box, target: Box) -> dict[str, bool]:
    """For each of left, right, above, below whether the boxes show it (True) or rule it out (False).

    Shown: the subject's box lies wholly on that side. Ruled out: neither its centre nor its near edge does. A family
    that is missing is open.
    """
    (sx, sy), (tx, ty) = centre(subject), centre(target)
    known: dict[str, bool] = {}
    for family, apart, by_centre, by_edge in (
        ("left", subject.x2 <= target.x1, sx < tx, subject.x1 < target.x1),
        ("right", subject.x1 >= target.x2, sx > tx, subject.x2 > target.x2),
        ("above", subject.y2 <= target.y1, sy < ty, subject.y1 < target.y1),
        ("below", subject.y1 >= target.y2, sy > ty, subject.y2 > target.y2),
    ):
        if apart:
            known[family] = True
        elif not by_centre and not by_edge:
            known[family] = False
    return known


def false_families(stated: set[str], subject: Box, target: Box) -> list[str]:
    """Families that are safely untrue of a pair whose listed relations belong to `stated`."""
    possible = set(stated).union(*(_COMPATIBLE.get(family, ()) for family in stated))
    opposites = {OPPOSITE[family] for family in stated if family in OPPOSITE}
    false = {family for family, is_shown in box_families(subject, target).items() if not is_shown}
    false |= opposites & {"front", "behind"}
    if stated & {"front", "behind", "below"}:
        false |= {"on", "inside"}
    if not _overlap(subject, target):
        false.add("inside")
    return sorted([f for f in FAMILIES if f in false - possible], key=lambda family: family not in opposites)


def centre(box: Box) -> tuple[float, float]:
    """The middle of a box."""
    return (box.x1 + box.x2) / 2, (box.y1 + box.y2) / 2


def gap_px(a: Box, b: Box) -> float:
    """The shortest distance between two boxes, 0 where they touch or overlap."""
    dx = max(a.x1 - b.x2, b.x1 - a.x2, 0.0)
    dy = max(a.y1 - b.y2, b.y1 - a.y2, 0.0)
    return (dx * dx + dy * dy) ** 0.5


def _overlap(a: Box, b: Box) -> bool:
    return a.x1 < b.x2 and b.x1 < a.x2 and a.y1 < b.y2 and b.y1 < a.y2


PLACES = (
    *("top left", "top center", "top right"),
    *("middle left", "center", "middle right"),
    *("bottom left", "bottom center", "bottom right"),
)
"""The ninths of an image, row by row."""


def place_of(box: Box, width: int, height: int, margin: float = 0.0) -> str | None:
    """The ninth of the image that holds a box's centre; None where it is nearer than `margin` (a share of the side)
    to the border of two ninths."""
    x, y = centre(box)
    if min(abs(share - third) for share in (x / width, y / height) for third in (1 / 3, 2 / 3)) < margin:
        return None
    return PLACES[3 * min(int(y / height * 3), 2) + min(int(x / width * 3), 2)]


def is_mostly_in_place(box: Box, width: int, height: int) -> bool:
    """True when at least half of a box lies in the ninth of the image that holds its centre."""
    x, y = centre(box)
    column, row = min(int(3 * x / width), 2), min(int(3 * y / height), 2)
    across = min(box.x2, (column + 1) * width / 3) - max(box.x1, column * width / 3)
    down = min(box.y2, (row + 1) * height / 3) - max(box.y1, row * height / 3)
    return across * down >= 0.5 * box.width * box.height

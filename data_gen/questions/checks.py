"""Checks of a draft against the columns' contract and, where boxes decide, against geometry.

find_faults(draft, scene) -> list of reasons, empty for a draft that may become a row
"""

import math
import re
from collections.abc import Callable

from data_gen.questions.draft import Draft
from data_gen.questions.predicates import OPPOSITE, SPATIAL, box_families, centre, gap_px, place_of
from data_gen.scenes.naming import is_called, is_plural, latin, may_be_confused, singular
from data_gen.scenes.scene import Scene
from spatialthinker.geometry import Box
from spatialthinker.scene_graph import SceneObject
from spatialthinker.schema import LETTERS, find_label_faults

MAX_QUESTION_CHARS, MAX_OPTION_CHARS = 400, 120
_OBJECT_ID = re.compile(r"\b[a-z_]+\.\d+\b")
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
_LARGER = re.compile(r"\b(larger|bigger|greater|taller|longer|wider|higher)\b")
_SMALLER = re.compile(r"\b(smaller|tinier|littler|shorter|narrower)\b")
_SAME = re.compile(r"\b(same|equal|equally|similar|identical)\b")
_HEIGHT = re.compile(r"\b(tall|taller|shorter|high|higher|height)\b")
_WIDTH = re.compile(r"\b(wide|wider|narrower|width)\b")
SIZE_MARGIN = 1.1
"""Sizes and distances that differ by less decide nothing: boxes are drawn by hand."""


def find_faults(draft: Draft, scene: Scene) -> list[str]:
    """Every reason for which the draft must not become a row; geometry is asked only of a draft in the right form."""
    if faults := find_form_faults(draft) or find_evidence_faults(draft, scene):
        return faults
    check = GEOMETRY.get(draft.category)
    fault = check(draft, scene) if check else None
    return [fault] if fault else []


def find_form_faults(draft: Draft) -> list[str]:
    """Reasons that the draft alone shows."""
    faults = find_label_faults(draft.category, draft.level, draft.rating)
    if not draft.question.strip() or len(draft.question) > MAX_QUESTION_CHARS:
        faults.append(f"the question has {len(draft.question)} characters, need 1 to {MAX_QUESTION_CHARS}")
    if "<" in draft.question:
        faults.append("the question holds a tag")
    if match := _OBJECT_ID.search(draft.question):
        faults.append(f"the question names the id {match[0]!r}; use the name alone")
    texts = [option.strip() for option in draft.options]
    if not 2 <= len(texts) <= len(LETTERS):
        faults.append(f"{len(texts)} options, need 2 to {len(LETTERS)}")
    if len({text.casefold() for text in texts}) != len(texts):
        faults.append(f"two options are the same: {texts}")
    for text in texts:
        if not 0 < len(text) <= MAX_OPTION_CHARS or "<" in text or "\n" in text:
            faults.append(f"option {text[:60]!r} is empty, too long, or holds a tag or a line break")
        elif _OBJECT_ID.search(text):
            faults.append(f"option {text!r} names an id; use the name alone")
    if not 0 <= draft.answer_index < len(texts):
        faults.append(f"the answer is not one of the {len(texts)} options")
    return faults


def find_evidence_faults(draft: Draft, scene: Scene) -> list[str]:
    """Reasons that lie between the draft's evidence and the graph."""
    faults = [f"evidence id {i!r} is not in the graph" for i in draft.evidence if i not in scene.by_id]
    if not draft.evidence or len(set(draft.evidence)) != len(draft.evidence):
        faults.append(f"evidence ids must be one or more, each once; got {list(draft.evidence)}")
    known = set(scene.relations)
    for r in draft.relations:
        text = f"{r.subject} {r.predicate} {r.object}"
        if r not in known:
            faults.append(f"evidence relation {text!r} is not in the graph")
        elif not {r.subject, r.object} <= set(draft.evidence):
            faults.append(f"evidence relation {text!r} has an end that is not among the evidence ids")
    return faults


def _objects(draft: Draft, scene: Scene) -> list[SceneObject]:
    return [scene.by_id[i] for i in draft.evidence]


def _named(text: str, objects: list[SceneObject]) -> list[SceneObject]:
    """The objects that a text may mean: by their own name, else by a synonym."""
    words = latin(text).removeprefix("the ").removeprefix("a ").removeprefix("an ").strip(" .")
    return [x for x in objects if x.label == words] or [
        x for x in objects if may_be_confused(x.label, singular(words))
    ]


def check_count(draft: Draft, scene: Scene) -> str | None:
    """The right option is the number of evidence objects, and these are all objects of one kind."""
    objects = _objects(draft, scene)
    numbers = [number_of(option) for option in draft.options]
    if None in numbers:
        return f"options of a count question must be whole numbers, got {list(draft.options)}"
    kinds = [name for name in _asked_kinds(draft, objects) if all(is_called(x.label, name) for x in objects)]
    if not kinds:
        return f"the question counts none of the evidence: {', '.join(x.label for x in objects)}"
    members = [item for item in scene.objects if is_called(item.label, kinds[0])]
    if several := [item.label for item in members if is_plural(item.label)]:
        return f"a box named {several[0]!r} stands for an unknown number"
    if numbers[draft.answer_index] != len(members):
        return f"the answer is {draft.answer!r}, but the graph has {len(members)} of {kinds[0]!r}"
    if len(objects) != len(members):
        return f"the evidence names {len(objects)} of the {len(members)} objects of {kinds[0]!r}"
    return None


def _asked_kinds(draft: Draft, objects: list[SceneObject]) -> list[str]:
    """Names in the counted part of the question ("how many MEN ...", "the number of PLATES ..."), longest first."""
    question = latin(draft.question)
    match = re.search(r"(?:how many|number of)\s+(.*)", question)
    words = re.findall(r"[a-z]+", match[1] if match else question)
    phrases = [(i, " ".join(words[i : i + n])) for i in range(len(words)) for n in (3, 2, 1)]
    labels = {x.label for x in objects}
    return [singular(p) for i, p in phrases if i < 4 and any(is_called(label, singular(p)) for label in labels)]


def number_of(text: str) -> int | None:
    """The whole number that a text states in digits or as a word up to twelve."""
    word = text.strip().casefold().rstrip(".")
    if word.isdecimal():
        return int(word)
    return _NUMBER_WORDS.index(word) if word in _NUMBER_WORDS else None


def check_size(draft: Draft, scene: Scene) -> str | None:
    """A comparative for the first evidence object against the second, or the name of the larger or smaller one."""
    objects = _objects(draft, scene)
    if len(objects) != 2:
        return f"a size question needs two evidence objects, got {len(objects)}"
    question = draft.question.casefold()
    if chosen := _named(draft.answer, objects):
        direction = -1 if _SMALLER.search(question) or "smallest" in question else 1
        if len(chosen) != 1:
            return f"the answer {draft.answer!r} may mean either object"
        ratio = _size_ratio(draft, chosen[0].box, next(x for x in objects if x is not chosen[0]).box)
    else:
        said = draft.answer.casefold()
        direction = next((n for sought, n in ((_SAME, 0), (_LARGER, 1), (_SMALLER, -1)) if sought.search(said)), None)
        ratio = _size_ratio(draft, objects[0].box, objects[1].box)
    if direction is None:
        return f"the answer {draft.answer!r} is no comparative of size"
    shown = 0 if 1 / SIZE_MARGIN <= ratio <= SIZE_MARGIN else 1 if ratio > 1 else -1
    if direction == shown or (direction == 0 and 1 / (SIZE_MARGIN**2) <= ratio <= SIZE_MARGIN**2):
        return None
    ids = f"{objects[0].id} to {objects[1].id}"
    return f"the answer {draft.answer!r} contradicts the boxes: ratio {ratio:.2f} of {ids}"


def _size_ratio(draft: Draft, a: Box, b: Box) -> float:
    text = f"{draft.question} {draft.answer}".casefold()
    if _HEIGHT.search(text):
        return a.height / b.height
    if _WIDTH.search(text):
        return a.width / b.width
    return (a.width * a.height) / (b.width * b.height)


def check_distance(draft: Draft, scene: Scene) -> str | None:
    """Evidence: the reference first, then the candidates; the answer names the one nearest in the image."""
    target, *others = _objects(draft, scene)
    chosen = _named(draft.answer, others)
    if len(others) < 2 or len(chosen) != 1:
        return f"the answer {draft.answer!r} names {len(chosen)} of the {len(others)} candidates; need 1 of 2 or more"
    is_farthest = re.search(r"\b(farther|farthest|further|furthest)\b", draft.question.casefold()) is not None
    spans = {x.id: math.dist(centre(x.box), centre(target.box)) for x in others}
    gaps = {x.id: gap_px(x.box, target.box) for x in others}
    for other in others:
        first, second = (other.id, chosen[0].id) if is_farthest else (chosen[0].id, other.id)
        if first != second and (spans[first] * SIZE_MARGIN > spans[second] or gaps[first] > gaps[second]):
            return f"the boxes do not show that {first} is nearer to {target.id} than {second}"
    return None


def check_instance_location(draft: Draft, scene: Scene) -> str | None:
    """One object whose name is unique; the answer is the part of the image that holds its centre, and no other is."""
    objects = _objects(draft, scene)
    if len(objects) != 1 or objects[0].label not in scene.unique_names:
        return f"instance_location needs one object with a name of its own, got {[x.id for x in objects]}"
    cells = [_cells(option) for option in draft.options]
    if None in cells:
        return f"option {draft.options[cells.index(None)]!r} names no part of the image"
    x, y = centre(objects[0].box)
    position = (3 * y / scene.height, 3 * x / scene.width)
    is_true = [_is_within(position, bands, 0.0) for bands in cells if bands]
    answer = cells[draft.answer_index]
    if answer is None or not _is_within(position, answer, _PLACE_TOLERANCE):
        place = place_of(objects[0].box, scene.width, scene.height)
        return f"the answer {draft.answer!r} contradicts the box, whose centre is at {place}"
    others = [text for i, text in enumerate(draft.options) if is_true[i] and i != draft.answer_index]
    return f"option {others[0]!r} is true as well" if others else None


_PLACE_WORDS = {word: word for word in ("left", "right", "top", "bottom", "center")}
_PLACE_WORDS |= {"upper": "top", "lower": "bottom"} | dict.fromkeys(("centre", "central", "middle"), "center")

_PLACE_TOLERANCE = 0.5
"""Distance, in thirds of the side, of a centre outside the named part: "left" is said of the left half."""

_Bands = tuple[tuple[int, int], tuple[int, int]]


def _cells(text: str) -> _Bands | None:
    """The first and last third that a text names, vertically and horizontally; None where it names none."""
    words = {_PLACE_WORDS[word] for word in re.findall(r"[a-z]+", text.casefold()) if word in _PLACE_WORDS}
    if not words:
        return None
    bands = []
    for low, high in (("top", "bottom"), ("left", "right")):
        if {low, high} <= words:
            return None
        bands.append((0, 0) if low in words else (2, 2) if high in words else (1, 1) if "center" in words else (0, 2))
    return bands[0], bands[1]


def _is_within(position: tuple[float, float], bands: _Bands, tolerance: float) -> bool:
    pairs = zip(position, bands, strict=True)
    return all(first - tolerance <= x <= last + 1 + tolerance for x, (first, last) in pairs)


def check_pair(draft: Draft, scene: Scene) -> str | None:
    """A listed relation between two evidence objects, and no box that rules the answer out."""
    if len(draft.evidence) < 2 or not draft.relations:
        return f"a {draft.category} question needs two evidence objects and a listed relation between them"
    first = draft.relations[0]
    family = SPATIAL.get(draft.answer.casefold().strip(" ."))
    if draft.category == "relation" and family is not None:
        known = box_families(scene.by_id[first.subject].box, scene.by_id[first.object].box)
        if known.get(family) is False:
            known = box_families(scene.by_id[first.object].box, scene.by_id[first.subject].box)
            if known.get(family) is False or OPPOSITE.get(family) == SPATIAL.get(first.predicate):
                return f"the answer {draft.answer!r} contradicts the boxes of {first.subject} and {first.object}"
    return None


def check_existence(draft: Draft, scene: Scene) -> str | None:
    """Options yes and no."""
    if sorted(option.casefold().strip(" .") for option in draft.options) != ["no", "yes"]:
        return f"options of an existence question must be yes and no, got {list(draft.options)}"
    return None


def check_depth(draft: Draft, scene: Scene) -> str | None:
    """Two evidence objects or more, of which the answer names one."""
    objects = _objects(draft, scene)
    chosen = _named(draft.answer, objects)
    if len(objects) < 2 or len(chosen) != 1:
        return f"the answer {draft.answer!r} names {len(chosen)} of the {len(objects)} evidence objects; need 1 of 2"
    return None


GEOMETRY: dict[str, Callable[[Draft, Scene], str | None]] = {
    "relation": check_pair,
    "reach": check_pair,
    "size": check_size,
    "instance_location": check_instance_location,
    "depth": check_depth,
    "distance": check_distance,
    "count": check_count,
    "existence": check_existence,
}

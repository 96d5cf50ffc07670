"""The option that a scene graph leads to, for questions that its boxes and stated relations decide.

`answer_from_scene` reads the kind of a question and the objects that it names, and decides by geometry in the image:
centres for sides and nearness, areas for sizes, overlap for reach. Depth is decided by stated relations alone. A scene
that lacks an object that must be there, holds several of it, contradicts itself or leaves two options open decides
nothing; where a question asks from somebody's point of view, no scene does.

Time is linear in the number of objects and relations for each object that the question names.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from spatialthinker.answer_grammar import LETTERS, MAX_CACHED_CHARS, normalize, singular, without_lead
from spatialthinker.geometry import Box
from spatialthinker.predicates import (
    ANY_WORDS,
    FILLERS,
    MIN_RATIO,
    PREDICATES,
    gap,
    name_predicate,
    name_predicates,
)
from spatialthinker.response import NUMBER_WORDS, extract_choice
from spatialthinker.scene_graph import SceneGraph, SceneObject

DOMINANCE = 2.0
"""Ratio of two distances from which one direction is meant where two are true."""
MAX_QUESTION_CHARS = 600


class SceneAnswer(NamedTuple):
    """The kind of a question, and the index of the option that the scene leads to; None where it decides nothing."""

    kind: str
    index: int | None


_A, _B = r"(?:the |an? |any )?(?P<a>[\w' -]{1,60}?)", r"(?:the |an? |any )?(?P<b>(?!in the )[\w' -]{1,60}?)"
_IS = r"(?:is|are|lies|lie|stands|does)"
_TO = r"(?:as seen from|in relation to|relative to|with respect to|compared (?:to|with)|next to|from)"
_PLACED = r"(?: (?:located|positioned|placed|situated|lying|standing))?"
_IMAGE = r"(?:image|picture|photo|frame|scene)"
_IN_IMAGE = rf"(?:(?:with)?in the {_IMAGE})"
_P = rf"(?:(?:to|on) )?(?:the )?(?P<p>{ANY_WORDS})"
QUESTIONS: Sequence[tuple[str, str, str]] = (
    (
        "count",
        "How many cats are left of the dog?",
        rf"how many (?P<a>[\w' -]{{1,60}}?)(?: (?:are|is|can|do|in)\b(?: there\b)?(?: {_P} {_B}|.{{0,60}})?)?",
    ),
    (
        "place",
        "In which part of the image is the cat?",
        rf"(?:in )?(?:which|what) (?:part|corner|area|region|side) of the {_IMAGE} {_IS} {_A}{_PLACED}(?: in| lie)?",
    ),
    ("place", "Where in the image is the cat?", rf"where {_IN_IMAGE} {_IS} {_A}{_PLACED}"),
    ("place", "Where is the cat in the image?", rf"where {_IS} {_A}{_PLACED} {_IN_IMAGE}"),
    (
        "relation",
        "Where is the cat relative to the dog?",
        rf"(?:where|how|in (?:which|what) direction) {_IS} {_A}{_PLACED} {_TO} {_B}",
    ),
    ("relation", "How does the cat meet the dog?", rf"how does {_A} (?:meet|touch|relate to) {_B}"),
    ("relation", "How big is the cat next to the dog?", rf"how (?:big|large|small|tall|wide) {_IS} {_A} {_TO} {_B}"),
    (
        "relation",
        "What is the relation between the cat and the dog?",
        r"what is the (?:spatial |relative )?(?:relation(?:ship)?|position|location) (?:of|between) "
        rf"{_A} (?:and|to|{_TO}) {_B}",
    ),
    ("relation", "On which side of the dog is the cat?", rf"(?:on )?which side of {_B} {_IS} {_A}(?: on)?"),
    (
        "relation",
        "Is the cat left or right of the dog?",
        rf"{_IS} {_A} (?:(?:to|on) )?(?:the )?(?:{ANY_WORDS}),? or (?:(?:to|on) )?(?:the )?(?:{ANY_WORDS}) {_B}",
    ),
    (
        "existence",
        "Is there a cat left of the dog?",
        rf"{_IS} there {_A}(?: (?:is |are )?{_P} {_B}| {_IN_IMAGE})?",
    ),
    ("existence", "Is the cat left of the dog?", rf"{_IS} {_A} {_P} {_B}"),
    (
        "choice",
        "Which is nearer to the dog, the cat or the hen?",
        rf"(?:which|what)(?: [\w' -]{{1,40}}?)?(?: {_IS})? {_P}(?: {_B})?(?:[,:] .{{0,120}}| {_IN_IMAGE})?",
    ),
)
"""(kind, example, form) of the questions that scenes decide, in the order in which they are tried."""
_FORMS = [(kind, re.compile(form)) for kind, _, form in QUESTIONS]
_VIEWPOINT = re.compile(
    r"\b(?:perspective|point of view|viewpoint|facing|if (?:you|i|we|one)|you are|his|her|their)\b|\bfrom its\b"
)
_CAMERA = re.compile(r"(?:the )?(?:camera|viewer|observer|photographer|us|me|front|foreground)")
_GENERIC = frozenset("shape object thing item".split())
_IDLE = frozenset("the a an this that there any many total different visible".split())
_PLACES = {
    "left": (0, 0.2),
    "right": (0, 0.8),
    "top": (1, 0.2),
    "upper": (1, 0.2),
    "bottom": (1, 0.8),
    "lower": (1, 0.8),
}
"""Word for a part of an image -> its axis and its middle, as a fraction of the side."""


class _Reading(NamedTuple):
    """A question's kind, the phrases for its objects, and the predicate between them."""

    kind: str
    a: str
    b: str
    predicate: str


def answer_from_scene(
    scene: SceneGraph, question: str, options: Sequence[str], size: tuple[int, int] | None = None
) -> SceneAnswer | None:
    """Return the kind of a question and the option that a scene leads to; None for a kind that no scene decides.

    Args:
        size: width and height of the image, for questions on places in it; without it they stay open.
    """
    reading = read_question(question[:MAX_QUESTION_CHARS], tuple(options))
    if reading is None:
        return None
    if not scene.objects or any(not item.box.is_proper for item in scene.objects):
        return SceneAnswer(reading.kind, None)
    return SceneAnswer(reading.kind, _DECIDE[reading.kind](_Scene(scene, size), reading, options))


@lru_cache(maxsize=1024)
def read_question(question: str, options: tuple[str, ...]) -> _Reading | None:
    """Return what a question asks, None where its form or its options are of no kind that scenes decide."""
    text = re.split(r"(?i)\boptions?\s*:|\n\(?A[).]", question[:MAX_QUESTION_CHARS])[0]
    plain = " ".join(text.lower().replace("?", " ").split()).removeprefix("q. ").rstrip(" .:")
    plain = re.split(r"\. ", plain)[-1]
    if len(options) < 2 or _VIEWPOINT.search(plain):
        return None
    for kind, form in _FORMS:
        if match := form.fullmatch(plain):
            found = {name: value or "" for name, value in match.groupdict().items()}
            predicate = name_predicate(found.get("p", ""))
            reading = _Reading(kind, found.get("a", ""), found.get("b", ""), predicate)
            reading = _sort_choice(reading) if kind == "choice" else reading
            return reading if reading and _fits(reading, options) else None
    return None


def _sort_choice(reading: _Reading) -> _Reading | None:
    """Return a question among options as one of distance, depth, size or side."""
    if reading.predicate in ("nearer to", "farther from"):
        kind = "depth" if _CAMERA.fullmatch(reading.b) else "distance"
        return reading._replace(kind=kind) if reading.b else None
    if reading.predicate in ("in front of", "behind"):
        return reading._replace(kind="depth") if not reading.b or _CAMERA.fullmatch(reading.b) else reading
    return reading if PREDICATES[reading.predicate].holds and reading.predicate != "same size as" else None


def _fits(reading: _Reading, options: Sequence[str]) -> bool:
    """True where the options are of the question's kind."""
    match reading.kind:
        case "count":
            return all(_read_count(text) is not None for text in options)
        case "existence":
            return {re.split(r"\W", normalize(text))[0] for text in options} == {"yes", "no"}
        case "place":
            return all(_place(text) is not None for text in options)
        case "relation":
            return any(name_predicates(text) for text in options)
    return True


def _read_count(text: str) -> int | None:
    text = normalize(text)
    if text in NUMBER_WORDS:
        return NUMBER_WORDS.index(text)
    return int(text) if text.isdecimal() and len(text) < 6 else None


def _place(text: str) -> tuple[float, float] | None:
    """Return the point that a place's name stands for, as fractions of the image; None for another text."""
    rest = re.sub(r"[-/]", " ", normalize(text))
    point, is_named = [0.5, 0.5], bool(re.search(r"\b(?:cent(?:er|re)|middle)\b", rest))
    for word, (axis, value) in _PLACES.items():
        if re.search(rf"\b{word}\b", rest):
            point[axis], is_named = value, True
    rest = re.sub(
        r"\b(?:cent(?:er|re)|middle|part|corner|area|region|image|picture|half"
        r"|" + "|".join(_PLACES) + r")\b",
        "",
        rest,
    )
    return (point[0], point[1]) if is_named and not FILLERS.sub("", rest).strip() else None


def _words(phrase: str) -> tuple[str, ...]:
    return _words_short(phrase) if len(phrase) <= MAX_CACHED_CHARS else _words_all(phrase)


def _words_all(phrase: str) -> tuple[str, ...]:
    return tuple(singular(word) for word in re.findall(r"[\w'-]+", phrase.lower()) if word not in _IDLE)


_words_short = lru_cache(maxsize=8192)(_words_all)


class _Scene:
    """A scene whose objects are looked up by phrases and whose stated relations by pairs."""

    def __init__(self, scene: SceneGraph, size: tuple[int, int] | None) -> None:
        self.size = size
        self.objects = [(_words(item.label), item) for item in scene.objects]
        self.stated: dict[tuple[str, str], list[str]] = {}
        for relation in scene.relations:
            self.stated.setdefault((relation.subject, relation.object), []).append(relation.predicate)

    def find_all(self, phrase: str) -> list[SceneObject]:
        """Return the objects that a phrase covers: "cars" a red car, "red things" all that is red."""
        wanted = set(_words(phrase)) - _GENERIC
        return [item for words, item in self.objects if wanted <= set(words)]

    def find(self, phrase: str) -> SceneObject | None:
        """Return the one object that a phrase means, None for none and for several.

        By its whole label; else by the same noun, where one of the two says no more than the other.
        """
        wanted = _words(phrase)
        if not wanted:
            return None
        exact = [item for words, item in self.objects if words == wanted]
        near = [
            item
            for words, item in self.objects
            if words and words[-1] == wanted[-1] and (set(words) <= set(wanted) or set(wanted) <= set(words))
        ]
        found = exact or near
        return found[0] if len(found) == 1 else None

    def state(self, a: SceneObject, b: SceneObject) -> frozenset[str]:
        """Return the predicates that the scene states of a pair, in either direction."""
        found = {name for text in self.stated.get((a.id, b.id), ()) for name in name_predicates(text)}
        turned = {name for text in self.stated.get((b.id, a.id), ()) for name in name_predicates(text)}
        return frozenset(found | {PREDICATES[name].inverse for name in turned} - {""})

    def holds(self, name: str, a: SceneObject, b: SceneObject) -> bool | None:
        """Return the truth of a predicate; None where it is open or the scene contradicts itself on the pair."""
        row, stated = PREDICATES[name], self.state(a, b)
        if any(_is_contradicted(other, stated, a.box, b.box) for other in stated):
            return None
        seen = row.holds(a.box, b.box) if row.holds else None
        said = True if name in stated else False if row.inverse in stated else None
        return said if seen is None or (said is not None and not row.is_projective) else seen


def _is_contradicted(name: str, stated: frozenset[str], a: Box, b: Box) -> bool:
    """True for a stated predicate whose inverse is stated, too, or that the boxes of the two objects belie."""
    row = PREDICATES[name]
    is_belied = row.is_projective and row.holds is not None and row.holds(a, b) is False
    return is_belied or (row.inverse != name and row.inverse in stated)


def _decide_relation(scene: _Scene, reading: _Reading, options: Sequence[str]) -> int | None:
    a, b = scene.find(reading.a), scene.find(reading.b)
    if a is None or b is None or a is b:
        return None
    named = [name_predicates(option) for option in options]
    texts = {without_lead(normalize(text)) for text in scene.stated.get((a.id, b.id), ())}
    literal = [i for i, option in enumerate(options) if not named[i] and without_lead(normalize(option)) in texts]
    true = [i for i, names in enumerate(named) if names and all(scene.holds(name, a, b) for name in names)] + literal
    if len(true) > 1:  # the one that the scene states, or that says more than all others, or the direction meant
        stated = [i for i in true if named[i] <= scene.state(a, b)]
        most = [i for i in true if all(named[i] >= named[j] for j in true)]
        true = next((found for found in (stated, most, _dominant(true, named, a.box, b.box)) if len(found) == 1), [])
    return true[0] if len(true) == 1 else None


def _dominant(true: Sequence[int], named: Sequence[frozenset[str]], a: Box, b: Box) -> list[int]:
    """Return the option whose axis the two centres are farther apart on, by DOMINANCE."""
    x, y = abs(a.x1 + a.x2 - b.x1 - b.x2), abs(a.y1 + a.y2 - b.y1 - b.y2)
    axis = {"left of", "right of"} if x > DOMINANCE * y else {"above", "below"} if y > DOMINANCE * x else set()
    return [i for i in true if named[i] <= axis]


def _decide_existence(scene: _Scene, reading: _Reading, options: Sequence[str]) -> int | None:
    found = _count(scene, reading)
    return None if found is None else _option("yes" if found else "no", options)


def _decide_count(scene: _Scene, reading: _Reading, options: Sequence[str]) -> int | None:
    count = _count(scene, reading)
    found = [i for i, option in enumerate(options) if _read_count(option) == count and count is not None]
    return found[0] if len(found) == 1 else None


def _count(scene: _Scene, reading: _Reading) -> int | None:
    """Return the number of objects that a phrase covers and whose relation holds; None where one's is open."""
    found = scene.find_all(reading.a)
    if not reading.b:
        return len(found)
    other = scene.find(reading.b)
    if other is None:
        return None
    truths = [scene.holds(reading.predicate, item, other) for item in found if item is not other]
    return None if None in truths else sum(map(bool, truths))


def _option(text: str, options: Sequence[str]) -> int | None:
    letter = extract_choice(text, options).letter
    return None if letter is None else LETTERS.index(letter)


def _candidates(scene: _Scene, options: Sequence[str]) -> list[SceneObject] | None:
    """Return the object that each option means; None where one means none, or two the same."""
    found = [item for option in options if (item := scene.find(option)) is not None]
    return found if len({id(item) for item in found}) == len(options) else None


def _decide_distance(scene: _Scene, reading: _Reading, options: Sequence[str]) -> int | None:
    found, anchor = _candidates(scene, options), scene.find(reading.b)
    if found is None or anchor is None or anchor in found:
        return None
    stated = [i for i, item in enumerate(found) if reading.predicate in scene.state(item, anchor)]
    sign = 1 if reading.predicate == "nearer to" else -1
    by_centre = _extreme([sign * _centre_distance(item.box, anchor.box) for item in found])
    by_gap = _extreme([sign * max(0.0, gap(item.box, anchor.box)) for item in found])
    seen = by_centre if by_gap in (None, by_centre) else None
    return seen if not stated or stated == [seen] else None


def _centre_distance(a: Box, b: Box) -> float:
    return math.hypot(a.x1 + a.x2 - b.x1 - b.x2, a.y1 + a.y2 - b.y1 - b.y2) / 2


def _extreme(values: Sequence[float]) -> int | None:
    """Return the index of the least value where it differs from the next by MIN_RATIO."""
    (first, index), (second, _) = sorted((value, i) for i, value in enumerate(values))[:2]
    is_told_apart = max(abs(first), abs(second)) >= MIN_RATIO * min(abs(first), abs(second))
    return index if first < second and is_told_apart else None


def _decide_choice(scene: _Scene, reading: _Reading, options: Sequence[str]) -> int | None:
    """The option of which the predicate holds: against the object named, or against all other options."""
    found = _candidates(scene, options)
    if found is None:
        return None
    anchor = scene.find(reading.b) if reading.b else None
    if reading.b and (anchor is None or anchor in found):
        return None
    true = [
        i
        for i, item in enumerate(found)
        if all(scene.holds(reading.predicate, item, o) for o in ([anchor] if anchor else found) if o and o is not item)
    ]
    return true[0] if len(true) == 1 else None


def _decide_depth(scene: _Scene, reading: _Reading, options: Sequence[str]) -> int | None:
    nearer = reading.predicate in ("nearer to", "in front of")
    return _decide_choice(scene, reading._replace(b="", predicate="in front of" if nearer else "behind"), options)


def _decide_place(scene: _Scene, reading: _Reading, options: Sequence[str]) -> int | None:
    item = scene.find(reading.a)
    if item is None or scene.size is None:
        return None
    x, y = (item.box.x1 + item.box.x2) / 2 / scene.size[0], (item.box.y1 + item.box.y2) / 2 / scene.size[1]
    places = [_place(option) or (math.inf, math.inf) for option in options]
    return _extreme([math.hypot(x - px, y - py) for px, py in places])


_DECIDE: Mapping[str, Callable[[_Scene, _Reading, Sequence[str]], int | None]] = {
    "relation": _decide_relation,
    "existence": _decide_existence,
    "count": _decide_count,
    "distance": _decide_distance,
    "depth": _decide_depth,
    "choice": _decide_choice,
    "place": _decide_place,
}

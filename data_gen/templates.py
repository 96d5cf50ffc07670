"""Rule-based questions in all nine categories from a scene graph alone: no model, no picture, no price.

Every rule asks only what the graph or its boxes decide by a margin, names only objects that no other object could be
taken for, and offers only options that are safely wrong.
"""

import math
import random
from collections.abc import Callable, Sequence
from itertools import combinations, permutations

from data_gen.draft import Draft
from data_gen.naming import is_plural, kind_of, may_be_confused, plural
from data_gen.predicates import (
    OPPOSITE,
    PLACES,
    REACH,
    REACH_DISTRACTORS,
    SPATIAL,
    SPOKEN,
    box_families,
    centre,
    false_families,
    gap_px,
    place_of,
)
from data_gen.scenes import Scene
from spatialthinker.scene_graph import Relation, SceneObject

MAX_OBJECTS = 8
"""Rules over pairs and triples look at the largest objects only, so that a crowded graph costs no more."""

_RATING = {"easy": 5, "medium": 7, "hard": 8}
_CLEAR_RATIO, _CLOSE_RATIO = (
    1.5,
    2.5,
)  # of areas and distances: below the first nothing is asked, above the second easy
_SAME_RATIO = 1.08
_MAX_COUNT = 6


def level_of(scene: Scene, num_evidence: int, is_close: bool) -> str:
    """Easy, medium or hard by clutter, evidence and margin."""
    points = (len(scene.objects) > MAX_OBJECTS) + (num_evidence > 2) + 2 * is_close
    return ("easy", "medium", "medium", "hard", "hard")[points]


def named_objects(scene: Scene) -> list[SceneObject]:
    """The largest objects that their name alone identifies."""
    found = [item for item in scene.objects if item.label in scene.unique_names]
    return sorted(found, key=lambda item: (-item.box.width * item.box.height, item.id))[:MAX_OBJECTS]


def _pairs(scene: Scene) -> list[tuple[SceneObject, SceneObject, Relation]]:
    named = {item.id: item for item in scene.objects if item.label in scene.unique_names}
    found = [(named[r.subject], named[r.object], r) for r in scene.relations if {r.subject, r.object} <= named.keys()]
    return [pair for pair in found if not may_be_confused(pair[0].label, pair[1].label)]


def _stated(scene: Scene, a: SceneObject, b: SceneObject) -> set[str]:
    """The families of all relations listed from a to b, and the opposites of those from b to a."""
    forward = {
        SPATIAL[r.predicate]
        for r in scene.relations
        if (r.subject, r.object) == (a.id, b.id) and r.predicate in SPATIAL
    }
    backward = {
        SPATIAL[r.predicate]
        for r in scene.relations
        if (r.subject, r.object) == (b.id, a.id) and r.predicate in SPATIAL
    }
    return forward | {OPPOSITE[family] for family in backward if family in OPPOSITE}


def _draft(
    scene: Scene,
    category: str,
    question: str,
    answer: str,
    wrong: Sequence[str],
    evidence: Sequence[SceneObject],
    relations: Sequence[Relation] = (),
    is_close: bool = False,
) -> Draft:
    level = level_of(scene, len(evidence), is_close)
    return Draft(
        category=category,
        level=level,
        question=question,
        options=(answer, *wrong),
        answer_index=0,
        rating=_RATING[level],
        evidence=tuple(item.id for item in evidence),
        relations=tuple(relations),
    )


def relation(scene: Scene, rng: random.Random) -> list[Draft]:
    """Where one object is relative to another: a listed spatial relation."""
    drafts = []
    for a, b, r in _pairs(scene):
        stated = _stated(scene, a, b)
        family = SPATIAL.get(r.predicate)
        if family is None or OPPOSITE.get(family) in stated or box_families(a.box, b.box).get(family) is False:
            continue
        wrong = [SPOKEN[other] for other in false_families(stated, a.box, b.box)][:3]
        if wrong:
            question = rng.choice(
                (
                    f"Where is the {a.label} relative to the {b.label}?",
                    f"How is the {a.label} placed with respect to the {b.label}?",
                )
            )
            is_close = gap_px(a.box, b.box) == 0 and family not in ("on", "inside")
            drafts.append(_draft(scene, "relation", question, r.predicate, wrong, (a, b), (r,), is_close))
    return drafts


def reach(scene: Scene, rng: random.Random) -> list[Draft]:
    """How one object touches, holds or uses another: a listed interaction."""
    drafts = []
    for a, b, r in _pairs(scene):
        group = REACH.get(r.predicate)
        listed = {x.predicate for x in scene.relations if {x.subject, x.object} == {a.id, b.id}}
        if group is None:
            continue
        wrong = [p for p in REACH_DISTRACTORS if p not in group and not any(p in REACH.get(x, (x,)) for x in listed)]
        wrong = rng.sample(wrong, min(3, len(wrong)))
        question = f"How does the {a.label} interact with the {b.label}?"
        drafts.append(_draft(scene, "reach", question, r.predicate, wrong, (a, b), (r,)))
    return drafts


def size(scene: Scene, rng: random.Random) -> list[Draft]:
    """Which area in the image is larger, for areas that differ clearly or hardly at all."""
    drafts = []
    for pair in combinations(named_objects(scene), 2):
        a, b = rng.sample(pair, 2)
        ratio = (a.box.width * a.box.height) / (b.box.width * b.box.height)
        margin = max(ratio, 1 / ratio)
        if _SAME_RATIO < margin < _CLEAR_RATIO:
            continue
        answer = "about the same size" if margin <= _SAME_RATIO else "larger" if ratio > 1 else "smaller"
        wrong = [text for text in ("larger", "smaller", "about the same size") if text != answer]
        question = f"How large does the {a.label} appear in the image compared with the {b.label}?"
        drafts.append(_draft(scene, "size", question, answer, wrong, (a, b), is_close=margin < _CLOSE_RATIO))
    return drafts


def orientation(scene: Scene, rng: random.Random) -> list[Draft]:
    """In which direction one object lies from another, from the viewer's side: decided by boxes that lie apart."""
    drafts = []
    for pair in combinations(named_objects(scene), 2):
        a, b = rng.sample(pair, 2)
        shown = [family for family, is_shown in box_families(a.box, b.box).items() if is_shown]
        (ax, ay), (bx, by) = centre(a.box), centre(b.box)
        long, short = sorted((abs(ax - bx), abs(ay - by)), reverse=True)
        if len(shown) != 1 or long < 2 * short:
            continue
        names = {"left": "to the left", "right": "to the right", "above": "upwards", "below": "downwards"}
        answer = names.pop(shown[0])
        question = f"From the viewer's side, in which direction does the {a.label} lie from the {b.label}?"
        is_close = long < 3 * short
        drafts.append(_draft(scene, "orientation", question, answer, tuple(names.values()), (a, b), is_close=is_close))
    return drafts


def instance_location(scene: Scene, rng: random.Random) -> list[Draft]:
    """In which ninth of the image an object is."""
    drafts = []
    for item in named_objects(scene):
        is_wide = item.box.width > scene.width * 0.6 or item.box.height > scene.height * 0.6
        place = place_of(item.box, scene.width, scene.height, margin=0.04)
        if place is None or is_wide:
            continue
        wrong = rng.sample([other for other in PLACES if other != place], 3)
        question = rng.choice(
            (f"Where in the image is the {item.label}?", f"In which part of the image is the {item.label}?")
        )
        is_close = place_of(item.box, scene.width, scene.height, margin=0.08) is None
        drafts.append(_draft(scene, "instance_location", question, place, wrong, (item,), is_close=is_close))
    return drafts


def depth(scene: Scene, rng: random.Random) -> list[Draft]:
    """Which of two objects is nearer to the camera: a listed "in front of" or "behind"."""
    drafts = []
    for a, b, r in _pairs(scene):
        family = SPATIAL.get(r.predicate)
        if family not in ("front", "behind") or OPPOSITE[family] in _stated(scene, a, b):
            continue
        near, far = (a, b) if family == "front" else (b, a)
        first, second = rng.sample((a.label, b.label), 2)
        question = f"Which is nearer to the camera, the {first} or the {second}?"
        is_close = gap_px(a.box, b.box) > 0
        drafts.append(_draft(scene, "depth", question, near.label, (far.label,), (a, b), (r,), is_close))
    return drafts


def distance(scene: Scene, rng: random.Random) -> list[Draft]:
    """Which of two objects is nearer to a third in the image, by centres and by gaps alike."""
    drafts = []
    for target, *others in permutations(named_objects(scene)[:5], 3):
        near, far = others
        spans = [math.dist(centre(target.box), centre(x.box)) for x in others]
        if spans[1] < _CLEAR_RATIO * spans[0] or gap_px(target.box, near.box) >= gap_px(target.box, far.box):
            continue
        first, second = rng.sample((near.label, far.label), 2)
        question = f"In the image, which is nearer to the {target.label}: the {first} or the {second}?"
        is_close = spans[1] < _CLOSE_RATIO * spans[0]
        drafts.append(
            _draft(scene, "distance", question, near.label, (far.label,), (target, near, far), is_close=is_close)
        )
    return drafts


def count(scene: Scene, rng: random.Random) -> list[Draft]:
    """How many objects of a kind there are, synonyms pooled; never where a name stands for several things."""
    drafts = []
    for name in sorted({item.label for item in scene.objects}):
        members = [item for item in scene.objects if item.label in kind_of(name)]
        doubtful = [item for item in scene.objects if item not in members and may_be_confused(item.label, name)]
        if doubtful or not 1 <= len(members) <= _MAX_COUNT or any(is_plural(item.label) for item in members):
            continue
        right = len(members)
        wrong = rng.sample([n for n in range(max(0, right - 2), right + 4) if n != right], 3)
        question = f"How many {plural(name)} are in the image?"
        draft = _draft(scene, "count", question, str(right), [str(n) for n in wrong], members, is_close=right > 3)
        drafts.append(draft)
    return drafts


def existence(scene: Scene, rng: random.Random) -> list[Draft]:
    """Whether one object stands in a relation to another: a listed one, or its safe contrary."""
    drafts = []
    for a, b, r in _pairs(scene):
        stated = _stated(scene, a, b)
        family = SPATIAL.get(r.predicate)
        if family is None or OPPOSITE.get(family) in stated or box_families(a.box, b.box).get(family) is False:
            continue
        false = false_families(stated, a.box, b.box)
        is_true = not false or rng.random() < 0.5
        predicate = r.predicate if is_true else SPOKEN[false[0]]
        question = f"Is there a {a.label} {predicate} the {b.label}?"
        if a.label[0] in "aeiou":
            question = question.replace("there a ", "there an ", 1)
        answer, wrong = ("yes", "no") if is_true else ("no", "yes")
        drafts.append(_draft(scene, "existence", question, answer, (wrong,), (a, b), (r,), is_close=not is_true))
    return drafts


TEMPLATES: dict[str, Callable[[Scene, random.Random], list[Draft]]] = {
    "relation": relation,
    "reach": reach,
    "size": size,
    "orientation": orientation,
    "instance_location": instance_location,
    "depth": depth,
    "distance": distance,
    "count": count,
    "existence": existence,
}

"""Rule-based questions in all nine categories from a scene graph alone: no model, no picture, no price.

Every rule covers only what the graph or its boxes decide by a margin, names only objects that no other object could be
taken for, and offers only options that are safely wrong.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, permutations

from data_gen.questions.draft import Draft
from data_gen.questions.predicates import (
    CONTACTS,
    OPPOSITE,
    PLACES,
    SPATIAL,
    SPOKEN,
    box_families,
    centre,
    false_contacts,
    false_families,
    gap_px,
    is_mostly_in_place,
    place_of,
)
from data_gen.scenes.naming import (
    indefinite,
    is_called,
    is_plural,
    is_thing,
    is_worth_asking,
    may_be_confused,
    plural,
    uncoloured,
)
from data_gen.scenes.scene import Scene
from spatialthinker.scene_graph import Relation, SceneObject

MAX_OBJECTS = 8
"""Largest objects that rules over pairs and triples use: bounds the work on a crowded graph."""

_RATING = {"easy": 5, "medium": 7, "hard": 8}
_CLEAR_DISTANCE, _FAR_DISTANCE = 1.5, 2.5
_CLEAR_SIDE, _LARGE_SIDE, _SAME_SIDE = 1.35, 2.0, 1.04
"""Ratios of distances, and of sides or of areas' square roots: below the first nothing is asked, above the second it
is easy; sides up to the third are the same."""

_MIN_COUNT, _MAX_COUNT = 2, 6
_SAME_SHARE = 0.3
"""So many comparisons of equals are kept: among drawn scenes there would be more of them than of all others."""

_COMPARATIVES = {
    "large": ("larger", "smaller", "about the same size"),
    "wide": ("wider", "narrower", "about the same width"),
    "tall": ("taller", "shorter", "about the same height"),
}


def named_objects(scene: Scene) -> list[SceneObject]:
    """The largest things that their name alone identifies."""
    found = [item for item in scene.objects if item.label in scene.unique_names and is_thing(item.label)]
    return sorted(found, key=lambda item: (-item.box.width * item.box.height, item.id))[:MAX_OBJECTS]


def _pairs(scene: Scene) -> list[tuple[SceneObject, SceneObject, Relation]]:
    named = {x.id: x for x in scene.objects if x.label in scene.unique_names and is_worth_asking(x.label)}
    found = [(named[r.subject], named[r.object], r) for r in scene.relations if {r.subject, r.object} <= named.keys()]
    return [pair for pair in found if not may_be_confused(pair[0].label, pair[1].label)]


def _stated(scene: Scene, a: SceneObject, b: SceneObject) -> set[str]:
    """The families of all relations listed from a to b, and the opposites of those from b to a."""
    spatial = [(r.subject, r.object, SPATIAL[r.predicate]) for r in scene.relations if r.predicate in SPATIAL]
    forward = {family for *ends, family in spatial if ends == [a.id, b.id]}
    return forward | {OPPOSITE[family] for *ends, family in spatial if ends == [b.id, a.id] and family in OPPOSITE}


def _placed_pairs(scene: Scene) -> Iterator[tuple[SceneObject, SceneObject, Relation, set[str]]]:
    """Pairs with a spatial relation that neither the boxes nor another relation contradict, and all their families."""
    for a, b, r in _pairs(scene):
        family, stated = SPATIAL.get(r.predicate), _stated(scene, a, b)
        if family and OPPOSITE.get(family) not in stated and box_families(a.box, b.box).get(family) is not False:
            yield a, b, r, stated


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
    """The draft, its level by clutter, evidence and margin."""
    points = (len(scene.objects) > MAX_OBJECTS) + (len(evidence) > 2) + 2 * is_close
    level, ids = ("easy", "medium", "medium", "hard", "hard")[points], tuple(item.id for item in evidence)
    return Draft(category, level, question, (answer, *wrong), 0, _RATING[level], ids, tuple(relations))


def relation(scene: Scene, rng: random.Random) -> list[Draft]:
    """Position of one object relative to another: a listed spatial relation."""
    drafts = []
    for a, b, r, stated in _placed_pairs(scene):
        wrong = [SPOKEN[other] for other in false_families(stated, a.box, b.box)][:3]
        if wrong:
            forms = ("Where is the {} relative to the {}?", "How is the {} placed with respect to the {}?")
            question = rng.choice(forms).format(a.label, b.label)
            is_close = gap_px(a.box, b.box) == 0 and SPATIAL[r.predicate] not in ("on", "inside")
            drafts.append(_draft(scene, "relation", question, r.predicate, wrong, (a, b), (r,), is_close))
    return drafts


def reach(scene: Scene, rng: random.Random) -> list[Draft]:
    """Interaction of one object with another, as listed; wrong options are first the interactions of others."""
    drafts = []
    here = {r.predicate for r in scene.relations}
    for a, b, r in _pairs(scene):
        listed = {x.predicate for x in scene.relations if {x.subject, x.object} == {a.id, b.id}}
        wrong = false_contacts(r.predicate, listed)
        if not wrong:
            continue
        verb = "meet" if r.predicate in CONTACTS else "interact with"
        question = f"How does the {a.label} {verb} the {b.label}?"
        wrong = sorted(rng.sample(wrong, len(wrong)), key=lambda other: other not in here)[:3]
        drafts.append(_draft(scene, "reach", question, r.predicate, wrong, (a, b), (r,)))
    return drafts


def size(scene: Scene, rng: random.Random) -> list[Draft]:
    """Larger, wider or taller object in the image, where boxes differ clearly or hardly at all."""
    drafts = []
    for pair in combinations(named_objects(scene), 2):
        a, b = rng.sample(pair, 2)
        ratios = {"wide": a.box.width / b.box.width, "tall": a.box.height / b.box.height}
        if _is_same(ratios["wide"]) == _is_same(ratios["tall"]) and (ratios["wide"] > 1) == (ratios["tall"] > 1):
            ratios["large"] = math.sqrt(ratios["wide"] * ratios["tall"])
        clear = [how for how, x in ratios.items() if max(x, 1 / x) >= _CLEAR_SIDE]
        if rng.random() < _SAME_SHARE:
            clear += [how for how, x in ratios.items() if _is_same(x)]
        if not clear:
            continue
        how = rng.choice(clear)
        more, less, same = _COMPARATIVES[how]
        answer = same if _is_same(ratios[how]) else more if ratios[how] > 1 else less
        wrong = [text for text in _COMPARATIVES[how] if text != answer]
        question = f"How {how} does the {a.label} appear in the image compared with the {b.label}?"
        is_close = max(ratios[how], 1 / ratios[how]) < _LARGE_SIDE
        drafts.append(_draft(scene, "size", question, answer, wrong, (a, b), is_close=is_close))
    return drafts


def _is_same(ratio: float) -> bool:
    return max(ratio, 1 / ratio) <= _SAME_SIDE


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
        names = {"left": "left", "right": "right", "above": "up", "below": "down"}
        answer = names.pop(shown[0])
        question = f"As the viewer sees it, in which direction from the {b.label} is the {a.label}?"
        is_close = long < 3 * short
        drafts.append(_draft(scene, "orientation", question, answer, tuple(names.values()), (a, b), is_close=is_close))
    return drafts


def instance_location(scene: Scene, rng: random.Random) -> list[Draft]:
    """In which ninth of the image an object is: one that holds its centre by a margin, and most of it."""
    drafts = []
    for item in named_objects(scene):
        place = place_of(item.box, scene.width, scene.height, margin=0.04)
        if place is None or not is_mostly_in_place(item.box, scene.width, scene.height):
            continue
        wrong = rng.sample([other for other in PLACES if other != place], 3)
        question = rng.choice(("Where in the image", "In which part of the image")) + f" is the {item.label}?"
        is_close = place_of(item.box, scene.width, scene.height, margin=0.08) is None
        drafts.append(_draft(scene, "instance_location", question, place, wrong, (item,), is_close=is_close))
    return drafts


def depth(scene: Scene, rng: random.Random) -> list[Draft]:
    """Nearer of two objects to the camera: a listed "in front of" or "behind"."""
    drafts = []
    for a, b, r in _pairs(scene):
        family = SPATIAL.get(r.predicate)
        if family not in ("front", "behind") or OPPOSITE[family] in _stated(scene, a, b):
            continue
        if not (is_thing(a.label) and is_thing(b.label)):
            continue
        near, far = (a, b) if family == "front" else (b, a)
        first, second = rng.sample((a.label, b.label), 2)
        question = f"Which is nearer to the camera, the {first} or the {second}?"
        is_close = gap_px(a.box, b.box) > 0
        drafts.append(_draft(scene, "depth", question, near.label, (far.label,), (a, b), (r,), is_close))
    return drafts


def distance(scene: Scene, rng: random.Random) -> list[Draft]:
    """Nearer of two objects to a third in the image, by centres and by gaps alike."""
    drafts = []
    for target, *others in permutations(named_objects(scene)[:5], 3):
        near, far = others
        spans = [math.dist(centre(target.box), centre(x.box)) for x in others]
        if spans[1] < _CLEAR_DISTANCE * spans[0] or gap_px(target.box, near.box) >= gap_px(target.box, far.box):
            continue
        first, second = rng.sample((near.label, far.label), 2)
        question = f"In the image, which is nearer to the {target.label}: the {first} or the {second}?"
        is_close = spans[1] < _FAR_DISTANCE * spans[0]
        drafts.append(
            _draft(scene, "distance", question, near.label, (far.label,), (target, near, far), is_close=is_close)
        )
    return drafts


def count(scene: Scene, rng: random.Random) -> list[Draft]:
    """Number of objects of a kind, synonyms pooled; never where a name stands for several things."""
    drafts = []
    labels = {item.label for item in scene.objects}
    for name in sorted(labels | {uncoloured(label) for label in labels}):
        members = [item for item in scene.objects if is_called(item.label, name)]
        doubtful = [item for item in scene.objects if item not in members and may_be_confused(item.label, name)]
        if doubtful or not _MIN_COUNT <= len(members) <= _MAX_COUNT or not is_thing(name):
            continue
        if any(is_plural(item.label) for item in members):
            continue
        right = len(members)
        wrong = rng.sample([n for n in range(max(1, right - 2), right + 4) if n != right], 3)
        question = f"How many {plural(name)} are in the image?"
        draft = _draft(scene, "count", question, str(right), [str(n) for n in wrong], members, is_close=right > 3)
        drafts.append(draft)
    return drafts


def existence(scene: Scene, rng: random.Random) -> list[Draft]:
    """Existence of a relation between two objects: a listed one, or its safe contrary."""
    drafts = []
    for a, b, r, stated in _placed_pairs(scene):
        false = false_families(stated, a.box, b.box)
        is_true = not false or rng.random() < 0.5
        predicate = r.predicate if is_true else SPOKEN[false[0]]
        question = f"Is there {indefinite(a.label)} {predicate} the {b.label}?"
        answer, wrong = ("yes", "no") if is_true else ("no", "yes")
        drafts.append(_draft(scene, "existence", question, answer, (wrong,), (a, b), (r,)))
    return drafts


_RULES = (relation, reach, size, orientation, instance_location, depth, distance, count, existence)
TEMPLATES: dict[str, Callable[[Scene, random.Random], list[Draft]]] = {rule.__name__: rule for rule in _RULES}

"""Reward of relation triplets: who stands how to whom.

    weight(t) = count(predicate of t) ^ -rarity
    recall    = weights of the true triplets that are found / weights of all true triplets
    precision = found / stated
    overall   = recall

Of the triplets stated, the first `surplus` times as many as are true are compared, so that a list of all that might be
true does not pay. Sources: recall of triplets at a number of guesses, https://arxiv.org/abs/1608.00187, section on
evaluation; why rare predicates must weigh more, https://arxiv.org/abs/1812.01880, on mean recall; triplets as a
reward, https://arxiv.org/abs/2504.13617.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec

from spatialthinker.answer_grammar import normalize
from spatialthinker.geometry import Box
from spatialthinker.predicates import PREDICATES, name_predicates
from spatialthinker.response import parse_response, section
from spatialthinker.rewards.answers import read_answer
from spatialthinker.rewards.record import RewardInput
from spatialthinker.rewards.truths import bad_truth, decode_truth, truth_text
from spatialthinker.scene_graph import SceneFormatError, SceneGraph, label_of, load_scene, parse_scene

RARITY = 1.0
SURPLUS = 2.0
IOU_THRESHOLD = 0.5
MAX_TRIPLETS = 500
MAX_ANSWER_CHARS = 20_000
MAX_NAME_CHARS = 200
"""Signs of a predicate that are read."""
_IN_BRACKETS = re.compile(r"[(\[<]\s{0,4}([^()\[\]<>,\n]{1,80}),([^()\[\]<>,\n]{1,80}),([^()\[\]<>,\n]{1,80})[)\]>]")
_KEYS = ("subject", "predicate", "object")


class _Triplet(NamedTuple):
    """Labels and canonical predicate, and the boxes where they are known; "b right of a" is "a left of b"."""

    subject: str
    predicate: str
    object: str
    boxes: tuple[Box, Box] | None

    @property
    def words(self) -> tuple[str, str, str]:
        return self[:3]


def relations(
    inputs: Sequence[RewardInput],
    *,
    rarity: float = RARITY,
    predicate_counts: Mapping[str, float] | None = None,
    surplus: float = SURPLUS,
    iou_threshold: float = IOU_THRESHOLD,
) -> list[dict[str, float]]:
    """Returns overall, recall and precision of each response's triplets, 0 for none that can be read.

    The ground truth is a scene, alone or in <scene> tags, or a list of ["cat", "left of", "dog"]. The response states
    a scene, or such a list as its answer. Predicates of one meaning are one ("on the left of", the inverse turned
    round). Where both sides have boxes, both must overlap by `iou_threshold`.

    Args:
        rarity: 0 weighs all triplets alike, 1 all predicates alike.
        predicate_counts: predicate -> its number in the data set; one that it lacks counts as one. By default those
            of the row.

    Raises:
        ValueError: a count below 1, or a surplus below 1.
    """
    counts = _counts(predicate_counts)
    if not surplus >= 1.0:
        raise ValueError(f"surplus = {surplus!r}: must be 1 or more times the number of true triplets")
    results = []
    for item in inputs:
        truth, found = _truth(_text(item.ground_truth)), _read(item.response)
        hits = _hits(truth, found[: math.ceil(surplus * len(truth))], iou_threshold)
        weights = _weights(truth, counts, rarity)
        recall = min(1.0, sum(weights[i] for i in hits) / sum(weights))
        results.append({"overall": recall, "recall": recall, "precision": len(hits) / max(len(found), 1)})
    return results


def check_relations(ground_truth: Any, problem: str = "") -> None:
    """Raises ValueError for a ground truth without triplets."""
    _truth(_text(ground_truth))


def gold_relations(ground_truth: Any) -> str:
    """Returns the answer that states the true triplets, without their boxes."""
    return json.dumps([list(triplet.words) for triplet in _truth(_text(ground_truth))])


def explain_relations(item: RewardInput) -> Iterator[str]:
    """Yields a line on each true triplet and whether it was found."""
    truth, found = _truth(_text(item.ground_truth)), _read(item.response)
    hits = set(_hits(truth, found[: math.ceil(SURPLUS * len(truth))], IOU_THRESHOLD))
    yield f"triplets: {len(found)}, true {len(truth)}"
    for i, triplet in enumerate(truth):
        yield f"  {' '.join(triplet.words)}: {'found' if i in hits else 'not found'}"


def _weights(truth: tuple[_Triplet, ...], counts: Mapping[str, float] | None, rarity: float) -> list[float]:
    counts = Counter(triplet.predicate for triplet in truth) if counts is None else counts
    return [counts.get(triplet.predicate, 1.0) ** -rarity for triplet in truth]


def _counts(predicate_counts: Mapping[str, float] | None) -> dict[str, float] | None:
    """Returns the numbers by canonical predicate, those of one meaning added."""
    if predicate_counts is None:
        return None
    counts: dict[str, float] = {}
    for text, count in predicate_counts.items():
        if isinstance(count, bool) or not isinstance(count, int | float) or not 1 <= count < math.inf:
            raise ValueError(f"predicate_counts.{text} = {count!r}: must be a number of 1 or more")
        name = _canonical(text)[0]
        counts[name] = counts.get(name, 0.0) + count
    return counts


def _hits(truth: tuple[_Triplet, ...], found: Sequence[_Triplet], threshold: float) -> list[int]:
    """Returns the true triplets that are found, each triplet stated for the one that it overlaps most."""
    by_words: dict[tuple[str, str, str], list[int]] = {}
    for i, triplet in enumerate(truth):
        by_words.setdefault(triplet.words, []).append(i)
    hits = []
    for triplet in found:
        left = by_words.get(triplet.words, [])
        overlaps = [(_overlap(truth[i].boxes, triplet.boxes), -i) for i in left]
        best, place = max(overlaps, default=(-1.0, 0))
        if best >= threshold:
            hits.append(-place)
            left.remove(-place)
    return hits


def _overlap(true: tuple[Box, Box] | None, stated: tuple[Box, Box] | None) -> float:
    """Returns the smaller IoU of subject and object; 1 where one side has no boxes."""
    return 1.0 if true is None or stated is None else min(map(_iou, true, stated))


def _iou(a: Box, b: Box) -> float:
    width, height = min(a.x2, b.x2) - max(a.x1, b.x1), min(a.y2, b.y2) - max(a.y1, b.y1)
    if width <= 0 or height <= 0 or not (a.is_proper and b.is_proper):
        return 0.0
    union = a.width * a.height + b.width * b.height - width * height
    return width * height / union if union > 0 else 0.0


@lru_cache(maxsize=4096)
def _canonical(predicate: str) -> tuple[str, bool, bool]:
    """Returns a predicate's one name, whether subject and object change places, and whether their order is none."""
    names = sorted(name_predicates(predicate))
    inverses = sorted(PREDICATES[name].inverse for name in names)
    if not names:
        return normalize(predicate), False, False
    is_turned = all(inverses) and inverses < names
    return " ".join(inverses if is_turned else names), is_turned, inverses == names


def _triplet(subject: str, predicate: str, other: str, boxes: tuple[Box, Box] | None = None) -> _Triplet:
    name, is_turned, is_symmetric = _canonical(predicate[:MAX_NAME_CHARS])
    a, b = normalize(label_of(subject.strip())), normalize(label_of(other.strip()))
    if is_turned or (is_symmetric and (b, boxes and boxes[1]) < (a, boxes and boxes[0])):
        a, b, boxes = b, a, boxes and (boxes[1], boxes[0])
    return _Triplet(a, name, b, boxes)


def _of_scene(scene: SceneGraph) -> tuple[_Triplet, ...]:
    boxes = {item.id: item.box for item in scene.objects}
    return tuple(
        _triplet(
            row.subject,
            row.predicate,
            row.object,
            (boxes[row.subject], boxes[row.object]) if row.subject in boxes and row.object in boxes else None,
        )
        for row in scene.relations[:MAX_TRIPLETS]
    )


def _of_list(values: Any) -> tuple[_Triplet, ...]:
    """Returns the triplets of a decoded list; TypeError for another value."""
    if not isinstance(values, list | tuple):
        raise TypeError("no list")
    rows = [[value.get(key) for key in _KEYS] if isinstance(value, dict) else value for value in values[:MAX_TRIPLETS]]
    for row in rows:
        if not isinstance(row, list | tuple) or len(row) != 3 or not all(isinstance(part, str) for part in row):
            raise TypeError("no list of three texts")
    return tuple(_triplet(str(a), str(predicate), str(b)) for a, predicate, b in rows)


def _read(response: str) -> tuple[_Triplet, ...]:
    """Returns the triplets of a response's scene, else those of its answer."""
    scene = parse_scene(parse_response(response).scene_text)
    if scene is not None:
        return _of_scene(scene)
    answer = read_answer(response)[:MAX_ANSWER_CHARS]
    text = answer.removeprefix("```json").strip("` \n")
    try:
        return _of_list(msgspec.json.decode(text))
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError, TypeError):
        rows = [match.groups() for match in _IN_BRACKETS.finditer(answer)][:MAX_TRIPLETS]
        names = ([part.strip(" '\"") for part in row] for row in rows)
        return tuple(_triplet(a, predicate, b) for a, predicate, b in names)


def _text(ground_truth: Any) -> str:
    """Returns the scene of a row's answer where it has one, else its text."""
    return (section(ground_truth, "scene") if isinstance(ground_truth, str) else None) or truth_text(ground_truth)


@lru_cache(maxsize=2048)
def _truth(text: str) -> tuple[_Triplet, ...]:
    try:
        if text.lstrip().startswith("{"):
            found = _of_scene(load_scene(text, is_reference=True))
        else:
            found = _of_list(decode_truth(text))
    except SceneFormatError as error:
        raise bad_truth(f"is no scene ({error})", text) from None
    except TypeError:
        raise bad_truth("is neither a scene nor a list of [subject, predicate, object]", text) from None
    if not found or not all(all(triplet.words) for triplet in found):
        raise bad_truth("states no relations, or one without a name", text)
    return found

"""Description of responses, for recordings of a run: failure, answer, boxes, matches, and signs of what went wrong."""

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from spatialthinker.geometry import iou
from spatialthinker.matching import can_match, match_objects
from spatialthinker.prompts import parse_image_size
from spatialthinker.response import LETTERS, extract_choice, parse_response, section
from spatialthinker.rewards.accuracy import last_boxed
from spatialthinker.rewards.spatial_sgg import format_failure
from spatialthinker.scene_answers import answer_from_scene
from spatialthinker.scene_graph import SceneGraph, parse_scene

BORDER_SHARE = 0.02
"""Share of the image's side by which a box may leave it: models round, and a little over the border."""
FRAMES = (1.0, 100.0, 1000.0)
"""Sides of the frames beside pixels in which models state boxes: shares, per cent, per mille."""
MIN_GAIN = 0.2
"""Gain of the mean IoU by reading the boxes in another frame, from which they are taken to be in it."""
MAX_KEPT = 64
"""Objects and relations that are kept of a scene."""

_OPTIONS = re.compile(r"(?i)\boptions?\s*:")
_OPTION = re.compile(r"\(([A-Z])\)\s*(.*?)\s*(?=\([A-Z]\)|$)", re.DOTALL)

Size = tuple[int, int]


class _Read(NamedTuple):
    """A response's own scene and the true one, None where there is none, in a frame of this size."""

    scene: SceneGraph | None
    truth: SceneGraph | None
    size: Size
    answer: str | None
    problem: str


def describe(reward: str, items: Sequence[tuple[str, Any, str]]) -> list[dict[str, Any]]:
    """The parts of each response (text, ground truth, problem).

    failure: why the format fails, with spatial_sgg. answer: text of the answer. boxes: JSON of the predicted and the
    reference boxes and relations, the matched pairs and the size of their frame. iou_mean: of matched objects.
    signs: name -> bool, of those that can be told: another_frame, same_box, scene_ignored.

    Args:
        reward: name of the reward that scored them.
        items: a problem has a line `Image size: (W x H)` where its ground truth has boxes.
    """
    found, read = [], {}
    for place, (response, ground_truth, problem) in enumerate(items):
        sections = parse_response(response)
        failure = format_failure(response) if reward == "spatial_sgg" else None
        answer = last_boxed(response) if reward == "math" else sections.answer
        found.append({"failure": failure, "answer": answer, "boxes": None, "iou_mean": None, "signs": {}})
        scene, truth, size = parse_scene(sections.scene_text), _truth(str(ground_truth)), _size(problem)
        if size is not None and (scene is not None or truth is not None):
            read[place] = _Read(scene, truth, size, answer, problem)
    matches = _match(read)
    for place, each in read.items():
        ious = [pair["iou"] for pair in matches.get(place, [])]
        entry = found[place]
        entry["iou_mean"] = sum(ious) / len(ious) if ious else None
        entry["boxes"] = _boxes(each, matches.get(place, []))
        entry["signs"] = _signs(each, entry["iou_mean"])
    return found


@lru_cache(maxsize=4096)
def _truth(ground_truth: str) -> SceneGraph | None:
    return parse_scene(section(ground_truth, "scene"), is_reference=True)


@lru_cache(maxsize=4096)
def _size(problem: str) -> Size | None:
    try:
        width, height = parse_image_size(problem)
    except ValueError:
        return None
    return (width, height) if width > 0 and height > 0 else None


def _boxes(read: _Read, pairs: list[dict[str, Any]]) -> str:
    content: dict[str, Any] = {"size": list(read.size), "matches": pairs[:MAX_KEPT]}
    for scene, objects, relations in (
        (read.scene, "predicted", "relations"),
        (read.truth, "reference", "reference_relations"),
    ):
        shown, stated = ([], []) if scene is None else (scene.objects[:MAX_KEPT], scene.relations[:MAX_KEPT])
        content[objects] = [{"id": item.id, "box": [_short(x) for x in item.bbox]} for item in shown]
        content[relations] = [[each.subject, each.predicate, each.object] for each in stated]
    return json.dumps(content, separators=(",", ":"))


def _short(value: float) -> float:
    """The coordinate to four places, as a whole number where it is one."""
    return int(value) if value == int(value) else round(value, 4)


def _match(read: dict[int, _Read]) -> dict[int, list[dict[str, Any]]]:
    """Matched pairs with their plain IoU and label similarity, by the response's place; none without spaCy."""
    places = [place for place, each in read.items() if each.scene is not None and each.truth is not None]
    scenes = [scene for place in places if (scene := read[place].scene) is not None]
    truths = [truth for place in places if (truth := read[place].truth) is not None]
    if not places or not can_match():
        return {}
    matches = match_objects(truths, scenes, [read[place].size for place in places])
    if not len(matches.scene):
        return {}
    rows = [column.tolist() for column in (matches.scene, matches.predicted, matches.true, matches.similarity)]
    pairs = list(zip(*rows, strict=True))
    predicted = [scenes[scene].objects[i].bbox for scene, i, _, _ in pairs]
    true = [truths[scene].objects[j].bbox for scene, _, j, _ in pairs]
    found: dict[int, list[dict[str, Any]]] = {}
    for (scene, i, j, label), value in zip(pairs, _ious(predicted, true).tolist(), strict=True):
        pair = {"predicted": i, "reference": j, "iou": round(value, 4), "label": round(label, 4)}
        found.setdefault(places[scene], []).append(pair)
    return found


def _ious(a: Any, b: Any) -> np.ndarray:
    """IoU in [0, 1] of boxes; 0 for what is no box."""
    return np.clip(np.nan_to_num(iou(np.asarray(a, dtype=float), np.asarray(b, dtype=float))), 0.0, 1.0)


def _signs(read: _Read, iou_mean: float | None) -> dict[str, bool]:
    if read.scene is None or not read.scene.objects:
        return {}
    boxes = np.array([item.bbox for item in read.scene.objects])  # [objects, 4]
    sides = np.array(read.size * 2)
    leaves = bool((boxes > (1 + BORDER_SHARE) * sides).any() or (boxes < -BORDER_SHARE * sides).any())
    signs = {"another_frame": leaves or _fits_another(boxes, read, iou_mean)}
    if len(boxes) > 1:
        signs["same_box"] = bool((boxes.round() == boxes[0].round()).all())
    if (is_ignored := _ignores_scene(read)) is not None:
        signs["scene_ignored"] = is_ignored
    return signs


def _fits_another(boxes: np.ndarray, read: _Read, iou_mean: float | None) -> bool:
    """True when the boxes meet the true ones far better once they are read in one of FRAMES."""
    if read.truth is None or iou_mean is None or iou_mean > 1 - MIN_GAIN:
        return False
    true = np.array([item.bbox for item in read.truth.objects])[:, None]

    def reach(scale: Any) -> float:
        """Mean over the true boxes of the best IoU of any box."""
        return float(_ious(boxes * scale, true).max(axis=1).mean())

    fitting = [side for side in FRAMES if boxes.max() <= (1 + BORDER_SHARE) * side]
    return any(reach(np.array(read.size * 2) / side) > reach(1.0) + MIN_GAIN for side in fitting)


def _ignores_scene(read: _Read) -> bool | None:
    """True where a response's own scene leads to another option than its answer; None where it leads to none."""
    question, options = read_options(read.problem)
    if read.scene is None or read.answer is None or not options:
        return None
    led = answer_from_scene(read.scene, question, options, read.size)
    if led is None or led.index is None:
        return None
    letter = extract_choice(read.answer, options).letter
    return None if letter is None else letter != LETTERS[led.index]


@lru_cache(maxsize=4096)
def read_options(problem: str) -> tuple[str, tuple[str, ...]]:
    """The question and the options of a prompt that ends in `... Options: (A) ... (B) ...`; no options elsewhere."""
    marks = list(_OPTIONS.finditer(problem))
    if not marks:
        return problem, ()
    question = problem[: marks[-1].start()].strip().rpartition("\n")[2]
    found = _OPTION.findall(problem[marks[-1].end() :])
    if "".join(letter for letter, _ in found) != LETTERS[: len(found)]:
        return question, ()
    return question, tuple(text for _, text in found)

"""How far answers rest on what a model should look at: its own scene, the image, the true scene.

`follows`: of the questions that the model's own scene decides, the share of those answered as it leads to. `blank` and
`true_scene`: the accuracy without the image, and with the true scene in place of the model's own.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.benchmarks.samples import Sample
from evaluation.journal import Record
from evaluation.reports.intervals import proportion
from spatialthinker.response import LETTERS, parse_response
from spatialthinker.scene_answers import MAX_QUESTION_CHARS, SceneAnswer, answer_from_scene, read_question
from spatialthinker.scene_graph import SceneGraph, parse_scene

ROWS = {
    "follows": "answers that follow from the model's own scene",
    "blank": "accuracy with the image blanked",
    "true_scene": "accuracy with the true scene given",
}
"""Figure -> its name in tables."""


def lead(scene: SceneGraph | None, sample: Sample) -> SceneAnswer | None:
    """Return the option that a scene leads to; None for a question of a kind that no scene decides."""
    reading = read_question(sample.question[:MAX_QUESTION_CHARS], tuple(sample.choices))
    if reading is None or scene is None:
        return None if reading is None else SceneAnswer(reading.kind, None)
    size = None
    if reading.kind == "place":
        try:
            size = sample.read_images()[0].size
        except ValueError:  # told where the item was asked
            return SceneAnswer(reading.kind, None)
    return answer_from_scene(scene, sample.question, sample.choices, size)


def measure_faithfulness(
    items: Sequence[tuple[Sample, Record]], passes: Mapping[str, Sequence[Record]]
) -> dict[str, Any]:
    """Return the figures with their intervals, and by kind of question how many were asked, decided and followed."""
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for sample, record in items:
        if record.status != "ok":
            continue
        led = lead(parse_scene(parse_response(record.reasoning).scene_text), sample)
        if led is not None:
            letter = sample.grade(record.reasoning, record.finish_reason).letter
            is_decided = led.index is not None
            kinds[led.kind]["asked"] += 1
            kinds[led.kind]["decided"] += is_decided
            kinds[led.kind]["followed"] += led.index is not None and letter == LETTERS[led.index]
    total = sum(kinds.values(), Counter[str]())
    figures = {"follows": proportion(total["followed"], total["decided"]) | {"asked": total["asked"]}}
    for name, records in passes.items():
        answered = [record for record in records if record.status == "ok"]
        figures[name] = proportion(sum(record.correct for record in answered), len(answered))
        figures[name] |= {"errors": len(records) - len(answered)}
    cost = sum(record.cost_usd for records in passes.values() for record in records)
    return figures | {"kinds": {kind: dict(kinds[kind]) for kind in sorted(kinds)}, "cost_usd": round(cost, 6)}

"""The page of a comparison: table, figure and the items to browse, in one file without anything beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.journal import Record
from evaluation.reports.comparison import FAITHFULNESS_NOTE, Model, fill_faithfulness, fill_rows
from evaluation.reports.faithfulness import lead
from spatialthinker.prompts import IMAGE_MARK
from spatialthinker.response import LETTERS, parse_response
from spatialthinker.scene_graph import SceneGraph, parse_scene
from spatialthinker.schema import question_with_options
from spatialthinker.storage.images import encode
from spatialthinker.visualize import data_uri, lay_out, relation_text, render_page

if TYPE_CHECKING:
    from PIL import Image

    from evaluation.benchmarks.samples import Sample

MAX_SIDE_PX = 640
LOSSLESS_SIDE_PX = 256
"""Images up to this size stay as they are: enlarged on the page, their losses would show."""
WEBP_QUALITY = 80
VERDICTS = {"1": ("good", "right"), "0": ("bad", "wrong"), "-": ("soft", "no answer")}


@dataclass(frozen=True)
class Item:
    """One question and what each model made of it."""

    benchmark: str
    id: str
    records: list[Record | None]
    """In the order of the models; None where a model has no answer."""
    sample: "Sample | None"

    @property
    def verdicts(self) -> str:
        """One character a model: 1 right, 0 wrong, - no answer."""
        return "".join("-" if record is None else str(record.correct) for record in self.records)

    @property
    def disagreement(self) -> int:
        """2 where one model is right and another wrong, 1 where they only answer differently, else 0."""
        if {"0", "1"} <= set(self.verdicts):
            return 2
        return int(len({record.pred_answer for record in self.records if record is not None}) > 1)

    @property
    def any_record(self) -> Record:
        return next(record for record in self.records if record is not None)


def choose_items(
    models: Sequence[Model], samples: "Mapping[str, Mapping[str, Sample]]", limit: int
) -> tuple[list[Item], int]:
    """Return the items to show, in the order of their ids, and the number of all.

    The limit is shared evenly by the benchmarks; in each, items on which models disagree come first.
    """
    benchmarks = list(dict.fromkeys(name for model in models for name in model.runs))
    chosen: list[Item] = []
    total = 0
    for index, name in enumerate(benchmarks):
        answers = [model.runs[name].records if name in model.runs else {} for model in models]
        ids = sorted({item_id for records in answers for item_id in records})
        items = [Item(name, i, [r.get(i) for r in answers], samples.get(name, {}).get(i)) for i in ids]
        total += len(items)
        share = (limit - len(chosen)) // (len(benchmarks) - index)
        kept = sorted(items, key=lambda item: -item.disagreement)[:share]
        chosen += sorted(kept, key=lambda item: item.id)
    return chosen, total


def build_page(
    comparison: Mapping[str, Any],
    models: Sequence[Model],
    samples: "Mapping[str, Mapping[str, Sample]]",
    limit: int,
    figure_png: bytes,
) -> str:
    """Return the page with at most `limit` items."""
    items, total = choose_items(models, samples, limit)
    labels = [model.label for model in models]
    header = ["", *labels, *(f"{label} - {labels[0]}" for label in labels[1:])]
    tasks = {item.any_record.task for item in items} - {None}
    names = {"benchmark": {item.benchmark for item in items}, "task": tasks}
    filters = [(kind, kind, [(name, name) for name in sorted(found)]) for kind, found in names.items()]
    verdicts = [(mark, text) for mark, (_, text) in VERDICTS.items()]
    filters += [(f"model{index}", label, verdicts) for index, label in enumerate(labels)]
    filters.append(("disagreement", "models", [("2", "one right, one wrong"), ("1", "answer differently")]))
    return render_page(
        Path(__file__).with_suffix(".html.jinja"),
        title=f"Comparison: {', '.join(labels)}",
        labels=labels,
        header=[*header, *(f"{model} (paper)" for model in comparison["published"])],
        rows=fill_rows(comparison, _accuracy_cell, _difference_cell, "{:.1%}".format),
        figure_png=figure_png,
        faithfulness=fill_faithfulness(comparison, _accuracy_cell),
        faithfulness_note=FAITHFULNESS_NOTE,
        items=[_describe(item, labels, f"image{number}") for number, item in enumerate(items)],
        total=total,
        filters=filters,
        verdicts=VERDICTS,
    )


def _accuracy_cell(facts: Mapping[str, Any]) -> str:
    return f"{facts['accuracy']:.1%}\n{facts['low']:.1%} to {facts['high']:.1%}"


def _difference_cell(facts: Mapping[str, Any]) -> str:
    value, low, high = (f"{100 * facts[key]:+.1f}" for key in ("difference", "low", "high"))
    return f"{value}\n{low} to {high}" + (f", p {facts['p_value']:.2g}" if "p_value" in facts else "")


def _describe(item: Item, labels: Sequence[str], name: str) -> dict[str, Any]:
    """Return what the template shows of an item; `name` is that of its first image, over which all scenes lie."""
    images, problem = _read_images(item)
    size = images[0].size if images else (1, 1)
    reference = _scene(item.sample.ground_truth if item.sample else None, is_reference=True)
    answers = []
    for label, record in zip(labels, item.records, strict=True):
        predicted = _scene(record.reasoning if record else None)
        overlay = lay_out(size, predicted, reference) if images and predicted else None
        led = lead(predicted, item.sample) if predicted and item.sample else None
        answers.append(
            (label, record, predicted, overlay, None if led is None or led.index is None else LETTERS[led.index])
        )
    return vars(item) | {
        "task": item.any_record.task or "",
        "verdicts": item.verdicts,
        "disagreement": item.disagreement,
        "problem": problem,
        "name": name,
        "uris": [data_uri(_encode(image), "webp") for image in images],
        "reference": reference,
        "layout": lay_out(size, reference=reference),
        "answers": answers,
        **_describe_question(item, reference),
    }


def _read_images(item: Item) -> "tuple[list[Image.Image], str]":
    """Return the question's images, or none and why."""
    if item.sample is None:
        return [], ""
    try:
        return item.sample.read_images(), ""
    except ValueError as error:
        return [], str(error)


def _encode(image: "Image.Image") -> bytes:
    """Return the image for the page, made smaller where it is larger than MAX_SIDE_PX."""
    small = image.copy()
    small.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX))
    return encode(small, "WEBP", quality=WEBP_QUALITY, lossless=max(small.size) <= LOSSLESS_SIDE_PX)


def _scene(text: str | None, is_reference: bool = False) -> SceneGraph | None:
    if text is None:
        return None
    return parse_scene(parse_response(text).scene_text, is_reference=is_reference)


def _describe_question(item: Item, reference: SceneGraph | None) -> dict[str, str]:
    record = item.any_record
    question = item.sample.question if item.sample else record.prompt.replace(IMAGE_MARK, "")
    answer = record.correct_answer
    if item.sample and answer in LETTERS[: len(item.sample.choices)]:
        choices, index = item.sample.choices, LETTERS.index(answer)
        answer = f"({LETTERS[index]}) {choices[index]}"
        if choices[0] not in question:
            question = question_with_options(question, choices)
    truth = f"answer: {answer}"
    if reference and reference.relations:
        truth += "; " + "; ".join(relation_text(relation) for relation in reference.relations)
    question, _, options = question.partition("\nOptions:\n")
    return {"question": question, "options": options.replace("\n", " · "), "truth": truth}

"""The page of a comparison: table, figure and the items to browse, in one file without anything beside it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evaluation.journal import Record
from evaluation.reports.comparison import Model
from spatialthinker.prompts import IMAGE_MARK
from spatialthinker.response import LETTERS, parse_response
from spatialthinker.scene_graph import SceneGraph, parse_scene
from spatialthinker.schema import question_with_options
from spatialthinker.storage.images import encode
from spatialthinker.visualize import (
    data_uri,
    escape,
    html_image,
    html_page,
    html_scene_key,
    html_table,
    relation_text,
    svg_image,
    svg_scene,
)

if TYPE_CHECKING:
    from PIL import Image

    from evaluation.benchmarks.samples import Sample

MAX_SIDE_PX = 640
LOSSLESS_SIDE_PX = 256
"""Images up to this size stay as they are: enlarged on the page, their losses would show."""
_WEBP_QUALITY = 80
_VERDICTS = {"1": ("good", "right"), "0": ("bad", "wrong"), "-": ("soft", "no answer")}


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
    cards = "".join(_html_item(item, labels, number) for number, item in enumerate(items))
    body = [
        f"<h1>{escape(' · '.join(labels))}</h1>",
        _html_results(comparison),
        html_image(figure_png, "Accuracy of every model and benchmark with its 95 % interval"),
    ]
    if items:
        body += [
            "<h2>Items</h2>",
            f'<p class="soft">{len(items)} of {total} items'
            + (", chosen for the disagreement of the models first" if len(items) < total else "")
            + ".</p>",
            html_scene_key(),
            _html_filters(items, labels),
            f'<div class="stack">{cards}</div><script>{_SCRIPT}</script>',
        ]
    return html_page(f"Comparison: {', '.join(labels)}", "\n".join(body), _STYLE)


def _html_results(comparison: Mapping[str, Any]) -> str:
    baseline = comparison["baseline"]
    labels = list(comparison["models"])
    rows = []
    every = dict(comparison["benchmarks"])
    if comparison["average"]:
        every[f"average of {len(comparison['average']['benchmarks'])}"] = comparison["average"]
    for name, row in every.items():
        cells = [name]
        for label in labels:
            facts = row["accuracy"].get(label)
            interval = f"\n{facts['low']:.1%} to {facts['high']:.1%}" if facts else ""
            cells.append(f"{facts['accuracy']:.1%}{interval}" if facts else "")
        for label in labels[1:]:
            facts = row["difference"].get(label)
            test = f", p {facts['p_value']:.2g}" if facts and "p_value" in facts else ""
            interval = f"\n{100 * facts['low']:+.1f} to {100 * facts['high']:+.1f}{test}" if facts else ""
            cells.append(f"{100 * facts['difference']:+.1f}{interval}" if facts else "")
        published = (row["published"].get(model) for model in comparison["published"])
        rows.append((*cells, *("" if value is None else f"{value:.1%}" for value in published)))
    header = ["", *labels, *(f"{label} - {baseline}" for label in labels[1:])]
    return html_table([*header, *(f"{model} (paper)" for model in comparison["published"])], rows)


def _html_filters(items: Iterable[Item], labels: Sequence[str]) -> str:
    def select(name: str, title: str, options: Iterable[tuple[str, str]]) -> str:
        choices = "".join(f'<option value="{escape(value)}">{escape(text)}</option>' for value, text in options)
        choices = f'<option value="">all</option>{choices}'
        return f'<label>{escape(title)} <select data-filter="{name}">{choices}</select></label>'

    items = list(items)
    benchmarks = sorted({item.benchmark for item in items})
    tasks = sorted({item.any_record.task for item in items if item.any_record.task is not None})
    verdicts = [(mark, text) for mark, (_, text) in _VERDICTS.items()]
    controls = [
        select("benchmark", "benchmark", ((name, name) for name in benchmarks)),
        select("task", "task", ((name, name) for name in tasks)),
        *(select(f"model{index}", label, verdicts) for index, label in enumerate(labels)),
        select("disagreement", "models", (("2", "one right, one wrong"), ("1", "answer differently"))),
        '<label>text <input type="search" data-filter="text" placeholder="in question or response"></label>',
    ]
    return f'<form class="filters">{"".join(controls)}<output id="shown"></output></form>'


def _html_item(item: Item, labels: Sequence[str], number: int) -> str:
    images, problem = _read_images(item)
    reference = _scene(item.sample.ground_truth if item.sample else None, is_reference=True)
    panels = []
    # Scenes are stated in pixels of the first image; each shows it again.
    name, size = f"image{number}", images[0].size if images else (1, 1)
    if images:
        picture = svg_image(name, data_uri(_encode(images[0]), "webp"), size)
        title = "reference" if reference else "image"
        panels.append(f"<h4>{title}</h4>{svg_scene(picture, size, reference=reference)}")
    for other, image in enumerate(images[1:], 2):
        panels.append(f'<h4>image {other}</h4><img src="{data_uri(_encode(image), "webp")}" alt="image {other}">')
    for label, record in zip(labels, item.records, strict=True):
        predicted = _scene(record.reasoning if record else None)
        overlay = svg_scene(f'<use href="#{name}"/>', size, predicted, reference) if images and predicted else ""
        note = "; ".join(relation_text(relation) for relation in predicted.relations) if predicted else ""
        if predicted is None and record and reference:
            note = "Its scene graph cannot be read."
        panels.append(_html_answer(label, record, overlay, note))
    task = item.any_record.task
    facts = {
        "benchmark": item.benchmark,
        "task": task or "",
        "verdicts": item.verdicts,
        "disagreement": item.disagreement,
    }
    data = " ".join(f'data-{key}="{escape(value)}"' for key, value in facts.items())
    columns = "".join(f"<div>{panel}</div>" for panel in panels)
    title = " · ".join(part for part in (item.benchmark, item.id, task) if part)
    return (
        f'<article class="card item" {data}><p class="soft">{escape(title)}{escape(problem)}</p>'
        f'{_html_question(item, reference)}<div class="panels">{columns}</div></article>'
    )


def _read_images(item: Item) -> "tuple[list[Image.Image], str]":
    """Return the question's images, or none and why."""
    if item.sample is None:
        return [], ""
    try:
        return item.sample.read_images(), ""
    except ValueError as error:
        return [], f" · {error}"


def _encode(image: "Image.Image") -> bytes:
    """Return the image for the page, made smaller where it is larger than MAX_SIDE_PX."""
    small = image.copy()
    small.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX))
    return encode(small, "WEBP", quality=_WEBP_QUALITY, lossless=max(small.size) <= LOSSLESS_SIDE_PX)


def _scene(text: str | None, is_reference: bool = False) -> SceneGraph | None:
    if text is None:
        return None
    return parse_scene(parse_response(text).scene_text, is_reference=is_reference)


def _html_question(item: Item, reference: SceneGraph | None) -> str:
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
    options = " · ".join(options.split("\n"))
    return f'<pre class="question">{escape(question)}</pre><p>{escape(options)}</p><p class="soft">{escape(truth)}</p>'


def _html_answer(label: str, record: Record | None, overlay: str, note: str) -> str:
    css, verdict = _VERDICTS["-" if record is None else str(record.correct)]
    title = f'<h4>{escape(label)} <span class="{css}">{verdict}</span></h4>'
    if record is None:
        return title
    facts = [f"{record.pred_answer or 'nothing'} (read as: {record.kind})", f"{record.response_tokens} tokens"]
    if record.reward is not None:
        facts.append(f"reward {record.reward['overall']:.2f}")
    details = f"<details><summary>response</summary><pre>{escape(record.reasoning)}</pre></details>"
    return f"{title}{overlay}<p>{escape(', '.join(facts))}</p><p class='soft'>{escape(note)}</p>{details}"


_STYLE = """
th { white-space: normal; vertical-align: bottom; font-size: 0.85rem; }
h4 { font-size: 0.9rem; margin: 0 0 0.4rem; overflow-wrap: anywhere; }
.item { content-visibility: auto; contain-intrinsic-size: auto 500px; }
.item[hidden] { display: none; }
.item svg { display: block; width: 100%; height: auto; border-radius: 4px; font-family: sans-serif; }
.panels { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 230px), 1fr)); }
.panels > div { min-width: 0; }
.filters { display: flex; flex-wrap: wrap; gap: 0.5rem 1rem; padding: 0.6rem 0;
  margin-bottom: 1rem; background: var(--paper); border-bottom: 1px solid var(--line); font-size: 0.85rem; }
.filters select, .filters input { font: inherit; max-width: 14rem; }
@media (min-width: 800px) { .filters { position: sticky; top: 0; z-index: 1; } }
.question { font: inherit; }
"""

_SCRIPT = """
const items = [...document.querySelectorAll(".item")];
const controls = [...document.querySelectorAll("[data-filter]")];
const texts = items.map((item) => item.textContent.toLowerCase());
const tests = {
  benchmark: (item, value) => item.dataset.benchmark === value,
  task: (item, value) => item.dataset.task === value,
  disagreement: (item, value) => Number(item.dataset.disagreement) >= Number(value),
  text: (item, value, text) => text.includes(value.toLowerCase()),
};
function matches(item, name, value, text) {
  if (value === "") return true;
  if (name.startsWith("model")) return item.dataset.verdicts[Number(name.slice(5))] === value;
  return tests[name](item, value, text);
}
function update() {
  let shown = 0;
  items.forEach((item, index) => {
    item.hidden = !controls.every((c) => matches(item, c.dataset.filter, c.value, texts[index]));
    shown += !item.hidden;
  });
  document.getElementById("shown").textContent = `${shown} shown`;
}
controls.forEach((control) => control.addEventListener("input", update));
document.querySelector(".filters").addEventListener("submit", (event) => event.preventDefault());
update();
"""

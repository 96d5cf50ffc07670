"""HTML page: distributions of the rows, reasons of rejection, and a sample of rows on their images."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from data_gen.curate.export import find_images
from data_gen.curate.selection import digest
from data_gen.curate.tables import Table, tables
from data_gen.journal import ACCEPTED, newest_lines
from data_gen.questions.records import Record, find_journal, read_records
from data_gen.scenes.sources import Source
from spatialthinker.clients.prices import Usage
from spatialthinker.scene_graph import parse_scene
from spatialthinker.schema import CATEGORIES, LETTERS
from spatialthinker.storage.files import write_text
from spatialthinker.storage.images import open_image
from spatialthinker.storage.journal import Line
from spatialthinker.visualize import data_uri, escape, html_page, html_table, relation_text, svg_image, svg_scene

_STYLE = """
.bar { display: inline-block; height: .7em; background: var(--reference); border-radius: 2px; min-width: 1px; }
.bars td:last-child { min-width: 4.2rem; text-align: left; }
.grid.narrow { grid-template-columns: repeat(auto-fill, minmax(min(100%, 310px), 1fr)); align-items: start; }
.figures { display: flex; flex-wrap: wrap; gap: .5rem 2.5rem; margin: 1rem 0; }
.figures b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.card svg { display: block; width: 100%; height: auto; border-radius: 4px; }
.options { list-style: none; margin: .6rem 0; padding: 0; }
.card > p.soft { font-size: .85rem; overflow-wrap: anywhere; }
"""


def html_distribution(name: str, table: Table) -> str:
    """One table with a bar for each share."""
    shown = [row for row in table if row[1] or name != "rating"]
    widest = max((percent for _, _, percent in shown), default=0) or 1
    rows = "".join(
        f"<tr><td>{escape(value)}</td><td>{number}</td><td>{percent:.1f} %</td>"
        f'<td><span class="bar" style="width:{4 * percent / widest:.2f}rem"></span></td></tr>'
        for value, number, percent in shown
    )
    head = f"<tr><th>{escape(name)}</th><th>rows</th><th>share</th><th></th></tr>"
    body = f"<thead>{head}</thead><tbody>{rows}</tbody>"
    return f'<div class="card bars"><div class="scroll"><table>{body}</table></div></div>'


@dataclass
class Outcomes:
    """Outcomes of a journal's images by the requested category."""

    asked: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    dollars: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    usage: Usage = field(default_factory=Usage)

    @classmethod
    def of(cls, lines: Iterable[Line]) -> "Outcomes":
        """The outcomes that these lines state."""
        found = cls()
        for line in lines:
            category = (line.get("asked") or [line.get("record", {}).get("category", "none")])[0]
            for name in (category, "all"):
                found.asked[name] += 1
                found.accepted[name] += line["status"] == ACCEPTED
                found.dollars[name] += line.get("cost_usd", 0.0)
            found.usage += Usage(**line.get("usage", {}))
            if line["status"] != ACCEPTED:
                found.reasons[line.get("reason", "no reason given").split(":")[0][:120]] += 1
        return found

    def html(self) -> str:
        """Acceptance and price by category, and the reasons of what was left out."""
        names = [name for name in (*CATEGORIES, "none", "all") if self.asked[name]]
        rows = [
            (n, self.asked[n], self.accepted[n], f"{self.accepted[n] / self.asked[n]:.1%}", f"{self.dollars[n]:.4f}")
            for n in names
        ]
        by_category = html_table(("category asked for", "images", "accepted", "share", "dollars"), rows)
        reasons = html_table(("left out because", "images"), self.reasons.most_common(30))
        tables = [by_category, reasons] if self.reasons else [by_category]
        return '<div class="grid">' + "".join(f'<div class="card">{table}</div>' for table in tables) + "</div>"


def html_figures(figures: Mapping[str, object]) -> str:
    """The numbers that matter first, large."""
    items = "".join(f"<div><b>{escape(value)}</b>{escape(name)}</div>" for name, value in figures.items())
    return f'<div class="figures">{items}</div>'


def choose_sample(records: Iterable[Record], number: int, seed: int) -> list[Record]:
    """Up to `number` records, the categories in turn."""
    groups: dict[str, list[Record]] = {name: [] for name in CATEGORIES}
    for record in records:
        groups.setdefault(record.category, []).append(record)
    ranked = [sorted(group, key=lambda record: digest(record, seed, "sample")) for group in groups.values()]
    turns = [group[turn] for turn in range(number) for group in ranked if turn < len(group)]
    return turns[:number]


def html_record(record: Record, image: bytes, number: int) -> str:
    """The card of one row: its image with the evidence, question, options and relations."""
    graph = parse_scene(json.dumps(record.scene), is_reference=True)
    size = record.width, record.height
    with open_image(image) as opened:
        uri = data_uri(image, (opened.format or "png").lower())
    picture = svg_scene(svg_image(f"picture-{number}", uri, size), size, reference=graph)
    options = "".join(
        f"<li{' class=good' if i == record.answer_index else ''}>({LETTERS[i]}) {escape(text)}</li>"
        for i, text in enumerate(record.options)
    )
    note = f"{record.category}, {record.level}, rating {record.rating}; image {record.image_id}"
    if graph and graph.relations:
        note += "; " + "; ".join(map(relation_text, graph.relations))
    return (
        f'<article class="card"><h3>{escape(record.question)}</h3>{picture}<ul class="options">{options}</ul>'
        f'<p class="soft">{escape(note)}</p></article>'
    )


def write_report(path: Path, source: Source, out: Path, number: int, seed: int) -> Path:
    """Write the page of a file of records and its journal; return its path."""
    found = tables(read_records(path))
    total = sum(n for _, n, _ in found["category"])
    sample = choose_sample(read_records(path), number, seed)
    by_image: Mapping[str, list[Record]] = {
        r.image_id: [x for x in sample if x.image_id == r.image_id] for r in sample
    }
    found_images = find_images(source, by_image)
    pairs = [(record, image) for image_id, image in found_images for record in by_image[image_id]]
    cards = [html_record(record, image, i) for i, (record, image) in enumerate(pairs)]
    journal = find_journal(path)
    outcomes = Outcomes.of(newest_lines(journal)) if journal else None
    figures: dict[str, object] = {"questions": total}
    if outcomes and outcomes.asked["all"]:
        share = f"{outcomes.accepted['all'] / outcomes.asked['all']:.1%}"
        figures |= {"accepted": share, "dollars": f"{outcomes.dollars['all']:.2f}"}
        if static := outcomes.usage.cache_read + outcomes.usage.cache_write:
            figures["of the static part cached"] = f"{outcomes.usage.cache_read / static:.0%}"
    body = [
        f"<h1>{escape(path.name)}</h1>",
        f'<p class="soft">Images from {escape(source.locator)}.</p>',
        html_figures(figures),
        "<h2>Rows</h2>",
        f'<div class="grid narrow">{"".join(html_distribution(name, table) for name, table in found.items())}</div>',
        f"<h2>Outcomes</h2>{outcomes.html()}" if outcomes else "",
        "<h2>A sample</h2><p>Dashed: the evidence, which is the reference scene. Green: the right option.</p>",
        f'<div class="grid narrow">{"".join(cards)}</div>',
    ]
    write_text(out, html_page(f"Questions of {path.name}", "\n".join(body), _STYLE))
    return out

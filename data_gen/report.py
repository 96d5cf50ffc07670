"""A page to look at: how the rows spread, why others were left out, and a sample of rows on their images."""

import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from PIL import Image

from data_gen.export import find_images
from data_gen.journal import ACCEPTED, Line, newest_lines
from data_gen.records import Record, find_journal, read_records
from data_gen.selection import digest
from data_gen.sources import Source
from data_gen.tables import Table, tables
from spatialthinker.scene_graph import parse_scene
from spatialthinker.schema import CATEGORIES, LETTERS
from spatialthinker.visualize import (
    draw_scene,
    escape,
    html_image,
    html_page,
    html_table,
    png_bytes,
    relation_text,
)

_BAR = (
    "<style>.bar{display:inline-block;height:.7em;background:var(--reference);border-radius:2px;min-width:1px}"
    ".bars td:last-child{min-width:9rem;text-align:left}</style>"
)


def html_distribution(name: str, table: Table) -> str:
    """One table with a bar for each share."""
    widest = max((percent for _, _, percent in table), default=0) or 1
    rows = "".join(
        f"<tr><td>{escape(value)}</td><td>{number}</td><td>{percent:.1f} %</td>"
        f'<td><span class="bar" style="width:{8 * percent / widest:.2f}rem"></span></td></tr>'
        for value, number, percent in table
    )
    head = f"<tr><th>{escape(name)}</th><th>rows</th><th>share</th><th></th></tr>"
    body = f"<thead>{head}</thead><tbody>{rows}</tbody>"
    return f'<div class="card bars"><div class="scroll"><table>{body}</table></div></div>'


def html_outcomes(lines: Iterable[Line]) -> str:
    """Acceptance and price by category asked for, and the reasons of what was left out."""
    asked: Counter[str] = Counter()
    accepted: Counter[str] = Counter()
    dollars: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for line in lines:
        category = (line.get("asked") or [line.get("record", {}).get("category", "none")])[0]
        asked[category] += 1
        accepted[category] += line["status"] == ACCEPTED
        dollars[category] += line.get("cost_usd", 0.0)
        if line["status"] != ACCEPTED:
            reasons[line.get("reason", "no reason given").split(":")[0][:120]] += 1
    asked["all"], accepted["all"], dollars["all"] = asked.total(), accepted.total(), sum(dollars.values())
    names = [name for name in (*CATEGORIES, "none", "all") if asked[name]]
    rows = [(n, asked[n], accepted[n], f"{accepted[n] / asked[n]:.1%}", f"{dollars[n]:.4f}") for n in names]
    by_category = html_table(("category asked for", "images", "accepted", "share", "dollars"), rows)
    why = html_table(("left out because", "images"), reasons.most_common(30)) if reasons else "<p>Nothing.</p>"
    return f"<h2>Outcomes</h2>{by_category}<h2>Left out</h2>{why}"


def choose_sample(records: Iterable[Record], number: int, seed: int) -> list[Record]:
    """Up to `number` records, the categories in turn."""
    groups: dict[str, list[Record]] = {name: [] for name in CATEGORIES}
    for record in records:
        groups.setdefault(record.category, []).append(record)
    ranked = [sorted(group, key=lambda record: digest(record, seed, "sample")) for group in groups.values()]
    turns = [group[turn] for turn in range(number) for group in ranked if turn < len(group)]
    return turns[:number]


def html_record(record: Record, image: bytes) -> str:
    """The card of one row: its image with the evidence, question, options and relations."""
    graph = parse_scene(json.dumps(record.scene), is_reference=True)
    with Image.open(io.BytesIO(image)) as picture:
        drawn = png_bytes(draw_scene(picture, reference=graph))
    options = "".join(
        f"<li>{'<b class=good>' if i == record.answer_index else ''}({LETTERS[i]}) {escape(text)}"
        f"{'</b>' if i == record.answer_index else ''}</li>"
        for i, text in enumerate(record.options)
    )
    note = f"{record.category}, {record.level}, rating {record.rating}; image {record.image_id}"
    if graph and graph.relations:
        note += "; " + "; ".join(map(relation_text, graph.relations))
    picture_html = html_image(drawn, f"evidence of {record.question}")
    return (
        f'<article class="card"><h3>{escape(record.question)}</h3>{picture_html}<ul>{options}</ul>'
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
    cards = [html_record(r, image) for image_id, image in find_images(source, by_image) for r in by_image[image_id]]
    journal = find_journal(path)
    body = [
        _BAR,
        f"<h1>{escape(path.name)}: {total} questions</h1>",
        f'<p class="soft">Images from {escape(source.locator)}.</p>',
        html_outcomes(newest_lines(journal)) if journal else "",
        "<h2>Rows</h2>",
        f'<div class="grid">{"".join(html_distribution(name, table) for name, table in found.items())}</div>',
        f"<h2>A sample</h2><p>Dashed: the evidence, which is the reference scene.</p>"
        f'<div class="grid">{"".join(cards)}</div>',
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".tmp")
    partial.write_text(html_page(f"Questions of {path.name}", "\n".join(body)), encoding="utf-8")
    partial.replace(out)
    return out

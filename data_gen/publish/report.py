"""HTML page: distributions of the rows, reasons of rejection, and a sample of rows on their images."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from data_gen.curate.export import find_images
from data_gen.curate.selection import digest
from data_gen.curate.tables import tables
from data_gen.journal import ACCEPTED, newest_lines
from data_gen.questions.records import Record, find_journal, read_records
from data_gen.scenes.sources import Source
from spatialthinker.clients.prices import Usage
from spatialthinker.scene_graph import parse_scene
from spatialthinker.schema import CATEGORIES, LETTERS
from spatialthinker.storage.files import write_text
from spatialthinker.storage.journal import Line
from spatialthinker.visualize import image_uri, lay_out, render_page


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

    def rows(self) -> list[tuple[object, ...]]:
        """Acceptance and price by category."""
        asked, accepted, dollars = self.asked, self.accepted, self.dollars
        names = [name for name in (*CATEGORIES, "none", "all") if asked[name]]
        return [(n, asked[n], accepted[n], f"{accepted[n] / asked[n]:.1%}", f"{dollars[n]:.4f}") for n in names]


def choose_sample(records: Iterable[Record], number: int, seed: int) -> list[Record]:
    """Up to `number` records, the categories in turn."""
    groups: dict[str, list[Record]] = {name: [] for name in CATEGORIES}
    for record in records:
        groups.setdefault(record.category, []).append(record)
    ranked = [sorted(group, key=lambda record: digest(record, seed, "sample")) for group in groups.values()]
    turns = [group[turn] for turn in range(number) for group in ranked if turn < len(group)]
    return turns[:number]


def write_report(path: Path, source: Source, out: Path, number: int, seed: int) -> Path:
    """Write the page of a file of records and its journal; return its path."""
    found = tables(read_records(path))
    total = sum(n for _, n, _ in found["category"])
    sample = choose_sample(read_records(path), number, seed)
    by_image: Mapping[str, list[Record]] = {
        r.image_id: [x for x in sample if x.image_id == r.image_id] for r in sample
    }
    found_images = find_images(source, by_image)
    drawn = []  # record, its image's address, its evidence and where that is drawn
    for record, image in ((record, image) for image_id, image in found_images for record in by_image[image_id]):
        graph = parse_scene(json.dumps(record.scene), is_reference=True)
        drawn.append((record, image_uri(image), graph, lay_out((record.width, record.height), reference=graph)))
    journal = find_journal(path)
    outcomes = Outcomes.of(newest_lines(journal)) if journal else None
    figures: dict[str, object] = {"questions": total}
    if outcomes and outcomes.asked["all"]:
        share = f"{outcomes.accepted['all'] / outcomes.asked['all']:.1%}"
        figures |= {"accepted": share, "dollars": f"{outcomes.dollars['all']:.2f}"}
        if static := outcomes.usage.cache_read + outcomes.usage.cache_write:
            figures["of the static part cached"] = f"{outcomes.usage.cache_read / static:.0%}"
    page = render_page(
        Path(__file__).with_suffix(".html.jinja"),
        title=f"Questions of {path.name}",
        file_name=path.name,
        locator=source.locator,
        figures=figures,
        tables=found,
        outcomes=outcomes,
        sample=drawn,
        letters=LETTERS,
    )
    write_text(out, page)
    return out

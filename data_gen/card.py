"""The data card: what a data set holds, where it comes from and what it cost."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from data_gen.records import PROVENANCE
from data_gen.selection import Selection
from data_gen.tables import markdown_table, tables

_HEAD = """\
---
task_categories: [visual-question-answering]
language: [en]
tags: [spatial-reasoning, scene-graph]
configs:
- config_name: default
  data_files:
{files}
---
# Spatial questions from scene graphs

{rows} multiple-choice questions about where things are, one right option each, with the scene graph that the answer
rests on. The fifteen columns of STVQA-7K come first; {provenance} follow.
"""


def write_card(path: Path, selection: Selection, summary: dict[str, Any]) -> None:
    """Write the card beside the data."""
    records = [record for rows in selection.splits.values() for record in rows]
    files = "\n".join(f"  - split: {s}\n    path: {s}-*.parquet" for s, rows in selection.splits.items() if rows)
    head = _HEAD.format(files=files, rows=len(records), provenance=", ".join(PROVENANCE))
    sizes = ", ".join(f"{len(rows)} {split}" for split, rows in selection.splits.items())
    parts = [head, f"Splits: {sizes}; all rows of one image share a split.", "## Origin", _origin(selection)]
    generation = summary["generation"]
    if generation:
        parts.append(f"Settings of the generation: `{json.dumps(generation)}`")
    parts += ["## Price", summary["price"]]
    parts.append("## Contents")
    parts += [markdown_table(name, table) for name, table in tables(records).items()]
    if summary["shortfalls"]:
        lacking = ", ".join(f"{name} {number}" for name, number in summary["shortfalls"].items())
        parts.append(f"Rows short of their quotas, taken from other categories: {lacking}.")
    if summary["left_out"]:
        parts.append("Left out: " + "; ".join(f"{n} ({why})" for why, n in summary["left_out"].items()) + ".")
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _origin(selection: Selection) -> str:
    origins = Counter(
        tuple(record.provenance.get(name, "") for name in PROVENANCE)
        for records in selection.splits.values()
        for record in records
    )
    lines = [f"| {' | '.join(PROVENANCE)} | rows |", "|" + "---|" * (len(PROVENANCE) + 1)]
    lines += [f"| {' | '.join(values)} | {number} |" for values, number in origins.most_common()]
    return "\n".join(lines)

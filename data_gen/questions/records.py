"""One question and its answer between the stages: read from a journal, a CSV or a parquet file, written as CSV.

The journal beside a CSV (same name, .jsonl) is the truth where it exists. CSVs hold the columns of the released
pipeline; of the image they hold no bytes.
"""

import ast
import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from data_gen.journal import ACCEPTED, newest_lines
from data_gen.questions.draft import Draft, question_of, strip_letters
from data_gen.scenes.scene import Scene, reference_scene
from spatialthinker.plain_text import from_cell, to_cell
from spatialthinker.prompts import parse_image_size, render_prompt
from spatialthinker.response import section
from spatialthinker.schema import COLUMNS, LETTERS, VqaRow, build_open_row, build_row, question_with_options
from spatialthinker.storage.files import whole_file
from spatialthinker.storage.journal import is_journal, read_lines

PROVENANCE = ("source", "provider", "model", "prompt_version", "seed")
"""Columns after the fifteen public ones; texts."""

REWARD = "reward"
"""Column behind those of the provenance, in files whose records name rewards."""

_SELDOM = ("answer", "reward")
"""Fields that a journal holds only where they say something."""

RAW_COLUMNS = tuple(
    """image_id images problem question_only question_with_options question_words options answer category level rating
    full_scene_graph""".split()
)


@dataclass(frozen=True)
class Record:
    """A question with its reference scene, without its image."""

    image_id: str
    width: int
    height: int
    question: str
    options: tuple[str, ...]
    answer_index: int
    category: str
    level: str
    rating: int
    scene: dict[str, Any]
    """The reference scene: the evidence and nothing else."""
    full_scene: dict[str, Any] = field(default_factory=dict)
    """The whole graph of the source; empty where the file does not hold it."""
    provenance: Mapping[str, str] = field(default_factory=dict)
    answer: str = ""
    """Answer of a question without options."""
    reward: str = ""
    """Name of the reward that reads the answer; empty where the run chooses it."""

    @property
    def picture_id(self) -> str:
        """Id of the picture that the image was made from: rows of one picture have `ID#NUMBER` as their image ids."""
        return self.image_id.rpartition("#")[0] if self.reward else self.image_id

    def to_row(self, image: bytes) -> VqaRow:
        """The record as a row of the public columns."""
        question = question_with_options(self.question, self.options) if self.options else self.question
        template = "think_answer" if self.reward else "spatial_thinker_full"
        problem = render_prompt(template, question, self.width, self.height)
        common = {"image_id": self.image_id, "image": image, "problem": problem, "scene": self.scene}
        if self.options:
            return build_row(**common, **question_of(self))
        labels = {"category": self.category, "level": self.level, "rating": self.rating}
        return build_open_row(**common, question=self.question, answer=self.answer, **labels)

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON values, as `from_dict` reads them."""
        values = self.__dict__ | {"options": list(self.options), "provenance": dict(self.provenance)}
        return {name: value for name, value in values.items() if value or name not in _SELDOM}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Record":
        """The record that `as_dict` wrote."""
        return cls(**{**values, "options": tuple(values["options"])})


def make_record(draft: Draft, scene: Scene, provenance: Mapping[str, str]) -> Record:
    """The record of a checked draft; its reference scene holds exactly the evidence."""
    return Record(
        image_id=scene.image_id,
        width=scene.width,
        height=scene.height,
        **question_of(draft),
        scene=reference_scene(tuple(scene.by_id[i] for i in draft.evidence), draft.relations),
        full_scene=scene.graph(),
        provenance=provenance,
    )


def journal_of(path: Path) -> Path:
    """The path of an output's journal, beside it."""
    return path.with_suffix(".jsonl")


def find_journal(path: Path) -> Path | None:
    """The journal of a file; None where there is none, whatever else has its name."""
    journal = journal_of(path)
    return journal if journal.is_file() and is_journal(journal) else None


def read_records(path: Path) -> Iterator[Record]:
    """The records of a journal, of a CSV (its journal's where there is one) or of a parquet file.

    Raises ValueError that names the file and the row or column at fault.
    """
    if path.suffix == ".csv":
        path = find_journal(path) or path
    if not path.is_file():
        raise ValueError(f"--input_file {path}: no such file")
    if path.suffix == ".jsonl":
        if not is_journal(path):
            raise ValueError(f"--input_file {path} is no journal of this program")
        for line in newest_lines(path):
            if line["status"] == ACCEPTED:
                yield Record.from_dict(line["record"])
    elif path.suffix == ".parquet":
        yield from _read_rows(path, _parquet_rows(path))
    elif path.suffix == ".csv":
        yield from _read_rows(path, _csv_rows(path))
    else:
        raise ValueError(f"--input_file {path}: not one of .csv, .jsonl, .parquet")


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of the journal of a file; empty where it has none."""
    journal = find_journal(path)
    return {} if journal is None else next(read_lines(journal), {}).get("settings", {})


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"--input_file {path} is no parquet: {error}") from error
    columns = [name for name in file.schema_arrow.names if name not in ("images", "image")]
    for batch in file.iter_batches(batch_size=256, columns=columns):
        yield from batch.to_pylist()


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(1 << 30)
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield {name: from_cell(cell) if isinstance(cell, str) else cell for name, cell in row.items()}


def _read_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Iterator[Record]:
    for index, row in enumerate(rows):
        try:
            yield _record_of(row)
        except (KeyError, ValueError, SyntaxError, TypeError) as error:
            what = f"no column {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path}, row {index} (image_id {row.get('image_id')}): {what}") from None


def _record_of(row: dict[str, Any]) -> Record:
    options = ast.literal_eval(row["options"]) if isinstance(row["options"], str) else row["options"]
    options = strip_letters([str(option) for option in options])
    width, height = parse_image_size(row["problem"])
    scene_text, answer = section(row["answer"], "scene"), section(row["answer"], "answer")
    if scene_text is None or answer is None:
        raise ValueError("its answer lacks <scene> or <answer>")
    is_open = not options and bool(row.get(REWARD))
    return Record(
        image_id=str(row["image_id"]),
        width=width,
        height=height,
        question=row["question_only"],
        options=tuple(options),
        answer_index=0 if is_open else answer_index(answer, options),
        category=row["category"],
        level=row["level"],
        rating=read_rating(row.get("rating")),
        scene=json.loads(scene_text),
        full_scene=json.loads(row.get("full_scene_graph") or "{}"),
        provenance={name: str(row[name]) for name in PROVENANCE if row.get(name)},
        answer=answer if is_open else "",
        reward=str(row.get(REWARD) or ""),
    )


def read_rating(value: Any) -> int:
    """A rating from 1 to 10: an integer, "8", "8/10" or 7.5 (rounded down). Raises ValueError for anything else."""
    text = str(value).strip()
    match = re.fullmatch(r"(\d+)(?:\.\d+)?\s*(?:/\s*10)?", text)
    if match is None or not 1 <= int(match[1]) <= 10:
        raise ValueError(f"rating {text!r} is not a number from 1 to 10")
    return int(match[1])


def answer_index(answer: str, options: list[str]) -> int:
    """The index that an answer names: "B", "(B)", "B.", "(B) text" or an option's text. Raises ValueError for none."""
    text = answer.strip()
    folded = [option.strip().casefold() for option in options]
    match = re.fullmatch(r"\(?([A-D])\)?[.:)]?(?:\s+(.+))?", text, re.DOTALL)
    if match is not None:
        index = LETTERS.index(match[1])
        if index < len(options) and (match[2] is None or match[2].strip().casefold() == folded[index]):
            return index
    if text.casefold() in folded:
        return folded.index(text.casefold())
    raise ValueError(f"answer {answer!r} names none of the {len(options)} options")


def write_csv(records: Iterable[Record], path: Path, is_exported: bool = False) -> int:
    """Write a CSV and return its number of rows; it appears complete or not at all."""
    records = iter(records)
    first = list(islice(records, 1))
    columns = (*COLUMNS, *PROVENANCE) if is_exported else RAW_COLUMNS
    columns += (REWARD,) if any(record.reward for record in first) else ()
    number = 0
    with whole_file(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for record in chain(first, records):
            row = _csv_row(record)
            writer.writerow({name: to_cell(cell) if isinstance(cell, str) else cell for name, cell in row.items()})
            number += 1
    return number


def _csv_row(record: Record) -> dict[str, Any]:
    row = record.to_row(b"").__dict__
    words = sorted(set(re.findall(r"[a-z]+", record.question.casefold())))
    return {**row, **record.provenance, "images": record.image_id, "options": str(row["options"])} | {
        REWARD: record.reward,
        "question_words": str(words),
        "full_scene_graph": json.dumps(record.full_scene) if record.full_scene else "",
    }

"""Commands on a finished data set, local or on the hub: a CSV for reading, a split by level."""

import csv
from collections import Counter
from collections.abc import Iterator
from itertools import batched
from pathlib import Path

from data_gen.curate.export import ROW_GROUP_ROWS
from data_gen.curate.selection import SPLITS
from data_gen.publish.publishing import upload_folder
from data_gen.scenes.sources import Row, Source, open_source
from spatialthinker.plain_text import to_cell
from spatialthinker.schema import parquet_path, parquet_schema
from spatialthinker.storage.files import claim_output, whole_file

REVIEW_COLUMNS = ("image_id", "question_with_options", "answer_only", "category", "split")
LEVEL_GROUPS = {"easy": ("easy",), "hard": ("medium", "hard")}


def open_splits(name: str) -> dict[str, Source]:
    """The splits of a data set. Raises ValueError where it has none, or lacks the public columns."""
    folder, splits = Path(name), {}
    for split in SPLITS:
        if not folder.is_dir():
            splits[split] = open_source(f"{name}@{split}")
        elif files := sorted(folder.glob(f"{split}-*.parquet")):
            splits[split] = open_source(str(files[0]))
    if not splits:
        raise ValueError(f"--dataset_name {name}: the folder holds no train-*.parquet or val-*.parquet")
    for split, source in splits.items():
        missing = [c for c in parquet_schema().names if c not in source.columns]
        if missing:
            raise ValueError(f"--dataset_name {name}, split {split}: no column {', '.join(missing)}")
    return splits


def review(name: str, path: Path) -> int:
    """Write the columns that a reader needs; return the number of rows."""
    number = 0
    splits = open_splits(name)
    with whole_file(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(REVIEW_COLUMNS)
        for split, source in splits.items():
            for row in source.rows():
                writer.writerow([to_cell(str({**row, "split": split}[column])) for column in REVIEW_COLUMNS])
                number += 1
    return number


def split_by_level(name: str, out: Path | None, repo: str | None, is_private: bool, is_overwritten: bool) -> None:
    """Print, and unless `out` is None write, the easy and the hard part of every split."""
    splits = open_splits(name)
    for split, source in splits.items():
        levels = Counter(row["level"] for row in source.rows())
        parts = ", ".join(f"{group} {sum(levels[x] for x in names)}" for group, names in LEVEL_GROUPS.items())
        print(f"{split}: {parts} ({', '.join(f'{x} {n}' for x, n in sorted(levels.items()))})")  # noqa: T201
    if out is None:
        return
    for group, names in LEVEL_GROUPS.items():
        folder = claim_output(out / f"{Path(name).name}_{group}", is_overwritten)
        for split in SPLITS:
            parquet_path(folder, split).unlink(missing_ok=True)
        for split, source in splits.items():
            _write_rows(parquet_path(folder, split), (r for r in source.rows() if r["level"] in names))
        print(f"{group}: {folder}")  # noqa: T201
        if repo is not None:
            upload_folder(folder, f"{repo}_{group}", is_private)


def _write_rows(path: Path, rows: Iterator[Row]) -> None:
    """Write rows of the public columns, a few at a time; the file appears complete or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = parquet_schema()
    with whole_file(path) as partial, pq.ParquetWriter(partial, schema) as writer:
        for batch in batched(rows, ROW_GROUP_ROWS):
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))

"""Sources of rows: a hub name, a saved data set, parquet, JSON lines, or drawn scenes; read one row at a time.

hub name `OWNER/NAME[@split]`, folder of parquet files or of `save_to_disk`, FILE.parquet, FILE.json(l),
`synthetic:N[@SEED]` (coloured shapes with exact graphs: the offline demo)
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path
from typing import Any

from data_gen.scenes.scene import IMAGE_COLUMNS, UNREADABLE
from spatialthinker.network import use_cache_without_network
from spatialthinker.schema import CATEGORIES
from spatialthinker.shapes import DEFAULT_CANVAS, Shape, draw, encode_png, gap_px
from spatialthinker.synthetic import make_puzzle

Row = dict[str, Any]
SYNTHETIC = "synthetic:"
SAMPLE_ROWS = 100
"""So many lines of a file are looked at for its columns."""

BATCH_ROWS = 32
"""Rows held at a time; an image of Visual Genome has about 100 kB."""


@dataclass(frozen=True)
class Source:
    """A readable source; every call of `rows` reads it anew."""

    locator: str
    columns: tuple[str, ...]
    num_rows: int | None
    rows: Callable[..., Iterator[Row]]
    """rows(start=0): the rows from number `start` on."""
    root: Path = Path(".")
    """Folder of relative image paths."""

    def check(self, needs_graph: bool = True) -> "Source":
        """Itself; ValueError where a column is missing that every row needs."""
        wanted = [("image_id",), IMAGE_COLUMNS, *([("objects",), ("relationships",)] if needs_graph else [])]
        if missing := [" or ".join(names) for names in wanted if not set(names) & set(self.columns)]:
            found = ", ".join(self.columns)
            raise ValueError(f"--source {self.locator} has no column {', '.join(missing)}; it has {found}")
        return self


def open_source(locator: str) -> Source:
    """The source of a locator. Raises ValueError where there is none or it cannot be read."""
    if locator.startswith(SYNTHETIC):
        return _open_synthetic(locator)
    path, split = Path(locator), "train"
    if not path.exists() and "@" in locator:
        name, _, split = locator.rpartition("@")
        path = Path(name)
    try:
        if path.suffix in (".json", ".jsonl") and path.is_file():
            return _open_json(path)
        if path.suffix == ".parquet" and path.is_file():
            return _open_parquet(locator, [path])
        if path.is_dir() and not (path / "dataset_info.json").is_file() and not (path / "dataset_dict.json").is_file():
            files = sorted(path.rglob(f"{split}*.parquet")) or sorted(path.rglob("*.parquet"))
            if not files:
                raise ValueError(f"--source {locator}: the folder holds no parquet file and no saved data set")
            return _open_parquet(locator, files)
        if path.suffix and path.suffix[1:] in ("parquet", "json", "jsonl", "csv"):
            raise ValueError(f"--source {locator}: no such file, or not one of .parquet, .json, .jsonl")
        return _open_dataset(locator, path, split)
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"--source {locator} cannot be read: {error}") from error


def absolute_locator(locator: str) -> str:
    """The locator with the path in it, if it names one that exists, from the root: for another working directory."""
    name, at, split = locator.rpartition("@")
    if Path(locator).exists():
        return str(Path(locator).resolve())
    return f"{Path(name).resolve()}@{split}" if at and name and Path(name).exists() else locator


def _open_parquet(locator: str, paths: list[Path]) -> Source:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        files = [pq.ParquetFile(path) for path in paths]
    except pa.ArrowInvalid as error:
        raise ValueError(f"--source {locator} is no parquet: {error}") from error

    def rows(start: int = 0) -> Iterator[Row]:
        for file in files:
            for group in range(file.num_row_groups):
                number = file.metadata.row_group(group).num_rows
                if start < number:
                    for batch in file.iter_batches(batch_size=BATCH_ROWS, row_groups=[group]):
                        yield from batch.slice(min(start, len(batch))).to_pylist()
                        start = max(0, start - len(batch))
                else:
                    start -= number

    num_rows = sum(file.metadata.num_rows for file in files)
    return Source(locator, tuple(files[0].schema_arrow.names), num_rows, rows, paths[0].parent)


def _open_json(path: Path) -> Source:
    with path.open(encoding="utf-8") as file:
        is_list = file.read(1) == "["
    if is_list:
        try:
            items = json.loads(path.read_text(encoding="utf-8"))
        except RecursionError:
            raise ValueError(f"--source {path} is nested too deep; write one row a line (.jsonl)") from None
        num_rows = len(items)

        def rows(start: int = 0) -> Iterator[Row]:
            for number, item in enumerate(items[start:], start):
                yield _checked(item, f"{path}, item {number}")
    else:
        with path.open("rb") as file:
            num_rows = sum(1 for line in file if line.strip())

        def rows(start: int = 0) -> Iterator[Row]:
            with path.open("rb") as file:
                numbered = ((i, line) for i, line in enumerate(file, 1) if line.strip())
                for number, line in islice(numbered, start, None):
                    place = f"{path}, line {number}"
                    try:
                        yield _checked(json.loads(line.decode("utf-8-sig", "replace")), place)
                    except (ValueError, RecursionError) as error:
                        yield {UNREADABLE: f"{place} is no JSON: {error}"}

    first = next((row for row in islice(rows(), SAMPLE_ROWS) if UNREADABLE not in row), None)
    if first is None:
        reason = next(rows(), {}).get(UNREADABLE, "")
        raise ValueError(f"--source {path} holds no rows{reason and ': '}{reason}")
    return Source(str(path), tuple(first), num_rows, rows, path.parent)


def _checked(item: Any, place: str) -> Row:
    return item if isinstance(item, dict) else {UNREADABLE: f"{place} is no JSON object: {str(item)[:60]}"}


def _open_dataset(locator: str, path: Path, split: str) -> Source:
    use_cache_without_network([str(path)])
    import datasets

    if path.is_dir():
        loaded = datasets.load_from_disk(str(path))
        data = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
    else:
        data = datasets.load_dataset(str(path), split=split)
    assert isinstance(data, datasets.Dataset)
    for column in IMAGE_COLUMNS:
        if isinstance(data.features.get(column), datasets.Image):
            data = data.cast_column(column, datasets.Image(decode=False))

    def rows(start: int = 0) -> Iterator[Row]:
        yield from map(dict, data.select(range(start, len(data))))

    return Source(locator, tuple(data.column_names), len(data), rows)


def _open_synthetic(locator: str) -> Source:
    number, _, seed = locator.removeprefix(SYNTHETIC).partition("@")
    if not number.isdecimal() or int(number) < 1 or not (seed or "0").isdecimal():
        raise ValueError(f"--source {locator}: write {SYNTHETIC}N or {SYNTHETIC}N@SEED, such as {SYNTHETIC}100")

    def rows(start: int = 0) -> Iterator[Row]:
        yield from (synthetic_row(int(seed or 0), index) for index in range(start, int(number)))

    return Source(locator, ("image_id", "image", "objects", "relationships"), int(number), rows)


def synthetic_row(seed: int, index: int) -> Row:
    """Row `index` of the endless stream of drawn scenes, with all relations that its placement makes true."""
    rng = random.Random(f"scene/{seed}/{index}")
    shapes = make_puzzle(CATEGORIES[index % len(CATEGORIES)], rng, DEFAULT_CANVAS).shapes
    ids: list[str] = []
    for shape in shapes:
        label = shape.name.replace(" ", "_")
        ids.append(f"{label}.{1 + sum(i.startswith(label + '.') for i in ids)}")
    relations = []
    for pair in combinations(range(len(shapes)), 2):
        subject, target = rng.sample(pair, 2)
        predicates = _predicates(shapes[subject], shapes[target], is_above=subject > target)
        relations += [{"subject": ids[subject], "predicate": p, "object": ids[target]} for p in predicates]
    objects = [{"id": i, "bbox": list(shape.box)} for i, shape in zip(ids, shapes, strict=True)]
    image = encode_png(draw(DEFAULT_CANVAS, shapes))
    return {
        "image_id": f"synthetic-{seed}-{index:06d}",
        "image": {"bytes": image, "path": None},
        "objects": objects,
        "relationships": relations,
    }


def _predicates(subject: Shape, target: Shape, is_above: bool) -> list[str]:
    """Relations of one shape to another; `is_above` where it is drawn later."""
    gap = gap_px(subject, target)
    if gap < 0:
        return ["covering", "in front of"] if is_above else ["covered by", "behind"]
    (x, y), (u, v) = subject.centre, target.centre
    sides = ("to the left of", "to the right of") if abs(x - u) > abs(y - v) else ("above", "below")
    side = sides[int(x > u if abs(x - u) > abs(y - v) else y > v)]
    return [side, "touching"] if gap == 0 else [side]

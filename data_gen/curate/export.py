"""From selected records to a folder that trains: parquet files per split, CSV copies, a saved data set, a card."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from data_gen.arguments import VG150
from data_gen.questions.records import PROVENANCE, REWARD, Record, read_records, read_settings
from data_gen.scenes.scene import SceneFault, image_bytes, read_image_id
from data_gen.scenes.sources import Source, open_source
from spatialthinker.schema import parquet_path, parquet_schema
from spatialthinker.storage.files import whole_file

ROW_GROUP_ROWS = 200


def export_schema(has_rewards: bool = False) -> Any:
    """The Arrow schema of the public columns with the provenance columns after them, and the one of rewards."""
    import pyarrow as pa

    schema = parquet_schema()
    metadata = json.loads(schema.metadata[b"huggingface"])
    for name in (*PROVENANCE, REWARD) if has_rewards else PROVENANCE:
        schema = schema.append(pa.field(name, pa.string()))
        metadata["info"]["features"][name] = {"dtype": "string", "_type": "Value"}
    return schema.with_metadata({"huggingface": json.dumps(metadata)})


def export_parquet(splits: Mapping[str, Sequence[Record]], source: Source, out_dir: Path) -> dict[str, Path]:
    """Write one parquet file per non-empty split with the images' original bytes; return the paths.

    One pass over the source, a row group in memory. The files appear complete or not at all. Raises ValueError where
    an image is missing.
    """
    import pyarrow.parquet as pq

    places: dict[str, list[tuple[str, Record]]] = {}
    for split, record in ((split, record) for split, records in splits.items() for record in records):
        places.setdefault(record.image_id, []).append((split, record))
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = {split: parquet_path(out_dir, split) for split, records in splits.items() if records}
    schema = export_schema(any(record.reward for records in splits.values() for record in records))
    with ExitStack() as stack:
        partial = {split: stack.enter_context(whole_file(path)) for split, path in paths.items()}
        writers = {s: stack.enter_context(pq.ParquetWriter(path, schema)) for s, path in partial.items()}
        waiting: dict[str, list[dict[str, Any]]] = {split: [] for split in paths}
        for image_id, image in find_images(source, places.keys()):
            for split, record in places.pop(image_id):
                waiting[split].append(export_row(record, image))
                if len(waiting[split]) == ROW_GROUP_ROWS:
                    _write(writers[split], schema, waiting[split])
        if places:
            some = ", ".join(list(places)[:5])
            raise ValueError(f"--source {source.locator} has no image of {len(places)} records, such as {some}")
        for split, rows in waiting.items():
            _write(writers[split], schema, rows)
    return paths


def export_row(record: Record, image: bytes) -> dict[str, Any]:
    """The values of a row by the columns of `export_schema`."""
    row = {**dict.fromkeys(PROVENANCE, ""), **vars(record.to_row(image)), **record.provenance, REWARD: record.reward}
    return row | {"images": {"bytes": image, "path": None}}


def write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows of `export_row` with rewards to one parquet file."""
    import pyarrow.parquet as pq

    with pq.ParquetWriter(path, schema := export_schema(has_rewards=True)) as writer:
        _write(writer, schema, rows)


def _write(writer: Any, schema: Any, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa

    if rows:
        writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        rows.clear()


def image_locator(path: Path) -> str | None:
    """The location of a file's images: the source of its journal, its column `source`, or the parquet file itself.

    A CSV without either is one of the released pipeline, whose images are those of VG150. None for other files.
    """
    if (source := read_settings(path).get("source")) or path.suffix != ".csv":
        return source or (str(path) if path.suffix == ".parquet" else None)
    sources = {record.provenance.get("source") for record in read_records(path)}
    return sources.pop() or VG150 if len(sources) == 1 else None


def image_source(path: Path, locator: str | None) -> Source:
    """The source of a file's images: the one named, the one of its journal, or the parquet file itself.

    Raises ValueError where none of them gives it.
    """
    locator = locator or image_locator(path)
    if locator is None:
        raise ValueError(f"--input_file {path} does not say where its images are; name it with --source")
    return open_source(locator).check(needs_graph=False)


def find_images(source: Source, wanted: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """The encoded image of each wanted id, in the order of the source, each once."""
    missing = set(wanted)
    for index, row in enumerate(source.rows()):
        if not missing:
            return
        try:
            image_id = read_image_id(row, index)
            if image_id not in missing:
                continue
            image = image_bytes(row, source.root)
        except SceneFault:
            continue
        missing.discard(image_id)
        yield image_id, image


def save_dataset(paths: Mapping[str, Path], out_dir: Path) -> Path:
    """Write the splits as a saved `datasets` folder and return it."""
    import datasets

    data = datasets.load_dataset("parquet", data_files={split: str(path) for split, path in paths.items()})
    assert isinstance(data, datasets.DatasetDict)
    data.save_to_disk(str(out_dir))
    return out_dir

"""Rows of a benchmark's split: from the hub, a folder or a file, with the archives and files beside them."""

import json
import re
from pathlib import Path
from typing import Any

from evaluation.benchmarks.benchmark import Benchmark
from evaluation.benchmarks.media import MediaFolder

_FILE_KINDS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv"}
_SPLIT_ALIASES = {"val": ("val", "validation"), "validation": ("validation", "val")}


def read_rows(benchmark: Benchmark, data_path: str | None, split: str) -> tuple[Any, MediaFolder]:
    """Return the `datasets.Dataset` of a split, its images left encoded, and the files beside it."""
    import datasets

    rows: Any = None
    if data_path is None and (benchmark.archives or benchmark.data_file):
        data_path = _fetch_files(benchmark)
        if benchmark.data_file is None and benchmark.config is not None:
            rows = datasets.load_dataset(benchmark.repo, benchmark.config, split=split, revision=benchmark.revision)
    folder = Path(data_path).parent if data_path and Path(data_path).is_file() else Path(data_path or ".")
    media = MediaFolder(folder.absolute(), benchmark.archives)  # engines have another working directory
    if rows is not None:
        pass
    elif data_path is None:
        rows = datasets.load_dataset(benchmark.repo, benchmark.config, split=split, revision=benchmark.revision)
    elif (Path(data_path) / "state.json").is_file():
        rows = datasets.load_from_disk(str(Path(data_path).absolute()))
    else:
        rows = _read_local(benchmark, Path(data_path), split, media)
    for column in (*benchmark.images, *([benchmark.mask] if benchmark.mask else [])):
        feature = rows.features.get(column)
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
            rows = rows.cast_column(column, datasets.List(datasets.Image(decode=False)))
    return rows, media


def _fetch_files(benchmark: Benchmark) -> str:
    """Return the folder of the repository's archives and data files, fetched from the hub."""
    from huggingface_hub import snapshot_download

    wanted = [*benchmark.archives, benchmark.data_file or "*.parquet"]
    return snapshot_download(
        benchmark.repo, repo_type="dataset", revision=benchmark.revision, allow_patterns=[*wanted]
    )


def _read_local(benchmark: Benchmark, path: Path, split: str, media: MediaFolder) -> Any:
    """Return the rows of a file or folder, or of a file of lines in one of the archives."""
    import datasets

    if benchmark.data_file and (path / benchmark.data_file).is_file():
        return _read_files([str(path / benchmark.data_file)])
    if path.is_dir() and (place := media.find_member(f"{split}.jsonl")):
        lines = media.read(place[1]).decode("utf-8").splitlines()
        return datasets.Dataset.from_list([json.loads(line) for line in lines if line.strip()])
    return _read_files([str(file) for file in find_files(path, split)])


def _read_files(files: list[str]) -> Any:
    """Return the rows of files of one kind. Errors: ValueError for a file that cannot be read."""
    import datasets
    from datasets.exceptions import DatasetGenerationError

    suffix = Path(files[0]).suffix
    # A choice may read None or NA: only an empty cell is empty.
    options: dict[str, Any] = {"keep_default_na": False, "na_values": [""]} if suffix in (".tsv", ".csv") else {}
    if suffix == ".tsv":
        options["sep"] = "\t"
    try:
        return datasets.load_dataset(_FILE_KINDS[suffix], data_files={"rows": files}, split="rows", **options)
    except DatasetGenerationError as error:
        raise ValueError(f"{files[0]}: cannot be read: {error.__cause__ or error}") from error


def find_files(path: Path, split: str) -> list[Path]:
    """Return the data files of a split: the file itself, or those of a folder whose names begin with the split."""
    if path.is_file():
        if path.suffix not in _FILE_KINDS:
            raise ValueError(f"{path}: not one of {', '.join(_FILE_KINDS)}")
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such data file or folder")
    for suffix in _FILE_KINDS:
        found = sorted(path.rglob(f"*{suffix}"))
        for alias in _SPLIT_ALIASES.get(split, (split,)):
            if chosen := [file for file in found if re.match(rf"{re.escape(alias)}(-|\.)", file.name)]:
                return chosen
    names = sorted(file.name for file in path.rglob("*") if file.suffix in _FILE_KINDS)
    raise FileNotFoundError(f"{path}: no data file of split {split!r}; found {', '.join(names) or 'none at all'}")

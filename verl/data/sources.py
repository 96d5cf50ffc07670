"""Loading of data sets by locator, and of encoded images from image columns."""

import json
import math
import re
from collections.abc import Callable, Sequence
from glob import escape
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, LargeList, List, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from pandas import read_csv

from spatialthinker.storage.images import ImageSource, encode, find_image, load_image
from verl.config.checks import split_path

FILE_BUILDERS = {"jsonl": "json", "json": "json", "parquet": "parquet", "csv": "csv", "arrow": "arrow"}
SAVED_MARKS = ("dataset_info.json", "dataset_dict.json")


class DataError(ValueError):
    """A data set or a row is unusable; the message names it and what to change."""


def load_rows(locator: str) -> Dataset:
    """The rows of `path[@split]`, split `train` when none is given; images stay encoded.

    The path is a file (parquet, json, jsonl, csv or arrow: its rows are the split `train`), a data set saved by
    `save_to_disk`, a folder of data files (SPLIT-*.parquet and the like), or a hub name.

    Raises:
        DataError: with the locator and the cause.
    """
    path, mark = split_path(locator, "@")
    split = mark[1:] or "train"
    try:
        rows = _load(path, split)
    except DataError:
        raise
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        raise DataError(f"data set {locator!r} cannot be loaded: {error}") from error
    for name, feature in rows.features.items():
        if (encoded := _change(feature, _undecoded)) != feature:
            rows = rows.cast_column(name, encoded)
    return rows


def _load(path: str, split: str) -> Dataset:
    place = Path(path)
    if place.is_file():
        builder = FILE_BUILDERS.get(place.suffix.lstrip("."))
        if builder is None:
            raise DataError(f"{path}: a data file ends in one of {', '.join(FILE_BUILDERS)}")
        if split != "train":
            raise DataError(f"{path}@{split}: a single file has no splits but train; drop @{split}")
        _check_encoding(place)
        return _load_files(builder, [place])
    if any((place / name).is_file() for name in SAVED_MARKS):
        loaded = load_from_disk(path)
        if isinstance(loaded, Dataset):
            return loaded
        if split not in loaded:
            raise DataError(f"{path} holds no split {split!r}; it has {', '.join(map(str, loaded))}")
        return loaded[split]
    if place.is_dir():
        return _load_folder(place, split)
    return load_dataset(path, split=split)


def _load_folder(folder: Path, split: str) -> Dataset:
    """Loads SPLIT.*, SPLIT-* or SPLIT/* of a folder or its `data`; files without split names are `train`.

    Not by `datasets`, which looks for split names anywhere in a path, also in parent folders.
    """
    named = re.compile(rf"{re.escape(split)}(?![A-Za-z0-9])")
    files: list[Path] = []
    for place in (folder, folder / "data"):
        inside = [*_data_files(place), *_data_files(place / split)]
        files = files or [file for file in inside if file.parent == place / split or named.match(file.name)]
        if not files and split == "train" and not any(re.match("train|val|test|dev", file.name) for file in inside):
            files = inside
    builders = {FILE_BUILDERS[file.suffix[1:]] for file in files}
    if len(builders) != 1:
        found = "files of several kinds" if builders else f"no {split}-*.parquet or another data file of that split"
        raise DataError(f"{folder} holds {found}; give path@split with a split that is there, or one file")
    for file in files:
        _check_encoding(file)
    return _load_files(builders.pop(), files)


def _check_encoding(file: Path) -> None:
    """Passes for data files that are not text, or are in UTF-8; otherwise DataError names the first bad line."""
    if FILE_BUILDERS[file.suffix[1:]] not in ("json", "csv"):
        return
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode("utf-8")
                fault = "it holds NUL characters, as UTF-16 does" if b"\0" in line else ""
            except UnicodeDecodeError as error:
                fault = f"byte {line[error.start]:#04x} is no UTF-8"
            if fault:
                raise DataError(f"{file}, line {number}: {fault}; store the file in UTF-8")


def _data_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*") if file.is_file() and file.suffix[1:] in FILE_BUILDERS)


def _load_files(builder: str, files: Sequence[Path]) -> Dataset:
    """Rows of data files. Their names are no patterns, cells of a CSV are text, and text of a JSON file is no date."""
    names = [escape(str(file)) for file in files]
    if builder == "csv":
        columns = read_csv(files[0], nrows=0).columns
        text = Features({str(column): Value("string") for column in columns})
        return load_dataset(
            builder, data_files=names, split="train", features=text, keep_default_na=False, na_values=[""]
        )
    rows = load_dataset(builder, data_files=names, split="train")
    if builder == "json":
        features = Features(_change(dict(rows.features), _undated))
        if features != rows.features:
            return Dataset.from_list([row for file in files for row in _read_json(file)], features=features)
    return rows


def _read_json(file: Path) -> list[dict[str, Any]]:
    """Rows of a JSON list, or of a file with one JSON object per line."""
    text = file.read_text(encoding="utf-8-sig")
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        content = [json.loads(line) for line in text.split("\n") if line.strip()]
    return content if isinstance(content, list) else [content]


def _change(feature: Any, change: Callable[[Any], Any]) -> Any:
    """The feature of a column with the features inside it changed."""
    if isinstance(feature, List | LargeList):
        return type(feature)(_change(feature.feature, change))
    if isinstance(feature, dict):
        return {name: _change(inner, change) for name, inner in feature.items()}
    return change(feature)


def _undecoded(feature: Any) -> Any:
    return Image(decode=False) if isinstance(feature, Image) else feature


def _undated(feature: Any) -> Any:
    return Value("string") if isinstance(feature, Value) and feature.dtype.startswith("timestamp") else feature


def image_sources(cell: Any, image_dir: str | None = None) -> list[ImageSource]:
    """Images of a cell, one or a list of what `find_image` reads, in order; none for an empty cell.

    Errors: ValueError for a path that leads to no file; relative paths start at `image_dir`.
    """
    entries = cell if isinstance(cell, list) else [cell]
    try:
        found = [find_image(entry, Path(image_dir or "")) for entry in entries]
    except ValueError as error:
        raise ValueError(f"{error}; relative paths start at data.image_dir={image_dir}") from None
    return [source for source in found if source is not None]


def fit_to_bounds(size: tuple[int, int], min_pixels: int | None, max_pixels: int | None) -> tuple[int, int]:
    """Width and height scaled down to max_pixels, then up to min_pixels, cut to whole pixels each time, as in EasyR1.

    The image processor rounds them to whole patches afterwards, not always to what it would make of the original.
    """
    width, height = size
    if max_pixels and width * height > max_pixels:
        factor = math.sqrt(max_pixels / (width * height))
        width, height = max(1, int(width * factor)), max(1, int(height * factor))
    if min_pixels and width * height < min_pixels:
        factor = math.sqrt(min_pixels / (width * height))
        width, height = max(1, int(width * factor)), max(1, int(height * factor))
    return width, height


def resize_encoded(data: bytes, size: tuple[int, int]) -> bytes:
    """The encoded image at this width and height, without further loss."""
    image = load_image(data)
    return data if image.size == size else encode(image.resize(size), "PNG", compress_level=1)

"""Loading of data sets by locator, and of encoded images from image columns."""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from glob import escape
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, Json, LargeList, List, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from pandas import read_csv

from spatialthinker.storage.images import ImageSource, encode, find_image, load_image
from verl.config.checks import split_path

FILE_BUILDERS = {"jsonl": "json", "json": "json", "parquet": "parquet", "csv": "csv", "arrow": "arrow"}
SAVED_MARKS = ("dataset_info.json", "dataset_dict.json")
MAX_EXACT_FLOAT = 2**53
"""Whole numbers up to it are exact as floats."""
_LONG_NUMBER = re.compile(rb"[\[:,\s]-?[0-9]{16,}[\s,\]}]")


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
        raise DataError(f"data set {locator!r} cannot be loaded: {_root(error)}") from error
    for name, feature in rows.features.items():
        if (encoded := _change(feature, _undecoded)) != feature:
            rows = rows.cast_column(name, encoded)
    return rows


def _root(error: BaseException) -> BaseException:
    """The error that began a chain: `datasets` wraps it in one that says nothing."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _load(path: str, split: str) -> Dataset:
    place = Path(path)
    if place.is_file():
        builder = FILE_BUILDERS.get(place.suffix.lstrip("."))
        if builder is None:
            raise DataError(f"{path}: a data file ends in one of {', '.join(FILE_BUILDERS)}")
        if split != "train":
            raise DataError(f"{path}@{split}: a single file has no splits but train; drop @{split}")
        _check_file(place)
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
        _check_file(file)
    return _load_files(builders.pop(), files)


def _check_file(file: Path) -> None:
    """Passes for data files that hold something, text in UTF-8; otherwise DataError names file and first bad line."""
    if not file.stat().st_size:
        raise DataError(f"{file} is empty; give another file, or remove it from its folder")
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
        text = Features({column: Value("string") for file in files[:1] for column in _read_columns(file)})
        return load_dataset(
            builder, data_files=names, split="train", features=text, keep_default_na=False, na_values=[""]
        )
    try:
        rows = load_dataset(builder, data_files=names, split="train")
    except DatasetsError:
        if builder == "json":
            list(_read_json(files))  # names the line
        raise
    if builder == "json":
        features = Features(_change(dict(rows.features), _undated))
        if features != rows.features or _has(features, _is_mixed):
            return Dataset.from_list([_as_written(row, features) for row in _read_json(files)], features=features)
        if _has(features, _is_float) and any(_LONG_NUMBER.search(line) for file in files for line in file.open("rb")):
            for row in _read_json(files):
                _as_written(row, features)
    return rows


def _read_columns(file: Path) -> list[str]:
    """Names in the first line of a CSV; DataError for one that is there twice: only its first column would be read."""
    names = read_csv(file, header=None, nrows=1, dtype=str, keep_default_na=False).iloc[0]
    if twice := sorted(set(names[names.duplicated() & (names != "")])):
        raise DataError(f"{file} has two columns {twice[0]!r}; rename or remove one")
    return [str(column) for column in read_csv(file, nrows=0).columns]


def _read_json(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Rows of JSON lists, and of files with one JSON object per line; DataError names the first bad line."""
    for file in files:
        text = file.read_text(encoding="utf-8-sig")
        try:
            content = json.loads(text)
            yield from content if isinstance(content, list) else [content]
        except json.JSONDecodeError as error:
            if text.lstrip().startswith("["):
                raise DataError(f"{file}, line {error.lineno}: no JSON ({error.msg})") from error
            yield from _read_lines(file, text)


def _read_lines(file: Path, text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(re.split("\r\n?|\n", text), 1):
        try:
            if line.strip():
                yield json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{file}, line {number}: no JSON ({error.msg}, column {error.colno})") from error


def _as_written(value: Any, feature: Any) -> Any:
    """The value of a JSON file such that its column returns it: text stays text where other rows hold numbers.

    Errors: ValueError for a whole number that its column, one of floats, would change.
    """
    if isinstance(feature, Json):
        return json.dumps(value)
    if isinstance(feature, List | LargeList) and isinstance(value, list):
        return [_as_written(item, feature.feature) for item in value]
    if isinstance(feature, dict) and isinstance(value, dict):
        return {name: _as_written(value.get(name), inner) for name, inner in feature.items()}
    if _is_float(feature) and isinstance(value, int) and abs(value) > MAX_EXACT_FLOAT:
        raise ValueError(f"the number {value} would be rounded to {float(value)!r}; write it as text")
    return value


def _is_mixed(feature: Any) -> bool:
    return isinstance(feature, Json)


def _is_float(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype.startswith("float")


def _has(feature: Any, holds: Callable[[Any], bool]) -> bool:
    """True if that holds for a feature inside this one."""
    if isinstance(feature, List | LargeList):
        return _has(feature.feature, holds)
    return any(_has(inner, holds) for inner in feature.values()) if isinstance(feature, dict) else holds(feature)


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

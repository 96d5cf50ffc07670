"""Loading of data sets by locator, and of encoded images from image columns."""

import io
import re
from pathlib import Path
from typing import Any

from datasets import Dataset, Image, LargeList, List, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from PIL import Image as Pillow

from verl.config.checks import split_path

FILE_BUILDERS = {"jsonl": "json", "json": "json", "parquet": "parquet", "csv": "csv", "arrow": "arrow"}
SAVED_MARKS = ("dataset_info.json", "dataset_dict.json")

ImageSource = bytes | Path


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
        if _undecoded(feature) != feature:
            rows = rows.cast_column(name, _undecoded(feature))
    return rows


def _load(path: str, split: str) -> Dataset:
    place = Path(path)
    if place.is_file():
        builder = FILE_BUILDERS.get(place.suffix.lstrip("."))
        if builder is None:
            raise DataError(f"{path}: a data file ends in one of {', '.join(FILE_BUILDERS)}")
        if split != "train":
            raise DataError(f"{path}@{split}: a single file has no splits but train; drop @{split}")
        return load_dataset(builder, data_files=path, split=split)
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
    return load_dataset(builders.pop(), data_files=[str(file) for file in files], split="train")


def _data_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*") if file.is_file() and file.suffix[1:] in FILE_BUILDERS)


def _undecoded(feature: Any) -> Any:
    if isinstance(feature, Image):
        return Image(decode=False)
    if isinstance(feature, List | LargeList):
        return type(feature)(_undecoded(feature.feature))
    return feature


def image_sources(cell: Any, image_dir: str | None = None) -> list[ImageSource]:
    """Images of a cell in order, each as encoded bytes or as a file path.

    Args:
        cell: one image, a list of them, or none: bytes, a path, {"bytes", "path"} as `datasets` stores it, or a
            Pillow image, which is encoded as PNG.
        image_dir: base of relative paths.

    Raises:
        ValueError: another type, or a missing file.
    """
    if cell is None or isinstance(cell, str) and not cell:
        return []
    return [_source(entry, image_dir) for entry in (cell if isinstance(cell, list) else [cell])]


def _source(entry: Any, image_dir: str | None) -> ImageSource:
    if isinstance(entry, dict):
        entry = entry["bytes"] if entry.get("bytes") is not None else entry.get("path")
    if isinstance(entry, bytes):
        return entry
    if isinstance(entry, Pillow.Image):
        file = io.BytesIO()
        entry.save(file, format="PNG")
        return file.getvalue()
    if not isinstance(entry, str):
        raise ValueError(f"an image must be encoded bytes, a path or a picture, got {type(entry).__name__}")
    path = Path(image_dir or "", entry)
    if not path.is_file():
        raise ValueError(f"there is no image file {path}; relative paths start at data.image_dir={image_dir}")
    return path

"""Pictures: listed from a folder or a source of rows, decoded, freed of traces of their files, compared."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from data_gen.scenes.scene import SceneFault, image_bytes, read_image_id, read_scene
from data_gen.scenes.sources import Source, open_source
from data_gen.selfsup.depth_images import read_depth
from data_gen.selfsup.puzzle import MIN_CONTRAST, Thing, View
from spatialthinker.storage.images import BrokenImage, ImageSource, load_image, open_image, upright

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
MIN_SIDE_PX = 160
"""Shorter side of the smallest picture that is used."""
WORK_PX = 416
"""Longest side of a picture at its working size, at most."""
SHRINK = 0.85
"""Every picture shrinks at least so much: the 8 x 8 blocks of its file would show how its parts were moved."""
MARGIN = 0.03
"""Share of each side that is cut away at most: frames and edges of scans tell where a border was."""
SKETCH_SIDE = 16
NEAR = 0.975
"""Pictures whose sketches correlate at least so much are near-duplicates."""


@dataclass(frozen=True)
class Picture:
    """A picture of the collection, undecoded."""

    id: str
    index: int
    source: ImageSource | None
    """None where `fault` says why."""
    things: tuple[Thing, ...] = ()
    depth: ImageSource | None = None
    fault: str = ""


def list_pictures(
    locator: str, things: Mapping[str, tuple[Thing, ...]], depth_folder: Path | None
) -> Iterable[Picture]:
    """The pictures of a folder in the order of their names, or of a source's rows.

    Raises ValueError for a folder without pictures or a source that cannot be read.
    """
    folder = Path(locator)
    if folder.is_dir() and (paths := [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in SUFFIXES]):
        if depth_folder is not None:
            paths = [path for path in paths if not path.is_relative_to(depth_folder)]
        return _of_folder(folder, paths, things, _depth_files(depth_folder))
    if folder.is_dir() and not any(folder.rglob("*.parquet")) and not any(folder.glob("dataset*.json")):
        raise ValueError(
            f"--source {locator}: the folder holds no picture ({', '.join(SUFFIXES)}) and no parquet file"
        )
    return _Rows(open_source(locator).check(needs_graph=False))


def _depth_files(folder: Path | None) -> dict[str, Path]:
    if folder is None:
        return {}
    if not folder.is_dir():
        raise ValueError(f"--depth {folder}: no such folder; name one with a depth image for each picture")
    return {str(path.relative_to(folder).with_suffix("")): path for path in sorted(folder.rglob("*")) if path.suffix}


def _of_folder(
    folder: Path, paths: list[Path], things: Mapping[str, tuple[Thing, ...]], depths: Mapping[str, Path]
) -> list[Picture]:
    pictures = []
    for path in paths:
        name = path.relative_to(folder).as_posix()
        found = things.get(name) or things.get(path.name) or things.get(path.stem) or ()
        depth = depths.get(str(path.relative_to(folder).with_suffix("")))
        pictures.append(Picture(name, len(pictures), path, found, depth))
    known = {text for picture in pictures for text in (picture.id, Path(picture.id).name, Path(picture.id).stem)}
    for name in sorted(things.keys() - known):
        fault = "the annotations name it, but the folder has no such picture"
        pictures.append(Picture(name, len(pictures), None, fault=fault))
    return pictures


class _Rows:
    """The rows of a source as pictures; each pass reads them anew."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __iter__(self) -> Iterator[Picture]:
        seen: set[str] = set()
        for index, row in enumerate(self.source.rows()):
            picture = self._read(row, index)
            if picture.id in seen:
                picture = replace(
                    picture, id=f"{picture.id}, row {index}", source=None, fault="an earlier row has its id"
                )
            seen.add(picture.id)
            yield picture

    def _read(self, row: dict[str, Any], index: int) -> Picture:
        image_id = f"row-{index}"
        try:
            image_id = read_image_id(row, index)
            image, things = image_bytes(row, self.source.root), ()
            if row.get("objects"):
                scene = read_scene({"relationships": [], **row}, index, self.source.root)
                things = tuple(Thing(item.label.replace("_", " "), item.bbox) for item in scene.objects)
            depth = image_bytes({"image": row["depth"]}, self.source.root) if row.get("depth") else None
        except SceneFault as fault:
            return Picture(image_id, index, None, fault=str(fault))
        return Picture(image_id, index, image, things, depth)


class UnfitPicture(ValueError):
    """A picture that no rows are made of; the message is the reason."""


@dataclass(frozen=True)
class Fingerprint:
    """Finding of a first look at a picture: a sketch, or the reason why it is unfit."""

    sketch: bytes = b""
    fault: str = ""


def look(picture: Picture) -> Fingerprint:
    """The fingerprint of a picture, from a decoding at an eighth of its size where the format allows it."""
    if picture.source is None:
        return Fingerprint(fault=picture.fault)
    try:
        with open_image(picture.source) as image:
            width, height = image.size
            image.draft("L", (width // 8, height // 8))
            grey = upright(image).convert("L")
    except BrokenImage as error:
        return Fingerprint(fault=f"its image cannot be decoded: {error}")
    if min(width, height) < MIN_SIDE_PX:
        return Fingerprint(fault=f"too small: {width} x {height} pixels; the shorter side needs {MIN_SIDE_PX}")
    if np.asarray(grey, np.float32).std() < MIN_CONTRAST:
        return Fingerprint(fault="empty: hardly any contrast")
    return Fingerprint(sketch(grey))


def sketch(grey: Image.Image) -> bytes:
    """The grey values at 16 x 16 pixels, as float32 of mean 0 and length 1."""
    values = np.asarray(grey.resize((SKETCH_SIDE, SKETCH_SIDE), Image.Resampling.BICUBIC), np.float32).ravel()
    values = values - values.mean()
    return (values / max(float(np.linalg.norm(values)), 1e-6)).astype(np.float32).tobytes()


class Seen:
    """Sketches of the pictures so far: a kilobyte each."""

    def __init__(self, capacity: int = 1024) -> None:
        self._sketches = np.zeros((capacity, SKETCH_SIDE**2), np.float32)
        self._ids: list[str] = []

    def twin(self, picture_id: str, sketched: bytes) -> str | None:
        """The earlier picture of which this one is a near-duplicate; where there is none, it is remembered."""
        values = np.frombuffer(sketched, np.float32)
        number = len(self._ids)
        likeness = self._sketches[:number] @ values
        if number and likeness.max() >= NEAR:
            return self._ids[int(likeness.argmax())]
        if number == len(self._sketches):
            self._sketches = np.concatenate([self._sketches, np.zeros_like(self._sketches)])
        self._sketches[number] = values
        self._ids.append(picture_id)
        return None


def load_view(picture: Picture, rng: Random, depth_scale: float | None) -> View:
    """The picture at its working size, without its margin. Raises UnfitPicture where it or its depth is unfit.

    The cut and the size are drawn anew for each picture, so that no grid of its file survives at a known place.
    """
    assert picture.source is not None
    try:
        image = load_image(picture.source)
    except BrokenImage as error:
        raise UnfitPicture(f"its image cannot be decoded: {error}") from None
    try:
        depth = None if picture.depth is None else read_depth(picture.depth, image.size, depth_scale)
    except ValueError as error:
        raise UnfitPicture(str(error)) from None
    left, right = (round(image.width * rng.uniform(0, MARGIN)) + 1 for _ in range(2))
    top, bottom = (round(image.height * rng.uniform(0, MARGIN)) + 1 for _ in range(2))
    box = (left, top, image.width - right, image.height - bottom)
    longest = max(box[2] - box[0], box[3] - box[1])
    scale = min(WORK_PX / longest, SHRINK) * rng.uniform(0.92, 1.0)
    size = (round((box[2] - box[0]) * scale), round((box[3] - box[1]) * scale))
    small = image.resize(size, Image.Resampling.BICUBIC, box)
    if depth is not None:
        rows = (top + (np.arange(size[1]) + 0.5) * (box[3] - box[1]) / size[1]).astype(int)
        columns = (left + (np.arange(size[0]) + 0.5) * (box[2] - box[0]) / size[0]).astype(int)
        depth = depth[np.ix_(rows, columns)]
    return View(small, _move(picture.things, box, size), depth, depth_scale != 0)


def _move(things: tuple[Thing, ...], box: tuple[int, int, int, int], size: tuple[int, int]) -> tuple[Thing, ...]:
    """The objects in pixels of the working size; those of a name that the cut of the margin halves are left out."""
    x_scale, y_scale = size[0] / (box[2] - box[0]), size[1] / (box[3] - box[1])
    moved, halved = [], set()
    for thing in things:
        x1, x2 = ((x - box[0]) * x_scale for x in thing.box[0::2])
        y1, y2 = ((y - box[1]) * y_scale for y in thing.box[1::2])
        inside = (max(x1, 0.0), max(y1, 0.0), min(x2, float(size[0])), min(y2, float(size[1])))
        area = max(inside[2] - inside[0], 0) * max(inside[3] - inside[1], 0)
        if 2 * area < (x2 - x1) * (y2 - y1) or inside[2] - inside[0] < 1 or inside[3] - inside[1] < 1:
            halved.add(thing.name)
        moved.append(Thing(thing.name, inside))
    return tuple(thing for thing in moved if thing.name not in halved)

"""The images of a run: found by content, scaled for the page, and kept in memory as far as there is room."""

import hashlib
import json
import re
from collections import OrderedDict
from pathlib import Path
from threading import Lock, Semaphore
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from spatialthinker.storage.images import (
    encode,
    open_image,
    orientation,
    read_file,
    upright,
    upright_size,
)
from spatialthinker.visualize import BROWSER_FORMATS

IMAGE_ID = re.compile(r"[0-9a-f]{64}")
SIDES_PX = (320, 640, 1280)
"""Longest sides in which an image is served."""
MAX_HELD_BYTES = 2**26
MAX_STORED_BYTES = 2**27
"""Images of a data set that a run of an older form shows; the rest is left out."""
LOSSLESS_SIDE_PX = 256
WEBP_QUALITY = 82
_DECODING = Semaphore(2)  # an image of 80 megapixels takes 240 MB


class Pictures:
    """Images of one run by the SHA-256 of their files.

    Those of a recorded run lie in rollouts/images. A run of an older form names its validation data in
    experiment_config.json, and its images are found by problem and ground truth.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.problems: list[str] = []
        self._scaled: OrderedDict[tuple[str, int], tuple[bytes, str]] = OrderedDict()
        self._num_bytes = 0
        self._lock = Lock()
        self._by_text: dict[tuple[str, str], str] | None = None
        self._stored: dict[str, bytes] = {}
        self._num_stored_bytes = 0

    def read(self, image_id: str) -> bytes:
        """Return an image as it is stored. Errors: KeyError for an unknown one, ValueError where it cannot be read."""
        if not IMAGE_ID.fullmatch(image_id):
            raise KeyError(f"{image_id[:80]!r} is no id of an image")
        if image_id in self._stored:
            return self._stored[image_id]
        path = self.folder / "rollouts" / "images" / image_id[:2] / image_id
        if not path.is_file():
            raise KeyError(f"the run has no image {image_id}")
        return read_file(path)

    def size(self, image_id: str) -> tuple[int, int] | None:
        """Return width and height of the upright image, None where it cannot be read."""
        try:
            with open_image(self.read(image_id)) as image:
                return upright_size(image)
        except (KeyError, ValueError):
            return None

    def scaled(self, image_id: str, side_px: int) -> tuple[bytes, str]:
        """Return an image whose longer side is at most `side_px`, and its media type.

        Errors: KeyError for an unknown image, BrokenImage for one that cannot be decoded.
        """
        key = (image_id, side_px)
        with self._lock:
            if key in self._scaled:
                self._scaled.move_to_end(key)
                return self._scaled[key]
        with _DECODING:
            found = scale(self.read(image_id), side_px)
        with self._lock:
            if key not in self._scaled:
                self._scaled[key] = found
                self._num_bytes += len(found[0])
            while self._num_bytes > MAX_HELD_BYTES:
                self._num_bytes -= len(self._scaled.popitem(last=False)[1][0])
        return found

    def find(self, problem: str, ground_truth: str) -> str | None:
        """Return the id of the validation image that belongs to these texts."""
        with self._lock:
            if self._by_text is None:
                self._by_text = self._read_data()
        return self._by_text.get((problem, ground_truth))

    def _read_data(self) -> dict[tuple[str, str], str]:
        try:
            config = json.loads((self.folder / "experiment_config.json").read_text(encoding="utf-8"))
            data: dict[str, Any] = config["data"]
            location, _, split = str(data["val_files"]).partition("@")
        except (OSError, ValueError, KeyError, TypeError):
            self.problems.append("experiment_config.json names no validation data: their images are not shown")
            return {}
        place = Path(location)
        files = sorted(place.glob(f"{split or 'train'}-*.parquet")) if place.is_dir() else [place]
        keys = [
            str(data.get(f"{name}_key", default))
            for name, default in (("prompt", "problem"), ("answer", "answer_option_text"), ("image", "images"))
        ]
        found: dict[tuple[str, str], str] = {}
        try:
            for file in files:
                self._add_rows(found, file, keys)
        except (OSError, ValueError, pa.ArrowException):
            self.problems.append(f"the validation data {location} cannot be read: their images are not shown")
        return found

    def _add_rows(self, found: dict[tuple[str, str], str], file: Path, keys: list[str]) -> None:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(batch_size=64, columns=keys):
                for problem, truth, image in zip(*(batch.column(key).to_pylist() for key in keys), strict=True):
                    image = image[0] if isinstance(image, list) and image else image
                    data = image.get("bytes") if isinstance(image, dict) else image
                    if not isinstance(data, bytes):
                        continue
                    name = hashlib.sha256(data).hexdigest()
                    self._num_stored_bytes += len(data) if name not in self._stored else 0
                    if self._num_stored_bytes > MAX_STORED_BYTES:
                        return
                    found[str(problem), str(truth)] = name
                    self._stored[name] = data


def scale(data: bytes, side_px: int) -> tuple[bytes, str]:
    """Return an image file whose longer side is at most `side_px`, upright, and its media type.

    One that is small enough and that browsers show goes as it is. Errors: BrokenImage.
    """
    with open_image(data) as image:
        kind = image.format or ""
        if max(image.size) <= side_px and kind in BROWSER_FORMATS and orientation(image) == 1:
            return data, f"image/{kind.lower()}"
        if kind == "JPEG":
            image.draft("RGB", (side_px, side_px))  # decodes at a fraction of its size, at least this large
        picture = upright(image)
    picture.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    is_lossless = max(picture.size) <= LOSSLESS_SIDE_PX
    return encode(picture, "WEBP", quality=WEBP_QUALITY, lossless=is_lossless), "image/webp"

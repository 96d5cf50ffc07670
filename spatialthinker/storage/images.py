"""Encoded image files: opened, turned upright, encoded."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image, ImageOps

_ORIENTATION_TAG, _SIDEWAYS = 0x0112, range(5, 9)


class BrokenImage(ValueError):
    """A file that cannot be decoded as an image."""


@contextmanager
def open_image(data: bytes) -> Iterator[Image.Image]:
    """The image of a file, as yet undecoded. Whatever fails on opening it or inside the block raises BrokenImage."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BrokenImage(str(error)) from error


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 for upright."""
    return image.getexif().get(_ORIENTATION_TAG, 1)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of the upright image, read from its header alone."""
    width, height = image.size
    return (height, width) if orientation(image) in _SIDEWAYS else (width, height)


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says, in RGB."""
    return ImageOps.exif_transpose(image).convert("RGB")


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The image as a file of that kind, such as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()

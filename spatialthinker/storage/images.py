"""Image files, for training, evaluation, clients, loggers and pages: found, measured, decoded to RGB, encoded."""

import base64
import binascii
import contextlib
import io
import os
import stat
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 89_478_485
"""Pixels of the largest image that is decoded, the size at which Pillow warns: 256 MiB as RGB."""
MAX_FILE_BYTES = 2**29
"""Bytes of the largest image file that is read."""

WIDE_MODES = ("I", "I;16", "I;16L", "I;16B", "F")
"""Modes whose values RGB cannot hold."""

ImageSource = bytes | Path
"""An encoded image, or the file that holds it."""

_ORIENTATION_TAG, _SIDEWAYS = 0x0112, range(5, 9)
_TURNS = dict(enumerate(("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270"), 2))
_TURNS |= {7: "TRANSVERSE", 8: "ROTATE_90"}
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
_TRANSPARENT_MODES = ("RGBA", "LA", "PA")
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xae\x42\x60\x82"}
"""The last bytes of whole files."""
_SHORTEST_BASE64 = 64  # the smallest PNG has 67 bytes
_SHOWN_CHARACTERS = 60
_PNG_TEXTS = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")


class BrokenImage(ValueError):
    """A file that cannot be decoded as an image."""


def find_image(value: Any, folder: Path) -> ImageSource | None:
    """The image that a cell of a data set holds, or None: encoded bytes, base64 (a data URL too), or a path.

    Args:
        value: also a Pillow image, or {"bytes", "path"} as `datasets` stores it.
        folder: base of relative paths.

    Raises:
        ValueError: another type, or no file that can be read.
    """
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, Image.Image):
        return _encode_picture(value)
    if value is None or value == "" or isinstance(value, bytes):
        return value or None
    if not isinstance(value, str):
        raise ValueError(f"an image must be encoded bytes, base64, a path or a picture, got {type(value).__name__}")
    if (decoded := _decode_base64(value)) is not None:
        return decoded
    path = folder / value
    try:
        kind = path.stat().st_mode
    except (OSError, ValueError):  # too long a name, a NUL in it
        raise ValueError(f"there is no image file {_shown(str(path))}") from None
    if not stat.S_ISREG(kind):
        raise ValueError(f"{_shown(str(path))} is no regular file, and an image is read from nothing else")
    return path


def read_file(source: ImageSource) -> bytes:
    """The encoded image of a source. Errors: ValueError for a file that cannot be read or is larger than the limit."""
    if isinstance(source, bytes):
        return source
    try:
        with _open_file(source) as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ValueError(f"the image file {source} cannot be read: {error.strerror or error}") from None
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"the image file {source} is larger than {MAX_FILE_BYTES} bytes; make it smaller")
    return data


@contextmanager
def open_image(source: ImageSource) -> Iterator[Image.Image]:
    """The image of a file, as yet undecoded. Whatever fails on opening it or inside the block raises BrokenImage."""
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else _open_file(source) as file:
            with Image.open(file) as image:
                if image.format == "EPS":
                    raise BrokenImage("it is PostScript, a program, which would be run to draw it; store a PNG")
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise BrokenImage(f"its {width} x {height} pixels are more than {MAX_PIXELS}; make it smaller")
                yield image
    except (BrokenImage, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BrokenImage(f"it has more than {MAX_PIXELS} pixels; make it smaller") from None
    except UnidentifiedImageError:  # whose text holds an address in memory
        raise BrokenImage("cannot identify image file: it is of no known format, or its header is broken") from None
    except Exception as error:  # decoders raise what they meet, such as struct.error, EOFError or IndexError
        raise BrokenImage(f"{error or type(error).__name__}") from error


def read_header(source: ImageSource) -> tuple[tuple[int, int], str]:
    """Width and height of the upright image, and its mode, from its header alone.

    A file without its end is decoded, since most of them are cut off. Errors: BrokenImage.
    """
    with open_image(source) as image:
        size, mode = upright_size(image), image.mode
        if not _has_end(image):
            image.load()
        return size, mode


def check_image(source: ImageSource) -> tuple[int, int]:
    """Width and height of the upright image, which is decoded to its end. Errors: BrokenImage."""
    with open_image(source) as image:
        size = upright_size(image)
        if image.format == "JPEG":
            image.draft("L", (image.width // 8, image.height // 8))  # reads it to its end at an eighth of the work
            image.load()
        else:
            upright(image)
        return size


def load_image(source: ImageSource) -> Image.Image:
    """The picture of a file as a model sees it: upright and in RGB. Errors: BrokenImage."""
    with open_image(source) as image:
        return upright(image)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 for upright and for what cannot be read, without decoding the image."""
    if image.format == "TIFF":  # turned by its decoder
        return 1
    with contextlib.suppress(Exception):
        # PngImageFile.getexif decodes the whole image to find texts that follow it.
        read = image.getexif if _has_late_texts(image) else lambda: Image.Image.getexif(image)
        return read().get(_ORIENTATION_TAG, 1)
    return 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of the upright image, read from its header alone."""
    width, height = image.size
    return (height, width) if orientation(image) in _SIDEWAYS else (width, height)


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says, in RGB, on white where it is transparent.

    Equal to vLLM's loading (vllm/multimodal/image.py) in every mode: 16-bit and float values are cut at 0 and 255.
    """
    turn = orientation(image)  # before decoding, as upright_size reads it
    image.load()
    if turn in _TURNS:
        image = image.transpose(Image.Transpose[_TURNS[turn]])
    if has_transparency(image):
        picture = image.convert("RGBA")
        white = Image.new("RGB", picture.size, "white")
        white.paste(picture, mask=picture.getchannel("A"))
        return white
    if image.mode in WIDE_MODES:
        low, high = image.getextrema()
        if low < 0 or high > 255 or image.mode == "F" and high <= 1:  # type: ignore[operator]  # one channel
            warnings.warn(
                f"a picture of mode {image.mode} has values from {low} to {high}, and those beyond 0 to 255 are cut, "
                "as vLLM does; store it with 8 bits per channel",
                stacklevel=2,
            )
    return image.convert("RGB")


def has_transparency(image: Image.Image) -> bool:
    """True for an alpha channel, and for a grey value or palette entry that is transparent; not for one RGB colour."""
    return image.mode in _TRANSPARENT_MODES or image.mode != "RGB" and "transparency" in image.info


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The image as a file of that kind, such as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _encode_picture(image: Image.Image) -> bytes:
    """The picture as a PNG, upright, and in RGB if PNG lacks its mode. Errors: BrokenImage."""
    try:
        is_kept = image.mode in _PNG_MODES and orientation(image) == 1
        return encode(image if is_kept else upright(image), "PNG")
    except (OSError, ValueError) as error:  # of a file that Pillow has opened and not yet decoded
        raise BrokenImage(f"a picture of mode {image.mode} cannot be stored: {error}") from error


def _open_file(path: Path) -> BinaryIO:
    """The file opened for reading; a pipe or device, which may have no end, raises OSError."""
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")  # a pipe without a writer would wait
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(f"{path} is no regular file")
    return file


def _has_end(image: Image.Image) -> bool:
    """False for a file whose last bytes are not those of its format."""
    end, file = _ENDS.get(image.format or ""), image.fp  # type: ignore[attr-defined]  # of an ImageFile
    if end is None or file is None:  # decoded already
        return True
    place = file.tell()
    file.seek(max(0, file.seek(0, os.SEEK_END) - len(end)))
    is_there = file.read() == end
    file.seek(place)
    return is_there


def _has_late_texts(image: Image.Image) -> bool:
    """True for a PNG with texts behind its pixels, where an orientation may stand."""
    if image.format != "PNG" or "exif" in image.info:
        return False
    file, is_behind, found = image.fp, False, False  # type: ignore[attr-defined]  # of an ImageFile
    if file is None:  # decoded, with all texts
        return False
    place = file.tell()
    file.seek(8)
    while not found and len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        is_behind = is_behind or kind == b"IDAT"
        found = is_behind and kind in _PNG_TEXTS
        file.seek(length + 4, os.SEEK_CUR)
    file.seek(place)
    return found


def _decode_base64(text: str) -> bytes | None:
    """The bytes of a text that is an image in base64 and no path, or None."""
    head, mark, tail = text.partition(";base64,")
    text = "".join((tail if mark and head.startswith("data:") else text).split())
    if len(text) < _SHORTEST_BASE64:
        return None
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None


def _shown(text: str) -> str:
    return text if len(text) <= 4 * _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}... ({len(text)} characters)"

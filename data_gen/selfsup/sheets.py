"""Sheets: pictures laid side by side and marked, so that the marks tell nothing about the answer.

Every region is cut off from its surroundings by a gap of one width and colour whether it was changed or not: without
it the seams of a changed region would cost bytes, and the size of the file would give the answer away.
"""

from collections.abc import Sequence
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from data_gen.selfsup.puzzle import PixelBox
from spatialthinker.storage.images import encode

GAP_PX = 6
GAP = (128, 128, 128)
MARK = (214, 30, 30)
JPEG_QUALITY = 88
"""One quality for all sheets, whatever the file they were made from."""
_FONT_PX = 15
_DOT_PX = 10


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(_FONT_PX)


def encode_sheet(sheet: Image.Image) -> bytes:
    """The sheet as a JPEG file."""
    return encode(sheet, "JPEG", quality=JPEG_QUALITY, subsampling=2)


def beside(pictures: Sequence[Image.Image]) -> tuple[Image.Image, list[tuple[int, int]]]:
    """The pictures from left to right with gaps, and the top left pixel of each."""
    width = sum(picture.width for picture in pictures) + 2 * GAP_PX * (len(pictures) - 1)
    sheet = Image.new("RGB", (width, max(picture.height for picture in pictures)), GAP)
    corners, x = [], 0
    for picture in pictures:
        sheet.paste(picture, (x, 0))
        corners.append((x, 0))
        x += picture.width + 2 * GAP_PX
    return sheet, corners


def frame(sheet: Image.Image, box: PixelBox) -> None:
    """Cut a region off from its surroundings by a gap that lies outside of it."""
    x1, y1, x2, y2 = box
    pen = ImageDraw.Draw(sheet)
    for step in range(1, GAP_PX + 1):
        pen.rectangle((x1 - step, y1 - step, x2 - 1 + step, y2 - 1 + step), outline=GAP)


def tag(sheet: Image.Image, place: tuple[int, int], text: str) -> None:
    """Write a short text in a white box whose top left corner is at a place."""
    x, y = place
    pen = ImageDraw.Draw(sheet)
    pen.rectangle((x, y, x + 5 + 9 * len(text), y + _FONT_PX + 2), fill=(255, 255, 255), outline=(0, 0, 0))
    pen.text((x + 4, y + 1), text, fill=(0, 0, 0), font=_font())


def dot(sheet: Image.Image, place: tuple[float, float], text: str = "") -> None:
    """Mark a point by a red disc with a text on it; without a text by a ring with a dot."""
    x, y = map(round, place)
    pen = ImageDraw.Draw(sheet)
    if text:
        pen.ellipse((x - _DOT_PX, y - _DOT_PX, x + _DOT_PX, y + _DOT_PX), fill=MARK, outline=(255, 255, 255), width=2)
        pen.text((x, y), text, fill=(255, 255, 255), font=_font(), anchor="mm")
    else:
        pen.ellipse((x - _DOT_PX, y - _DOT_PX, x + _DOT_PX, y + _DOT_PX), outline=(255, 255, 255), width=4)
        pen.ellipse((x - _DOT_PX + 1, y - _DOT_PX + 1, x + _DOT_PX - 1, y + _DOT_PX - 1), outline=MARK, width=2)
        pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=MARK, outline=(255, 255, 255))

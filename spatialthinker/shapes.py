"""Flat coloured shapes on a canvas: what a synthetic scene is made of, and how it is drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw

from spatialthinker.storage.images import encode

COLOURS = {
    "red": (214, 40, 40),
    "green": (44, 150, 60),
    "blue": (40, 80, 210),
    "yellow": (245, 205, 30),
    "purple": (145, 60, 180),
    "black": (35, 35, 35),
}
KINDS = ("circle", "square", "triangle", "diamond", "arrow")
FACINGS = ("up", "right", "down", "left")

# Corners in a unit square, y down. The arrow is drawn facing up and turned.
_TRIANGLE = ((0.5, 0), (1, 1), (0, 1))
_DIAMOND = ((0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5))
_ARROW = ((0.5, 0), (1, 0.55), (0.68, 0.55), (0.68, 1), (0.32, 1), (0.32, 0.55), (0, 0.55))
_TURNS = {
    "up": lambda x, y: (x, y),
    "right": lambda x, y: (1 - y, x),
    "down": lambda x, y: (1 - x, 1 - y),
    "left": lambda x, y: (y, 1 - x),
}


@dataclass(frozen=True)
class Shape:
    """One shape; (x, y) is the top left pixel of its full extent, hidden parts included."""

    kind: str
    colour: str
    x: int
    y: int
    size: int
    facing: str = ""
    """Direction of an arrow; empty for other kinds."""

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"

    @property
    def box(self) -> tuple[int, int, int, int]:
        """[x1, y1, x2, y2) in pixels: tight around what is drawn, the right and lower edges exclusive."""
        return self.x, self.y, self.x + self.size, self.y + self.size

    @property
    def centre(self) -> tuple[float, float]:
        return self.x + self.size / 2, self.y + self.size / 2


@dataclass(frozen=True)
class Canvas:
    """An image size and its coarse grid: the shorter side holds four cells."""

    width: int = 112
    height: int = 112

    def __post_init__(self) -> None:
        if min(self.width, self.height) < 56:
            raise ValueError(f"an image of {self.width} x {self.height} px is too small to draw in; use 56 px or more")

    @property
    def cell(self) -> int:
        return min(self.width, self.height) // 4

    @property
    def columns(self) -> int:
        return self.width // self.cell

    @property
    def rows(self) -> int:
        return self.height // self.cell

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Small, medium and large; neighbours differ by a quarter or more, and the largest fills a cell."""
        return 4 * self.cell // 7, 11 * self.cell // 14, self.cell


DEFAULT_CANVAS = Canvas()


def gap_px(a: Shape, b: Shape) -> int:
    """The distance between two shapes' boxes along the axis that separates them most; negative when they overlap."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a.box, b.box
    return max(bx1 - ax2, ax1 - bx2, by1 - ay2, ay1 - by2)


@cache
def _background(canvas: Canvas) -> Image.Image:
    # A soft ramp in each direction makes the place of every patch visible; a vision tower with purely relative
    # positions cannot tell the patches of a uniform background apart.
    def ramp(size: tuple[int, int]) -> Image.Image:
        return Image.linear_gradient("L").resize(size).point([170 + i // 3 for i in range(256)])

    rightward = ramp((canvas.height, canvas.width)).transpose(Image.Transpose.TRANSPOSE)
    downward = ramp((canvas.width, canvas.height))
    level = Image.new("L", (canvas.width, canvas.height), 235)
    return Image.merge("RGB", (rightward, level, downward))


def _draw_shape(pen: ImageDraw.ImageDraw, shape: Shape) -> None:
    fill = COLOURS[shape.colour]
    outline = tuple(value // 2 for value in fill)
    reach = shape.size - 1
    extent = (shape.x, shape.y, shape.x + reach, shape.y + reach)
    if shape.kind == "circle":
        pen.ellipse(extent, fill, outline)
    elif shape.kind == "square":
        pen.rectangle(extent, fill, outline)
    else:
        corners = {"triangle": _TRIANGLE, "diamond": _DIAMOND, "arrow": _ARROW}[shape.kind]
        turn = _TURNS[shape.facing or "up"]
        pen.polygon(
            [(shape.x + u * reach, shape.y + v * reach) for u, v in (turn(*c) for c in corners)], fill, outline
        )


def draw(canvas: Canvas, shapes: Sequence[Shape]) -> Image.Image:
    """The RGB picture of the shapes, later ones over earlier ones."""
    image = _background(canvas).copy()
    pen = ImageDraw.Draw(image)
    for shape in shapes:
        _draw_shape(pen, shape)
    return image


def encode_png(image: Image.Image) -> bytes:
    return encode(image, "PNG", compress_level=1)

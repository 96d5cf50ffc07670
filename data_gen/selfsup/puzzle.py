"""A question on one picture, and the picture as the task families see it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from random import Random

import numpy as np
from PIL import Image

PixelBox = tuple[int, int, int, int]
"""x1, y1, x2, y2 in pixels; the right and lower edges are exclusive."""

MIN_CONTRAST = 8.0
"""Standard deviation of grey values (0 to 255) under which a region counts as empty."""
MIN_DIFFERENCE = 10.0
"""Mean absolute difference of grey values under which two regions look the same."""
_THUMB_PX = 24


@dataclass(frozen=True)
class Thing:
    """An annotated object."""

    name: str
    box: tuple[float, float, float, float]
    """x1, y1, x2, y2 in pixels of its picture."""


@dataclass(frozen=True)
class View:
    """One picture at its working size, with what is known of it in the same pixels."""

    image: Image.Image
    """RGB."""
    things: tuple[Thing, ...] = ()
    depth: np.ndarray | None = None
    """Depth of each pixel [H, W] as float32, NaN where it is unknown."""
    is_metric: bool = True
    """True for depth in metres; else only its order counts."""

    @cached_property
    def grey(self) -> np.ndarray:
        """Grey values [H, W] as float32."""
        return np.asarray(self.image.convert("L"), np.float32)

    @property
    def width(self) -> int:
        return self.image.width

    @property
    def height(self) -> int:
        return self.image.height

    @property
    def short_side(self) -> int:
        return min(self.image.size)

    def contrast(self, box: PixelBox) -> float:
        """Standard deviation of the grey values in a box."""
        return float(self.region(box).std())

    def region(self, box: PixelBox) -> np.ndarray:
        """Grey values in a box."""
        x1, y1, x2, y2 = box
        return self.grey[y1:y2, x1:x2]

    def is_rich(self, box: PixelBox) -> bool:
        """True for a region that is not empty."""
        return self.contrast(box) >= MIN_CONTRAST


@dataclass(frozen=True)
class Puzzle:
    """A question, its answer and the sheet that shows it; with options, the answer is one of them."""

    sheet: Image.Image
    question: str
    category: str
    reward: str
    """Name of the reward that reads the answer."""
    options: tuple[str, ...] = ()
    answer_index: int = 0
    answer: str = ""
    """Answer of a question without options."""
    evidence: tuple[tuple[str, PixelBox], ...] = field(default=())
    """Objects of the reference scene: name and box on the sheet."""


Task = Callable[[View, Random, float], Puzzle | None]
"""A task: a picture, random numbers and a difficulty from 0 to 1; None where the picture does not offer it."""


def choose(rng: Random, right: str, wrong: tuple[str, ...] | list[str]) -> tuple[tuple[str, ...], int]:
    """Options in a random order, and the index of the right one."""
    options = rng.sample([right, *wrong], 1 + len(wrong))
    return tuple(options), options.index(right)


def thumb(image: Image.Image) -> np.ndarray:
    """Grey values of an image at 24 x 24 pixels, for comparisons."""
    return np.asarray(image.convert("L").resize((_THUMB_PX, _THUMB_PX), Image.Resampling.BOX), np.float32)


def differ(one: np.ndarray, other: np.ndarray) -> bool:
    """True for two thumbs that do not look the same."""
    return float(np.abs(one - other).mean()) >= MIN_DIFFERENCE


def blend(easy: float, hard: float, difficulty: float) -> float:
    """The value between those of difficulty 0 and 1."""
    return easy + (hard - easy) * difficulty


def random_square(view: View, rng: Random, side: int, margin: int = 8) -> PixelBox:
    """A square inside the picture, each place equally likely."""
    x = rng.randint(margin, view.width - side - margin)
    y = rng.randint(margin, view.height - side - margin)
    return x, y, x + side, y + side

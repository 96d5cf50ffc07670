"""Pictures for tests of rows from pictures: crops of the photograph that matplotlib ships, drawn scenes, textures."""

import random
from pathlib import Path

import numpy as np
from matplotlib import get_data_path
from PIL import Image

from spatialthinker.shapes import Canvas, draw
from spatialthinker.synthetic import make_puzzle

PHOTOGRAPH = Path(get_data_path()) / "sample_data" / "grace_hopper.jpg"


def photograph(size: tuple[int, int] = (480, 400), corner: tuple[int, int] = (0, 0)) -> Image.Image:
    """A part of the photograph."""
    x, y = corner
    return Image.open(PHOTOGRAPH).convert("RGB").crop((x, y, x + size[0], y + size[1]))


def drawn_scene(seed: int, size: tuple[int, int] = (480, 360)) -> Image.Image:
    """A scene of coloured shapes."""
    canvas = Canvas(*size)
    return draw(canvas, make_puzzle("distance", random.Random(seed), canvas).shapes)


def texture(seed: int, size: tuple[int, int] = (480, 360)) -> Image.Image:
    """Coloured noise of several scales: no part of it, no side and no direction is likelier than another."""
    rng = np.random.default_rng(seed)
    total = np.zeros((size[1], size[0], 3), np.float32)
    for cell, weight in ((120, 50), (40, 40), (12, 25), (3, 12)):
        shape = (size[1] // cell + 2, size[0] // cell + 2, 3)
        grid = Image.fromarray(rng.integers(0, 256, shape, np.uint8))
        large = grid.resize((shape[1] * cell, shape[0] * cell), Image.Resampling.BICUBIC)
        x, y = rng.integers(0, cell, 2)
        total += weight / 127.5 * (np.asarray(large, np.float32)[y : y + size[1], x : x + size[0]] - 127.5)
    return Image.fromarray(np.clip(total + 127.5, 0, 255).astype(np.uint8))


def save_textures(folder: Path, number: int, size: tuple[int, int] = (480, 360), quality: int = 75) -> Path:
    """A folder of JPEG files of textures."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(number):
        texture(seed, size).save(folder / f"{seed:05d}.jpg", quality=quality)
    return folder

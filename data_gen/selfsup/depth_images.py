"""Depth images: PNG or TIFF of integers in units of a metre's part, or arrays of metres."""

import io
from pathlib import Path

import numpy as np

from spatialthinker.storage.images import BrokenImage, ImageSource, open_image

DEFAULT_SCALE = 1000.0
"""Units per metre of depth images of integers, as most cameras write them."""


def read_depth(source: ImageSource, size: tuple[int, int], scale: float | None) -> np.ndarray:
    """Depth [H, W] as float32, NaN where it is unknown: 0, negative or not finite.

    `size` is width and height of the picture; `scale` the units per metre: None for 1000 with integers and 1 with
    floats, 0 for values without a unit. Raises ValueError for another size or a file that is no depth image.
    """
    values = _read_values(source)
    if values.ndim != 2:
        raise ValueError(f"its depth has the shape {list(values.shape)}; need one value a pixel")
    if values.shape != (size[1], size[0]):
        found = f"{values.shape[1]} x {values.shape[0]}"
        raise ValueError(f"its depth has {found} pixels, the picture {size[0]} x {size[1]}; give both in one size")
    if scale is None:
        scale = DEFAULT_SCALE if np.issubdtype(values.dtype, np.integer) else 1.0
    depth = values.astype(np.float32) / np.float32(scale or 1.0)
    depth[~np.isfinite(depth) | (depth <= 0)] = np.nan
    return depth


def _read_values(source: ImageSource) -> np.ndarray:
    is_array = source.suffix == ".npy" if isinstance(source, Path) else source.startswith(b"\x93NUMPY")
    if is_array:
        try:
            return np.load(source if isinstance(source, Path) else io.BytesIO(source), allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"its depth cannot be read: {error}") from None
    try:
        with open_image(source) as image:
            return np.asarray(image)
    except BrokenImage as error:
        raise ValueError(f"its depth cannot be read: {error}") from None

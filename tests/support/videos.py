"""Videos for tests: files that OpenCV writes, lists of frames, and rows with them."""

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image

from spatialthinker.storage.images import encode
from tests.support.tiny_model_folder import build_processor, build_tokenizer
from verl.data.dataset import RLHFDataset
from verl.data.videos import VideoSettings

SIZE = (96, 64)  # width, height


def draw_frames(num_frames: int, size: tuple[int, int] = SIZE, seed: int = 0) -> list[Image.Image]:
    """Frames of smooth noise, no two alike."""
    rng = np.random.default_rng(seed)
    small = [Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8)) for _ in range(num_frames)]
    return [picture.resize(size, Image.Resampling.BICUBIC) for picture in small]


def frame_list(num_frames: int, size: tuple[int, int] = SIZE, seed: int = 0) -> list[bytes]:
    """The frames as PNG files."""
    return [encode(frame, "PNG") for frame in draw_frames(num_frames, size, seed)]


def write_video(path: Path, num_frames: int, fps: float = 10.0, size: tuple[int, int] = SIZE, seed: int = 0) -> Path:
    """Writes a video file, mp4 or avi."""
    import cv2

    code = cv2.VideoWriter_fourcc(*("MJPG" if path.suffix == ".avi" else "mp4v"))  # pyright: ignore
    writer = cv2.VideoWriter(str(path), code, fps, size)
    for frame in draw_frames(num_frames, size, seed):
        writer.write(np.asarray(frame)[:, :, ::-1])
    writer.release()
    return path


def tiny_processor(family: str) -> Any:
    """The processor of a family, with a byte-level tokenizer."""
    return build_processor(build_tokenizer(), family)


def open_rows(folder: Path, rows: list[dict[str, Any]], processor: Any, **options: Any) -> RLHFDataset:
    """A data set of rows with `prompt`, `answer`, `images` and `videos`."""
    Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    settings = {"min_pixels": 56 * 56, "max_pixels": 112 * 112} | options.pop("videos", {})
    options = {"prompt_key": "prompt", "answer_key": "answer", "max_prompt_length": 4096} | options
    return RLHFDataset(f"{folder}@train", processor, videos=VideoSettings(**settings), **options)

"""Videos of rows: found, measured, sampled, and decoded to the frames that engine and trainer get."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spatialthinker.storage.videos import VideoSource, decode_frames, find_videos, read_video_header
from verl.model.videos import (
    MAX_FRAMES,
    Clip,
    Sampling,
    Video,
    frame_size,
    lay_out,
    resize_frames,
    sample_frames,
    take_frames,
    video_grid,
)


@dataclass(frozen=True)
class VideoSettings:
    """Settings of the videos of a data set, named as their config keys.

    Attributes:
        video_key: column, which may be missing.
        video_fps: frames sampled per second of a file, and frames per second of a list.
        max_frames: of one video.
        min_pixels, max_pixels: of a frame; None: qwen-vl-utils' 128 and 768 tokens.
        total_pixels: of all temporal patches of a video; None: qwen-vl-utils' 115,200 tokens.
        tokens_per_second: of M-RoPE, see verl.model.videos.lay_out.
    """

    video_key: str = "videos"
    video_fps: float = 2.0
    max_frames: int = MAX_FRAMES
    min_pixels: int | None = None
    max_pixels: int | None = None
    total_pixels: int | None = None
    tokens_per_second: float = 1.0


@dataclass(frozen=True)
class Plan:
    """Frames to decode of a video, their size (width, height) for the model, and their part of the prompt."""

    sampling: Sampling
    size: tuple[int, int]
    source_size: tuple[int, int]
    clip: Clip


class VideoReader:
    """Reads the videos of rows for one model."""

    def __init__(self, settings: VideoSettings, processor: Any, folder: str | None):
        self.settings, self.processor, self.folder = settings, processor, folder

    def find(self, row: dict[str, Any]) -> list[VideoSource]:
        """The videos of a row. Errors: ValueError."""
        try:
            return find_videos(row.get(self.settings.video_key), Path(self.folder or ""))
        except ValueError as error:
            hint = f"; relative paths start at data.image_dir={self.folder}" if "there is no" in str(error) else ""
            raise ValueError(f"column {self.settings.video_key!r}: {error}{hint}") from None

    def plan(self, source: VideoSource) -> Plan:
        """The frames to sample of a video, from its header alone.

        Raises:
            ValueError: it holds none, or is a list of more than max_frames.
        """
        own, header = self.settings, read_video_header(source)
        if header.fps is not None:
            sampling = sample_frames(header.num_frames, header.fps, own.video_fps, own.max_frames)
        elif header.num_frames > own.max_frames:
            raise ValueError(
                f"a video is a list of {header.num_frames} frames, more than data.max_frames={own.max_frames}; "
                "store fewer, or raise it (a list is never sampled)"
            )
        else:
            sampling = take_frames(header.num_frames, own.video_fps)
        count, measure = len(sampling.indices), self.processor.video_processor
        size = frame_size(header.size, count, measure, own.min_pixels, own.max_pixels, own.total_pixels)
        clip = lay_out(sampling, video_grid(size, count, measure), self.processor, own.tokens_per_second)
        return Plan(sampling, size, header.size, clip)

    def decode(self, source: VideoSource, plan: Plan, place: int) -> Video:
        """The planned frames. Errors: BrokenVideo."""
        frames = resize_frames(decode_frames(source, plan.sampling.indices), plan.size)
        return Video(frames, plan.size[1], plan.size[0], plan.sampling, place)


def digest_video(source: VideoSource) -> bytes:
    """SHA-256 of a video as it is stored."""
    digest = hashlib.sha256()
    for part in source if isinstance(source, list) else [source]:
        if isinstance(part, bytes):
            digest.update(hashlib.sha256(part).digest())
            continue
        with part.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.digest()

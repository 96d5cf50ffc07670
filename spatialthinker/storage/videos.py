"""Videos of a data set: files, which OpenCV decodes as vLLM's loader does, and lists of frames; headers and frames."""

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spatialthinker.storage.images import (
    MAX_PIXELS,
    BrokenImage,
    ImageSource,
    find_image,
    load_image,
    read_header,
)

TAIL_FRAMES = 3
"""Frames at the end of a file that may be missing, since headers of common containers state a few too many."""

VideoSource = bytes | Path | list[ImageSource]
"""An encoded video, the file that holds it, or its frames as images."""


class BrokenVideo(ValueError):
    """A video that cannot be decoded; the message says why."""


@dataclass(frozen=True)
class VideoHeader:
    """Facts of a video that are known before it is decoded.

    Attributes:
        num_frames: of the whole video.
        fps: frames per second of a file; None for a list of frames.
        size: width and height in pixels.
    """

    num_frames: int
    fps: float | None
    size: tuple[int, int]


def find_videos(cell: Any, folder: Path) -> list[VideoSource]:
    """The videos of a cell, one or a list, in order; none for an empty cell.

    Args:
        cell: a video is a path, encoded bytes, {"bytes", "path"}, or the list of its frames. A list is one of videos,
            so that frames stand in a list of their own.
        folder: base of relative paths.

    Raises:
        ValueError: another type, or no file that can be read.
    """
    entries = cell if isinstance(cell, list) else [] if cell is None or cell in ("", b"") else [cell]
    return [_find_video(entry, folder) for entry in entries]


def _find_video(entry: Any, folder: Path) -> VideoSource:
    if isinstance(entry, list):
        frames = [find_image(frame, folder) for frame in entry]
        if not frames or None in frames:
            raise ValueError("a video is a list without frames, or one of its frames is empty; store every frame")
        return [frame for frame in frames if frame is not None]
    if not isinstance(entry, str | bytes | dict):
        raise ValueError(
            f"a video must be a path, encoded bytes or a list of frames, got {type(entry).__name__}; frames of one "
            "video stand in a list of their own"
        )
    try:
        found = find_image(entry, folder)
    except ValueError as error:
        raise ValueError(str(error).replace("an image", "a video").replace("image", "video")) from None
    if found is None:
        raise ValueError("a video is empty; store it, or leave its entry and its mark out")
    return found


def read_video_header(source: VideoSource) -> VideoHeader:
    """The header of a video, without decoding a frame. Errors: BrokenVideo."""
    if isinstance(source, list):
        return _read_list_header(source)
    cv2 = _opencv()
    with _open_video(source) as capture:
        num_frames, fps = capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)
        width, height = (int(capture.get(key)) for key in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
    if not math.isfinite(num_frames) or num_frames < 1:
        raise BrokenVideo(f"{name_source(source)} holds no frames, or is a picture and no video")
    if not math.isfinite(fps) or fps <= 0:
        raise BrokenVideo(f"{name_source(source)} lasts 0 seconds: it states {fps:g} frames per second")
    _check_size(width, height, source)
    return VideoHeader(int(num_frames), float(fps), (width, height))


def _read_list_header(frames: Sequence[ImageSource]) -> VideoHeader:
    first: tuple[int, int] | None = None
    for number, frame in enumerate(frames):
        try:
            size, _ = read_header(frame)
        except BrokenImage as error:
            raise BrokenVideo(f"frame {number} of a video cannot be decoded: {error}") from error
        first = first or size
        if size != first:
            shown = " x ".join(map(str, size)), " x ".join(map(str, first))
            raise BrokenVideo(
                f"frame {number} of a video has {shown[0]} pixels and the first one {shown[1]}; "
                "store all frames of a video in one size"
            )
    assert first is not None, "find_videos refuses empty lists"
    return VideoHeader(len(frames), None, first)


def decode_frames(source: VideoSource, indices: Sequence[int]) -> np.ndarray:
    """The frames at these rising indices [F, height, width, 3], RGB, uint8.

    Indices among the last TAIL_FRAMES of a file take the frame before, if the file ends early.

    Raises:
        BrokenVideo: a frame cannot be decoded, or a file changes its size.
    """
    if isinstance(source, list):
        pictures = {index: _decode_frame(source, index) for index in set(indices)}
        return np.stack([pictures[index] for index in indices])
    _check_one_size(source)
    cv2 = _opencv()
    wanted, frames, last = set(indices), {}, -1
    with _open_video(source) as capture:
        size = int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT)), int(capture.get(cv2.CAP_PROP_FRAME_WIDTH))
        while last < indices[-1] and capture.grab():
            last += 1
            if last in wanted or last >= indices[-1] - TAIL_FRAMES - 1:
                is_there, frame = capture.retrieve()
                if not is_there or frame is None or frame.shape[:2] != size:
                    found = "cannot be decoded" if frame is None else f"has {frame.shape[1]} x {frame.shape[0]} pixels"
                    stated = f"its header states {size[1]} x {size[0]}"
                    raise BrokenVideo(f"frame {last} of {name_source(source)} {found}, and {stated}")
                frames[last] = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
    if indices[-1] - last > TAIL_FRAMES or last < 0:
        raise BrokenVideo(
            f"{name_source(source)} ends behind {last + 1} frames, and its header states more than {indices[-1]}; "
            "it is cut off or broken"
        )
    return np.stack([frames[min(index, last)] for index in indices])


def _check_one_size(source: bytes | Path) -> None:
    """Passes if the key frames of a file, where alone a size can change, have one; OpenCV would scale the others."""
    from av.error import FFmpegError

    first: tuple[int, int] | None = None
    # What is broken OpenCV's decoder finds, and is named as its fault.
    with suppress(FFmpegError, OSError), _open_with_av(source) as container:
        for stream in container.streams.video[:1]:
            if stream.codec_context is None:  # of a codec that it does not know
                return
            stream.codec_context.skip_frame = "NONKEY"
            for frame in container.decode(stream):
                size = frame.width, frame.height
                first = first or size
                if size != first:
                    raise BrokenVideo(
                        f"{name_source(source)} changes its size: {first[0]} x {first[1]} pixels at first and "
                        f"{size[0]} x {size[1]} at {frame.time or 0:.1f} s; encode it in one size"
                    )


def _open_with_av(source: bytes | Path) -> Any:
    import av

    return av.open(io.BytesIO(source) if isinstance(source, bytes) else f"file:{source}")


def _decode_frame(frames: Sequence[ImageSource], number: int) -> np.ndarray:
    try:
        return np.asarray(load_image(frames[number]))
    except BrokenImage as error:
        raise BrokenVideo(f"frame {number} of a video cannot be decoded: {error}") from error


def name_source(source: VideoSource) -> str:
    """The video in words: its path, or what it is."""
    return f"the video {source}" if isinstance(source, Path) else "a video"


@contextmanager
def _open_video(source: bytes | Path) -> Iterator[Any]:
    """OpenCV's capture of a file's content, which is read as a stream, so that its name is no pattern or address."""
    cv2 = _opencv()
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as stream:
            capture = cv2.VideoCapture(stream, cv2.CAP_FFMPEG, [])
            try:
                if not capture.isOpened():
                    raise BrokenVideo(f"{name_source(source)} is no video that OpenCV can open; store an mp4")
                yield capture
            finally:
                capture.release()
    except OSError as error:
        raise BrokenVideo(f"{name_source(source)} cannot be read: {error.strerror or error}") from None


def _check_size(width: int, height: int, source: VideoSource) -> None:
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise BrokenVideo(f"{name_source(source)} has frames of {width} x {height}; 1 to {MAX_PIXELS} pixels are read")


def _opencv() -> Any:
    """OpenCV, silent about files that it cannot open: the error says it."""
    import cv2

    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2

"""Videos of Qwen-VL models: sampled frames, their tokens in a prompt, M-RoPE blocks, patches, and the engine's inputs.

Letters: F sampled frames; a temporal patch is two of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional
from transformers import Qwen2_5_VLProcessor, Qwen3VLProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import smart_resize

Grid = tuple[int, int, int]  # frames, patch rows, patch columns

PATCH_FRAMES = 2
"""Frames of a temporal patch."""
MIN_FRAMES = 4
"""Fewest frames that are sampled of a longer video, as in qwen-vl-utils."""
MAX_FRAMES = 768
"""Most frames that are sampled by default, as in qwen-vl-utils."""
_MIN_FRAME_TOKENS, _MAX_FRAME_TOKENS, _MAX_VIDEO_TOKENS = 128, 768, 115_200
"""Bounds of qwen-vl-utils, in patches of one frame after merging; of a video 0.9 x 128,000."""
_UNRESIZED = {"do_resize": False, "cap_pixels_per_frame": False}


@dataclass(frozen=True)
class Sampling:
    """Frames sampled of a video.

    Attributes:
        indices: [F] of frames of the source, F even; the last one twice where they were odd.
        fps: frames per second of the source.
        num_source_frames: of the source, at least F.
    """

    indices: tuple[int, ...]
    fps: float
    num_source_frames: int

    @property
    def timestamps(self) -> list[float]:
        """Seconds of each temporal patch, the mean of its two frames', as in transformers' Qwen3-VL processor."""
        times = [index / self.fps for index in self.indices]
        return [(first + second) / 2 for first, second in zip(times[::2], times[1::2], strict=True)]

    @property
    def seconds_per_patch(self) -> float:
        """Seconds from one temporal patch to the next, at the precision of bf16, to which the engine rounds it."""
        seconds = PATCH_FRAMES * self.num_source_frames / (len(self.indices) * self.fps)
        return float(torch.tensor(seconds, dtype=torch.bfloat16))


@dataclass(frozen=True)
class Video:
    """Sampled frames at the size that the model sees: what engine and trainer both get.

    Attributes:
        data: [F, height, width, 3] RGB, one byte each.
        height, width: in pixels.
        sampling: of the frames.
        place: among the images and videos of its prompt, from 0.
    """

    data: bytes
    height: int
    width: int
    sampling: Sampling
    place: int = 0

    def __len__(self) -> int:
        return len(self.data)

    @property
    def frames(self) -> np.ndarray:
        """[F, height, width, 3] uint8, writable."""
        flat = np.frombuffer(bytearray(self.data), dtype=np.uint8)
        return flat.reshape(len(self.sampling.indices), self.height, self.width, 3)


@dataclass(frozen=True)
class Clip:
    """A video's part of a prompt.

    Attributes:
        grid: temporal patches, patch rows and columns.
        stamps: per temporal patch the token ids of its time, which Qwen3-VL reads before it; empty in other families.
        interval: M-RoPE positions from one temporal patch to the next, where there are no stamps.
    """

    grid: Grid
    stamps: tuple[tuple[int, ...], ...] = ()
    interval: float = 1.0

    @property
    def blocks(self) -> list[tuple[Grid, float]]:
        """Grids that follow each other in the prompt, with their intervals: one, or one per stamp."""
        frames, rows, columns = self.grid
        return [((1, rows, columns), 1.0)] * frames if self.stamps else [(self.grid, self.interval)]


def sample_frames(num_frames: int, fps: float, wanted_fps: float, max_frames: int) -> Sampling:
    """An even number of frames, evenly spaced, as many as wanted per second, from 4 to max_frames.

    Source: smart_nframes of qwen-vl-utils, https://github.com/QwenLM/Qwen3-VL/tree/main/qwen-vl-utils. Unlike there, a
    video of one frame is that frame twice.
    """
    if num_frames == 1:
        return Sampling((0, 0), fps, PATCH_FRAMES)
    most = min(max_frames, num_frames) // PATCH_FRAMES * PATCH_FRAMES
    count = min(max(num_frames / fps * wanted_fps, MIN_FRAMES), most)
    count = int(count) // PATCH_FRAMES * PATCH_FRAMES
    indices = np.linspace(0, num_frames - 1, count).round().astype(int)
    return Sampling(tuple(indices.tolist()), fps, num_frames)


def take_frames(num_frames: int, fps: float) -> Sampling:
    """All frames of a list, which are `fps` a second; an odd last one twice."""
    indices = [*range(num_frames), *[num_frames - 1] * (num_frames % PATCH_FRAMES)]
    return Sampling(tuple(indices), fps, len(indices))


def frame_size(
    size: tuple[int, int],
    num_frames: int,
    video_processor: Any,
    min_pixels: int | None,
    max_pixels: int | None,
    total_pixels: int | None,
) -> tuple[int, int]:
    """Width and height at which the model sees frames of `size`.

    Each frame has `min_pixels` to `max_pixels`, of at most 768 tokens, and all temporal patches together
    `total_pixels`.
    Source: fetch_video of qwen-vl-utils, see sample_frames.

    Raises:
        ValueError: the sides differ by a factor of more than 200.
    """
    factor = video_processor.patch_size * video_processor.merge_size
    least = min_pixels or _MIN_FRAME_TOKENS * factor**2
    total = total_pixels or _MAX_VIDEO_TOKENS * factor**2
    most = max(min(_MAX_FRAME_TOKENS * factor**2, total / num_frames * PATCH_FRAMES), int(least * 1.05))
    height, width = smart_resize(size[1], size[0], factor, least, min(most, max_pixels or most))
    return max(factor, width), max(factor, height)


def video_grid(size: tuple[int, int], num_frames: int, video_processor: Any) -> Grid:
    """The patch grid of frames of `size` (width, height) as the model sees them."""
    patch = video_processor.patch_size
    return num_frames // PATCH_FRAMES, size[1] // patch, size[0] // patch


def writes_timestamps(processor: Any) -> bool:
    """True for Qwen3-VL and later: their prompts state the seconds of every temporal patch."""
    return isinstance(processor, Qwen3VLProcessor)


def lay_out(sampling: Sampling, grid: Grid, processor: Any, tokens_per_second: float) -> Clip:
    """A video's part of a prompt.

    Args:
        tokens_per_second: M-RoPE positions of a second, of the model's vision_config; 1 where it has none.
    """
    if writes_timestamps(processor):
        texts = [f"<{time:.1f} seconds>" for time in sampling.timestamps]
        ids = [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return Clip(grid, tuple(map(tuple, ids)))
    seconds = sampling.seconds_per_patch if isinstance(processor, Qwen2_5_VLProcessor) else 1.0
    return Clip(grid, (), seconds * tokens_per_second)


def expand_video_tokens(ids: Sequence[int], clips: Sequence[Clip], processor: Any) -> list[int]:
    """Token ids with each video token repeated once per merged patch, between the stamps of its times if it has any.

    With stamps each temporal patch has a start and end of its own and there is no further pair around them, as in vLLM
    and in the processor of Qwen3-VL's release (transformers 4.57); transformers 5 leaves the template's pair there.

    Raises:
        ValueError: the number of video tokens is not the number of videos.
    """
    token: Any = processor.video_token_id
    if not clips and not token:  # a text model
        return list(ids)
    merge = processor.video_processor.merge_size
    if (count := list(ids).count(token)) != len(clips):
        raise ValueError(
            f"the chat template writes {count} places for {len(clips)} videos; give one that knows parts of type "
            "video with data.override_chat_template"
        )
    rest = iter(clips)
    expanded: list[int] = []
    for each in ids:
        if each != token:
            expanded.append(each)
            continue
        clip = next(rest)
        frames, rows, columns = clip.grid
        size = rows * columns // merge**2
        if not clip.stamps:
            expanded.extend([token] * (frames * size))
            continue
        begin, end = processor.vision_start_token_id, processor.vision_end_token_id
        expanded[-1:] = [*clip.stamps[0], begin]  # the template has written the start of the first
        expanded.extend([token] * size)
        for stamp in clip.stamps[1:]:
            expanded.extend([end, *stamp, begin, *[token] * size])
    return expanded


def resize_frames(frames: np.ndarray, size: tuple[int, int]) -> bytes:
    """RGB frames [F, height, width, 3] at this width and height, as the video processors scale them."""
    pictures = torch.from_numpy(frames).permute(0, 3, 1, 2)
    bicubic = functional.InterpolationMode.BICUBIC
    scaled = functional.resize(pictures, [size[1], size[0]], interpolation=bicubic, antialias=True)
    return scaled.permute(0, 2, 3, 1).contiguous().numpy().tobytes()


def video_patches(video: Video, video_processor: Any, dtype: torch.dtype) -> tuple[Tensor, Grid]:
    """Patches and grid of a video, by the model's own video processor."""
    out = video_processor(videos=[video.frames], do_sample_frames=False, return_tensors="pt", **_UNRESIZED)
    return out["pixel_values_videos"].to(dtype), tuple(out["video_grid_thw"][0].tolist())


def engine_inputs(videos: Sequence[Video], with_timestamps: bool) -> tuple[list[Any], dict[str, Any]]:
    """vLLM's `video` data and the prompt's `mm_processor_kwargs`.

    Without timestamps vLLM passes no metadata on, and transformers would take 24 frames per second; here they go by
    keyword, such that seconds_per_patch comes out.
    """
    if with_timestamps:
        return [(video.frames, _metadata(video.sampling)) for video in videos], {"videos_kwargs": dict(_UNRESIZED)}
    regular = [
        Sampling(tuple(range(len(own.indices))), PATCH_FRAMES / own.seconds_per_patch, len(own.indices))
        for own in (video.sampling for video in videos)
    ]
    metadata = [_metadata(sampling) for sampling in regular]
    options = _UNRESIZED | {"do_sample_frames": False, "video_metadata": metadata}
    return [video.frames for video in videos], {"videos_kwargs": options}


def _metadata(sampling: Sampling) -> dict[str, Any]:
    """Fields of transformers' VideoMetadata."""
    return {
        "total_num_frames": sampling.num_source_frames,
        "fps": sampling.fps,
        "duration": sampling.num_source_frames / sampling.fps,
        "video_backend": "opencv",
        "frames_indices": list(sampling.indices),
    }


def in_order(images: Sequence[Any], videos: Sequence[Video]) -> list[Any]:
    """The images and videos of a prompt in the order of their places."""
    media = list(images)
    for video in videos:
        media.insert(video.place, video)
    return media

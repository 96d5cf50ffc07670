"""Benchmark inputs: rows with random images, lengths of responses, and a dummy reward."""

import io
import zlib
from pathlib import Path
from statistics import NormalDist
from typing import Any

FILLER = " red"


def score_by_digest(items: list[dict[str, Any]]) -> list[dict[str, float]]:
    """A dummy reward that differs between responses, so that gradients are not zero."""
    return [{"overall": zlib.crc32(item["response"].encode()) / 2**32} for item in items]


def lognormal(text: str) -> NormalDist:
    """The normal distribution of the logarithms of lengths from `lognormal:MEDIAN:SIGMA`, the median in tokens."""
    import math

    name, _, numbers = text.partition(":")
    median, sigma = (float(number) for number in numbers.split(":"))
    if name != "lognormal" or not (1 <= median < math.inf and 0 <= sigma < math.inf):
        raise ValueError
    return NormalDist(math.log(median), sigma)


def draw_lengths(logs: NormalDist, shape: tuple[int, int], limit: int, seed: int) -> Any:
    """Lengths [G, n] in tokens, 1 to `limit`: evenly spaced quantiles in random order; every draw has the same sum."""
    import numpy as np

    count = shape[0] * shape[1]
    shares = [(i + 0.5) / count for i in range(count)]
    values = np.exp([logs.inv_cdf(share) if logs.stdev else logs.mean for share in shares])
    lengths = np.clip(np.rint(values), 1, limit).astype(int)
    return np.random.default_rng(seed).permutation(lengths).reshape(shape)


def random_picture(rng: Any, size: tuple[int, int]) -> bytes:
    """A JPEG file of random blots."""
    from PIL import Image

    buffer = io.BytesIO()
    coarse = rng.integers(0, 256, (size[1] // 16 + 1, size[0] // 16 + 1, 3), dtype="uint8")
    Image.fromarray(coarse).resize(size).save(buffer, "JPEG")
    return buffer.getvalue()


def write_rows(
    path: Path, processor: Any, data: Any, size: tuple[int, int], num_tokens: int, num_frames: int, videos: Any
) -> tuple[int, int]:
    """Writes a parquet file of rows with a random picture or video, and a prompt of exactly so many tokens.

    Args:
        size: width and height of the picture or of a frame.
        num_frames: of a video, which is a list of frames; 0: a picture.
        videos: settings of videos.

    Returns:
        pictures that the vision encoder sees apart (pairs of frames of a video), and the patches of each.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from verl.data.dataset import RLHFDataset
    from verl.data.processor import pixel_limits
    from verl.data.videos import VideoReader
    from verl.model.qwen_vl import image_grid

    rng = np.random.default_rng(0)

    def row(text: str) -> dict[str, Any]:
        pictures = [{"bytes": random_picture(rng, size), "path": None} for _ in range(num_frames or 1)]
        column = {"videos": [pictures]} if num_frames else {"images": pictures}
        return {"problem": text, "answer_option_text": "-", **column}

    mark = "<video>" if num_frames else "<image>"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([row(mark)]), path)
    limits = {"min_pixels": data.min_pixels, "max_pixels": data.max_pixels, "resize_first": data.resize_first}
    limits |= {"max_prompt_length": data.max_prompt_length, "filter_overlong_prompts": False}
    prompt = RLHFDataset(str(path), processor, videos=videos, **limits)[0]
    written = processor.tokenizer(2 * FILLER, add_special_tokens=False)["input_ids"]
    if len(written) != 2:
        raise SystemExit(
            f"prompts are filled with the word {FILLER.strip()!r}, of which this model's tokenizer makes "
            f"{len(written) / 2:g} tokens and not one; take a model whose vocabulary has it"
        )
    missing = num_tokens - len(prompt.ids)
    if missing < 0:
        what = f"a video of {num_frames} frames" if num_frames else "the image"
        raise SystemExit(
            f"{what} alone takes {num_tokens - missing} of a prompt's {num_tokens} tokens; make it longer"
        )
    rows = [row(mark + FILLER * missing) for _ in range(data.rollout_batch_size)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    if num_frames:
        reader = VideoReader(videos, processor, None)
        grid = reader.plan(reader.find(rows[0])[0]).clip.grid
    else:
        bounds = pixel_limits(processor, data.min_pixels, data.max_pixels)
        grid = image_grid(size, processor.image_processor, **bounds)
    return grid[0], grid[1] * grid[2]

"""Qwen-VL models: image preprocessing, M-RoPE positions, and policy and value models over packed rows.

Letters as in packing.py: T packed tokens, S responses, N response tokens; D hidden size, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from spatialthinker.storage.images import load_image
from verl.model.attention import TEXT_ATTENTION, VISION_ATTENTION
from verl.model.experts import route_packed
from verl.model.families import forward_packed, model_class, read_config, vision_encoder
from verl.model.linear_attention import scan_packed
from verl.model.log_probs import full_divergence, response_log_probs
from verl.model.packing import PackedBatch
from verl.model.videos import Clip, Grid, Video, video_patches


def image_grid(size: tuple[int, int], image_processor: Any, min_pixels: int, max_pixels: int) -> Grid:
    """The image processor's patch grid for an image of `size` (width, height), without its pixels."""
    patch = image_processor.patch_size
    width, height = size
    rows, columns = smart_resize(height, width, patch * image_processor.merge_size, min_pixels, max_pixels)
    return 1, rows // patch, columns // patch


def image_patches(
    images: Sequence[bytes | Image.Image | Video],
    image_processor: Any,
    dtype: torch.dtype = torch.float32,
    num_threads: int = 1,
    video_processor: Any = None,
    **size: int,
) -> tuple[list[Tensor], list[Grid]]:
    """Patches and grid of each image or video, by the model's own image and video processor.

    Args:
        images: encoded or decoded; videos among them.
        dtype: of the patches: the compute type of the vision encoder.
        num_threads: images processed in parallel.
        video_processor: of the model; may be None without videos.
        size: `min_pixels` and `max_pixels` of images.
    """

    def patches(image: bytes | Image.Image | Video) -> tuple[Tensor, Grid]:
        if isinstance(image, Video):
            return video_patches(image, video_processor, dtype)
        picture = load_image(image) if isinstance(image, bytes) else image
        out = image_processor(images=[picture], return_tensors="pt", **size)
        return out["pixel_values"].to(dtype), tuple(out["image_grid_thw"][0].tolist())

    threads_inside = torch.get_num_threads()
    with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        pairs = list(pool.map(patches, images))
    torch.set_num_threads(threads_inside)  # a thread's setting applies to all threads started later
    return [pixels for pixels, _ in pairs], [grid for _, grid in pairs]


def expand_image_tokens(ids: Sequence[int], grids: Sequence[Grid], image_token_id: int, merge_size: int) -> list[int]:
    """Token ids with each image token repeated once per merged patch of its image.

    Raises:
        ValueError: the number of image tokens is not the number of images.
    """
    if (count := list(ids).count(image_token_id)) != len(grids):
        raise ValueError(f"the prompt has {count} image places but the row has {len(grids)} images")
    grid_iter = iter(grids)
    expanded: list[int] = []
    for token in ids:
        if token == image_token_id:
            frames, rows, columns = next(grid_iter)
            expanded.extend([token] * (frames * rows * columns // merge_size**2))
        else:
            expanded.append(token)
    return expanded


def check_image_tokens(
    prompts: Sequence[Tensor], images: Sequence[Sequence[int]], grids: Sequence[Grid], processor: Any
) -> None:
    """Checks that every prompt has as many image and video tokens as its images and videos have features.

    Without its pixels a prompt would train as if the image token were text, and no metric would show it.

    Args:
        prompts: [P] ids of each prompt, image tokens expanded.
        images: per prompt the indices of its images and videos in `grids`.
        processor: of the model.

    Raises:
        ValueError: the first prompt where they differ.
    """
    if processor.image_token_id is None:
        return
    for number, (ids, shown) in enumerate(zip(prompts, images, strict=True)):
        found = int(((ids == processor.image_token_id) | (ids == processor.video_token_id)).sum())
        wanted = sum(math.prod(grids[i]) for i in shown) // processor.image_processor.merge_size**2
        if found != wanted:
            raise ValueError(
                f"prompt {number} of a rank's batch has {found} image tokens, and its {len(shown)} images have "
                f"{wanted} features: prompts and images were parted on the way"
            )


def mrope_positions(
    ids: Sequence[int],
    grids: Sequence[Grid],
    image_token_id: int,
    merge_size: int,
    video_token_id: int | None = None,
    clips: Sequence[Clip] = (),
) -> Tensor:
    """M-RoPE positions [3, P] (time, height, width) of an expanded prompt.

    Text advances all three together; an image that starts at position b takes (b, b + row, b + column), patch t of a
    video (b + floor(t * interval), b + row, b + column), and text continues behind the largest of them. Source:
    Qwen2-VL, arXiv 2409.12191 section 2.1, and Qwen2.5-VL, arXiv 2502.13923 section 2.1.2; equal to vLLM's, and to
    transformers' get_rope_index but for Qwen2-VL and Qwen2.5-VL videos that are longer than they are wide or whose
    patches are no whole seconds apart: transformers 5 rounds these down and lets text continue inside the video.

    Args:
        grids, clips: of the prompt's images and of its videos.
    """
    kinds = {image_token_id: iter([(grid, 1.0) for grid in grids])}
    if video_token_id is not None:
        kinds[video_token_id] = iter([block for clip in clips for block in clip.blocks])
    blocks, cursor, position = [], 0, 0
    for _ in range(len(grids) + sum(len(clip.blocks) for clip in clips)):
        start = next(place for place in range(cursor, len(ids)) if ids[place] in kinds)
        (frames, rows, columns), interval = next(kinds[ids[start]])
        rows, columns = rows // merge_size, columns // merge_size
        blocks.append(torch.arange(position, position + start - cursor).expand(3, -1))
        position += start - cursor
        times = (torch.arange(frames, dtype=torch.float64) * interval).long()
        cells = torch.cartesian_prod(times, torch.arange(rows), torch.arange(columns)).reshape(-1, 3)
        blocks.append(cells.T + position)
        position += int(cells.max()) + 1
        cursor = start + frames * rows * columns
    blocks.append(torch.arange(position, position + len(ids) - cursor).expand(3, -1))
    return torch.cat(blocks, dim=1)


class ResponseLogProbs(nn.Module):
    """A policy model whose forward pass returns log-probs of packed responses.

    Args:
        model: of a class in model_families.py.
        banned_token_ids: never sampled, and so masked in the distributions that are scored.
    """

    def __init__(self, model: PreTrainedModel, banned_token_ids: Sequence[int] = ()):
        super().__init__()
        self.model = model
        self.banned: Tensor | None
        self.register_buffer("banned", torch.tensor(banned_token_ids) if banned_token_ids else None, persistent=False)

    def forward(
        self,
        batch: PackedBatch,
        pixel_values: Tensor | None,
        grids: Sequence[Grid] | None,
        temperature: float,
        reference: tuple[Tensor, Tensor] | None = None,
        with_states: bool = False,
    ) -> tuple[Tensor, ...]:
        """Log-probs [N] and entropies [N] of the batch's response tokens.

        Args:
            batch: the packed row.
            pixel_values: [patches, patch size] of the row's images: each distinct image once, or one per image block.
                For a row without images None, or a dummy image: its features are multiplied by 0, and it is encoded
                only because FSDP's collectives need every rank to run the vision encoder.
            grids: of these images.
            temperature: of sampling.
            reference: hidden states and output embedding of the reference policy for the same row; then the exact
                KL divergence [N] from its distributions is returned third.
            with_states: True returns hidden states [N, D] and output embedding [V, D] instead, for `reference`.
        """
        states = forward_packed(self.model, batch, pixel_values, grids)[batch.predict_index]
        weight = self.model.lm_head.weight
        if with_states:
            return states, weight
        scores = response_log_probs(states, weight, batch.targets, temperature, self.banned)
        if reference is None:
            return scores
        return *scores, full_divergence(states, weight, *reference, temperature, self.banned)


class ResponseValues(nn.Module):
    """A value model (critic): the expected reward before each response token."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        model.lm_head = nn.Linear(model.config.get_text_config().hidden_size, 1, dtype=model.dtype)
        nn.init.zeros_(model.lm_head.weight)  # values start at 0
        nn.init.zeros_(model.lm_head.bias)
        self.model = model

    def forward(self, batch: PackedBatch, pixel_values: Tensor | None, grids: Sequence[Grid] | None) -> Tensor:
        """Values [N] in float32; arguments as of ResponseLogProbs.forward."""
        states = forward_packed(self.model, batch, pixel_values, grids)[batch.predict_index]
        return self.model.lm_head(states).squeeze(-1).float()


def load_model(
    path: str,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    overrides: Mapping[str, Any] | None = None,
    random_on: torch.device | None = None,
) -> PreTrainedModel:
    """The pretrained model with packed attention in its decoder and vision encoder.

    Args:
        overrides: replace fields of its config.json.
        random_on: device on which random weights are drawn, the same on every rank, instead of reading any.
    """
    config = read_config(path, trust_remote_code, overrides)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa"}
    if random_on is None:
        model = model_class(config).from_pretrained(path, config=config, **options)
    else:
        torch.manual_seed(0)
        with random_on:
            model = model_class(config)._from_config(config, **options)
    attend_packed(model)
    return model


def attend_packed(model: PreTrainedModel) -> None:
    """Sets packed attention, linear attention and routing to experts in a loaded model, in place.

    Not at loading: there "flash" in a name makes transformers look for the flash-attn package.
    """
    is_text = vision_encoder(model) is None
    model.set_attn_implementation(
        TEXT_ATTENTION if is_text else {"text_config": TEXT_ATTENTION, "vision_config": VISION_ATTENTION}
    )
    scan_packed(model)
    route_packed(model)

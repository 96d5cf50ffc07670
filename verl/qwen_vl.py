"""What is particular to the Qwen2.5-VL family: image grids, rotary positions, shared prompts, response log-probs.

Letters as in batching.py: T packed tokens, S responses, N response tokens; D hidden size, V vocabulary.
"""

import io
from collections.abc import Sequence
from typing import Any, cast

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from verl.batching import GroupLayout, PackedBatch
from verl.divergences import compute_full_kl

ATTENTION_NAME = "shared_prompt"
LOG_PROB_CHUNK_TOKENS = 2048  # logits of one chunk: 2048 x 151,936 x 4 bytes = 1.2 GB
EXIF_ORIENTATION_TAG = 0x0112
EXIF_SIDEWAYS = range(5, 9)  # orientations that swap width and height

Pair = tuple[Tensor, Tensor]
Grid = tuple[int, int, int]  # frames, patch rows, patch columns


def decode_image(data: bytes) -> Image.Image:
    """The image as RGB, turned upright as its EXIF tag says."""
    with Image.open(io.BytesIO(data)) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def upright_size(data: bytes) -> tuple[int, int]:
    """Width and height of the upright image, from its header alone."""
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        sideways = image.getexif().get(EXIF_ORIENTATION_TAG) in EXIF_SIDEWAYS
    return (height, width) if sideways else (width, height)


def image_grid(size: tuple[int, int], image_processor: Any, min_pixels: int, max_pixels: int) -> Grid:
    """The patch grid that the image processor makes of a picture of `size` (width, height), without its pixels."""
    patch = image_processor.patch_size
    width, height = size
    rows, columns = smart_resize(height, width, patch * image_processor.merge_size, min_pixels, max_pixels)
    return 1, rows // patch, columns // patch


def expand_image_tokens(ids: Sequence[int], grids: Sequence[Grid], image_token_id: int, merge_size: int) -> list[int]:
    """Token ids in which each image token is repeated once per merged patch of its image.

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


def mrope_positions(ids: Sequence[int], grids: Sequence[Grid], image_token_id: int, merge_size: int) -> Tensor:
    """[3, P] time, height and width positions of an expanded prompt.

    Text advances all three together; an image that starts at position b takes (b, b + row, b + column), and text
    goes on at b + max(rows, columns). Source: Qwen2-VL, arXiv 2409.12191 section 2.1; equal to transformers'
    get_rope_index for text and images.
    """
    blocks, cursor, position = [], 0, 0
    for frames, rows, columns in grids:
        start = list(ids).index(image_token_id, cursor)
        rows, columns = rows // merge_size, columns // merge_size
        blocks.append(torch.arange(position, position + start - cursor).expand(3, -1))
        position += start - cursor
        cells = torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(columns))
        blocks.append(cells.T.reshape(3, -1) + position)
        position += max(rows, columns)
        cursor = start + frames * rows * columns
    blocks.append(torch.arange(position, position + len(ids) - cursor).expand(3, -1))
    return torch.cat(blocks, dim=1)


def _heads_first(states: Tensor, index: Tensor, num_repeats: int) -> Tensor:
    """[T, heads, size] gathered by [rows, columns] to [rows, heads * num_repeats, columns, size]."""
    gathered = states[index].transpose(1, 2)
    return gathered.repeat_interleave(num_repeats, dim=1) if num_repeats > 1 else gathered


def shared_prompt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    layout: GroupLayout,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention over a packed row: prompts see their own past, responses their prompt and their own past.

    Two calls a layer: prompts [G, heads, P, size] causally, responses [S, heads, R, size] over the keys of their
    prompt and their own. Exactly what n repeated prompts would give, with the prompt's work done once.

    Args:
        query: [1, heads, T, size]; key and value: [1, key heads, T, size].
        layout: the row's prompts and responses.

    Returns:
        [1, T, heads, size] and no weights.
    """
    repeats = query.shape[1] // key.shape[1]
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))  # [T, heads, size]
    prompt_keys = _heads_first(k, layout.prompt_index, repeats)  # [G, heads, P, size]
    prompt_values = _heads_first(v, layout.prompt_index, repeats)
    prompt_out = scaled_dot_product_attention(
        _heads_first(q, layout.prompt_index, 1), prompt_keys, prompt_values, is_causal=True, scale=scaling
    )
    own_keys = _heads_first(k, layout.response_index, repeats)  # [S, heads, R, size]
    own_values = _heads_first(v, layout.response_index, repeats)
    response_out = scaled_dot_product_attention(
        _heads_first(q, layout.response_index, 1),
        torch.cat([prompt_keys[layout.response_group], own_keys], dim=2),
        torch.cat([prompt_values[layout.response_group], own_values], dim=2),
        attn_mask=layout.attention_mask,
        scale=scaling,
    )
    tokens = torch.cat(
        [
            prompt_out.transpose(1, 2)[layout.prompt_mask],
            response_out.transpose(1, 2)[layout.response_mask],
        ]
    )
    return tokens[layout.unpack_index].unsqueeze(0), None


AttentionInterface.register(ATTENTION_NAME, shared_prompt_attention)


def _chunk_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability [N] of each target and entropy [N] of each distribution, computed in float32."""
    logits = (hidden @ weight.T).float() / temperature
    log_probs = logits.log_softmax(dim=-1)
    chosen = log_probs.gather(1, targets.unsqueeze(1)).squeeze(1)
    with torch.no_grad():
        entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
    return chosen, entropy


def response_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs [N] and entropies [N] of response tokens, without holding the logits of more than one chunk.

    Args:
        hidden: [N, D] states that predict the targets.
        weight: [V, D] output embedding.
        targets: [N] token ids.
        temperature: divides the logits, as in sampling.
    """
    log_probs, entropies = [], []
    for start in range(0, len(targets), LOG_PROB_CHUNK_TOKENS):
        part = slice(start, start + LOG_PROB_CHUNK_TOKENS)
        arguments = (hidden[part], weight, targets[part], temperature)
        if torch.is_grad_enabled() and len(targets) > LOG_PROB_CHUNK_TOKENS:
            chosen, entropy = cast(Pair, checkpoint(_chunk_log_probs, *arguments, use_reentrant=False))
        else:
            chosen, entropy = _chunk_log_probs(*arguments)
        log_probs.append(chosen)
        entropies.append(entropy)
    return torch.cat(log_probs), torch.cat(entropies)


def _chunk_divergence(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, temperature: float
) -> Tensor:
    log_probs, ref_log_probs = (
        ((states @ head.T).float() / temperature).log_softmax(dim=-1)
        for states, head in ((hidden, weight), (ref_hidden, ref_weight))
    )
    return compute_full_kl(log_probs, ref_log_probs)


def full_divergence(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, temperature: float
) -> Tensor:
    """[N] divergences of one model's next-token distributions from another's, in chunks as the log-probs."""
    parts = []
    for start in range(0, len(hidden), LOG_PROB_CHUNK_TOKENS):
        part = slice(start, start + LOG_PROB_CHUNK_TOKENS)
        arguments = (hidden[part], weight, ref_hidden[part], ref_weight, temperature)
        parts.append(cast(Tensor, checkpoint(_chunk_divergence, *arguments, use_reentrant=False)))
    return torch.cat(parts)


class ResponseLogProbs(nn.Module):
    """A vision-language model whose forward pass is what the trainer asks of it: log-probs of packed responses."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(
        self,
        batch: PackedBatch,
        pixel_values: Tensor | None,
        image_grid_thw: Tensor | None,
        temperature: float,
        reference: Pair | None = None,
        with_states: bool = False,
    ) -> tuple[Tensor, ...]:
        """Log-probs [N] and entropies [N] of the batch's response tokens.

        Args:
            batch: the packed row.
            pixel_values: [patches, patch size] of the distinct images that the row shows, each once. When the row
                shows none, any image (its features move nothing, the tower only keeps ranks in step) or None.
            image_grid_thw: [images, 3] their grids.
            temperature: of the sampling that is scored.
            reference: another model's states and output embedding of the same row: then the exact divergence [N]
                from its distributions comes third.
            with_states: return what another model's pass takes as reference, and nothing else.
        """
        states = self.response_states(batch, pixel_values, image_grid_thw)
        weight = self.model.lm_head.weight
        if with_states:
            return states, weight
        scores = response_log_probs(states, weight, batch.targets, temperature)
        return scores if reference is None else (*scores, full_divergence(states, weight, *reference, temperature))

    def response_states(
        self, batch: PackedBatch, pixel_values: Tensor | None, image_grid_thw: Tensor | None
    ) -> Tensor:
        """[N, D] last hidden states from which the response tokens are predicted."""
        inner = self.model.model
        embeds = inner.get_input_embeddings()(batch.input_ids).unsqueeze(0)  # [1, T, D]
        features = () if pixel_values is None else inner.get_image_features(pixel_values, image_grid_thw).pooler_output
        if batch.image_ids:
            order = {image: i for i, image in enumerate(dict.fromkeys(batch.image_ids))}
            shown = torch.cat([features[order[image]] for image in batch.image_ids]).to(embeds.dtype)
            places = (batch.input_ids == self.model.config.image_token_id).view(1, -1, 1)
            embeds = embeds.masked_scatter(places, shown)
        for feature in () if batch.image_ids else features:
            embeds = embeds + 0.0 * feature.sum()
        states = inner.language_model(
            inputs_embeds=embeds,
            position_ids=batch.position_ids.unsqueeze(1),
            use_cache=False,
            layout=batch.layout,
        ).last_hidden_state[0]
        return states[batch.predict_index]


class ResponseValues(ResponseLogProbs):
    """The same model with a value in place of a distribution: what reward is expected before each response token."""

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        head = nn.Linear(model.config.get_text_config().hidden_size, 1, dtype=model.dtype)
        nn.init.zeros_(head.weight)  # a critic that knows nothing expects nothing
        nn.init.zeros_(head.bias)
        model.lm_head = head

    def forward(self, batch: PackedBatch, pixel_values: Tensor | None, image_grid_thw: Tensor | None) -> Tensor:
        """[N] values, in float32."""
        return self.model.lm_head(self.response_states(batch, pixel_values, image_grid_thw)).squeeze(-1).float()


def load_model(path: str, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The pretrained model with shared-prompt attention in its text part and plain attention in its tower."""
    return AutoModelForImageTextToText.from_pretrained(
        path,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        attn_implementation={"text_config": ATTENTION_NAME, "vision_config": "sdpa"},
    )

"""Supported model classes: their vision encoder, decoder and packed forward pass.

Letters as in packing.py: T tokens of a packed row; D hidden size.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, vision_utils

from verl.config.records import Config, ConfigError
from verl.model.packing import PackedBatch, to_device

VISION_CLASSES = (
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
)
TEXT_CLASSES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM")
DUMMY_GRID = (1, 4, 4)  # smallest image that window attention accepts


def read_config(
    path: str,
    trust_remote_code: bool = False,
    overrides: Mapping[str, Any] | None = None,
    section: str = "worker.actor.model",
) -> PretrainedConfig:
    """The model's config.json with overrides applied.

    Args:
        path: folder or hub name.
        trust_remote_code: True runs code that comes with the model.
        overrides: see override_config.
        section: prefix of the keys in error messages.

    Raises:
        ConfigError: the config cannot be read, or the trainer does not support the model.
    """
    key = f"{section}.model_path = {path!r}"
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError([f"{key}: its config.json cannot be read: {error}"]) from error
    config = override_config(_with_own_class(config, path), overrides or {}, f"{section}.override_config")
    names = config.architectures or ["no class"]
    if names[0] not in VISION_CLASSES + TEXT_CLASSES:
        supported = ", ".join(VISION_CLASSES + TEXT_CLASSES)
        raise ConfigError([f"{key}: its config.json names {names[0]}; supported are {supported}"])
    if _has_sliding_window(config):
        raise ConfigError(
            [f"{key}: its layers attend within a sliding window, training to everything; set use_sliding_window=false"]
        )
    return config


def _with_own_class(config: PretrainedConfig, path: str) -> PretrainedConfig:
    """The config in the class of its model; vLLM, once imported, puts others in the place of some."""
    own = getattr(getattr(transformers, (config.architectures or [""])[0], None), "config_class", None)
    return config if own is None or isinstance(config, own) else own.from_pretrained(path)


def override_config(config: PretrainedConfig, overrides: Mapping[str, Any], key: str = "") -> PretrainedConfig:
    """The config, changed in place: each field gets its new value, sections and dictionaries key by key.

    Raises:
        ConfigError: the config has no such field.
    """
    for name, value in overrides.items():
        if not hasattr(config, name):
            near = difflib.get_close_matches(name, config.to_dict(), n=1, cutoff=0.0)
            raise ConfigError(
                [f"{key}.{name} = {value!r}: {type(config).__name__} has no such field; did you mean {near[0]}?"]
            )
        known = getattr(config, name)
        if isinstance(known, PretrainedConfig) and isinstance(value, Mapping):
            override_config(known, value, f"{key}.{name}")
        elif isinstance(known, dict) and isinstance(value, Mapping):
            setattr(config, name, known | dict(value))
        else:
            setattr(config, name, value)
    return config


def override_engine_config(config: PretrainedConfig, overrides: Mapping[str, Any]) -> PretrainedConfig:
    """override_config as vLLM's hf_overrides; does nothing to a bare PretrainedConfig, on which vLLM calls it too."""
    return config if type(config) is PretrainedConfig else override_config(config, overrides)


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The transformers class named by a config from read_config."""
    names: Any = config.architectures
    return getattr(transformers, names[0])


def critic_path(config: Config) -> str:
    """The critic's model path; defaults to the actor's."""
    return config.worker.critic.model.model_path or config.worker.actor.model.model_path


def _has_sliding_window(config: PretrainedConfig) -> bool:
    return "sliding_attention" in (getattr(config.get_text_config(), "layer_types", None) or ())


def vision_encoder(model: PreTrainedModel) -> nn.Module | None:
    """The vision encoder (`model.visual`); None in a text model."""
    return getattr(model.model, "visual", None)


def decoder(model: PreTrainedModel) -> Any:
    """The language model, whose `layers` are the decoder layers."""
    return getattr(model.model, "language_model", model.model)


def encoder_inputs(encoder: Any, grids: Tensor) -> dict[str, Any]:
    """Positions, sequence lengths and window indices of the images, computed on the CPU without GPU syncs.

    Args:
        encoder: of any family.
        grids: [images, 3] on the CPU.

    Returns:
        Keyword arguments of transformers' get_image_features.
    """
    inputs: dict[str, Any] = {
        "position_ids": vision_utils.get_vision_position_ids(grids, encoder.spatial_merge_size),
        "cu_seqlens": vision_utils.get_vision_cu_seqlens(grids),
    }
    inputs["max_seqlen"] = int(inputs["cu_seqlens"].diff().max())
    if hasattr(encoder, "window_size"):
        sizes = encoder.spatial_merge_size, encoder.window_size, encoder.patch_size
        inputs["window_index"], inputs["cu_window_seqlens"] = vision_utils.get_vision_window_index(grids, *sizes)
        inputs["max_window_seqlen"] = int(inputs["cu_window_seqlens"].diff().max())
    if hasattr(encoder, "interpolation_mode"):
        options = {"mode": encoder.interpolation_mode, "align_corners": encoder.interpolation_align_corners}
        sizes = encoder.num_grid_per_side, encoder.config.spatial_merge_size
        inputs["interp_indices"], inputs["interp_weights"] = vision_utils.get_vision_interpolation_indices_and_weights(
            grids, num_grid_per_side=sizes[0], spatial_merge_size=sizes[1], **options
        )
    return inputs


def dummy_image(model: PreTrainedModel) -> tuple[Tensor, tuple[int, int, int]]:
    """Patches and grid of a black image, which a rank without images encodes to take part in FSDP's collectives."""
    vision = model.config.vision_config
    patch_dim = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    frames, rows, columns = DUMMY_GRID
    return torch.zeros(frames * rows * columns, patch_dim), DUMMY_GRID


def forward_packed(
    model: PreTrainedModel, batch: PackedBatch, pixel_values: Tensor | None, grids: Sequence[Sequence[int]] | None
) -> Tensor:
    """Last hidden states [T, D] of a packed row; arguments as of ResponseLogProbs.forward."""
    embeds = model.get_input_embeddings()(batch.input_ids).unsqueeze(0)  # [1, T, D]
    if vision_encoder(model) is None:
        return model.model(
            inputs_embeds=embeds, position_ids=batch.position_ids[:1], use_cache=False, layout=batch.layout
        ).last_hidden_state[0]
    inputs: dict[str, Any] = {}
    if pixel_values is not None:
        embeds, inputs = _merge_image_features(model, batch, embeds, pixel_values, grids or ())
    return model.model.language_model(
        inputs_embeds=embeds,
        position_ids=batch.position_ids.unsqueeze(1),
        use_cache=False,
        layout=batch.layout,
        **inputs,
    ).last_hidden_state[0]


def _merge_image_features(
    model: PreTrainedModel, batch: PackedBatch, embeds: Tensor, pixel_values: Tensor, grids: Sequence[Sequence[int]]
) -> tuple[Tensor, dict[str, Any]]:
    """Embeddings [1, T, D] with features at the image and video tokens, and the decoder's further inputs.

    Qwen3-VL adds features of middle encoder layers to its first decoder layers ("deepstack", arXiv 2406.04334).
    """
    grid_table = torch.tensor(grids)
    metadata = encoder_inputs(vision_encoder(model), grid_table)
    metadata = {k: to_device(v, embeds.device) if isinstance(v, Tensor) else v for k, v in metadata.items()}
    encoded = model.model.get_image_features(pixel_values, grid_table, **metadata)
    features = encoded.pooler_output  # per image [tokens, D]
    deep_layers = getattr(encoded, "deepstack_features", None) or []  # per layer [tokens of all images, D]
    if not batch.image_ids:
        for feature in (*features, *deep_layers):
            embeds = embeds + 0.0 * feature.sum()
        return embeds, {}
    numbers = list(dict.fromkeys(batch.image_ids))
    once = len(features) < len(batch.image_ids)
    sizes = [len(feature) for feature in features]

    def per_block(per_image: Any) -> Tensor:
        return torch.cat([per_image[numbers.index(n) if once else i] for i, n in enumerate(batch.image_ids)])

    config = model.config
    is_image_token = (batch.input_ids == config.image_token_id) | (batch.input_ids == config.video_token_id)
    states = per_block(features).to(embeds.dtype)
    # By index: the backward pass of masked_scatter syncs with the GPU to count elements.
    index = is_image_token.nonzero_static(size=len(states)).squeeze(1)
    embeds = embeds.index_copy(1, index, states.unsqueeze(0))
    if not deep_layers:
        return embeds, {}
    return embeds, {
        "visual_pos_masks": is_image_token.view(1, -1),
        "deepstack_visual_embeds": [per_block(layer.split(sizes)) for layer in deep_layers],
    }

"""The model classes that can be trained, and where each keeps its tower, its decoder and its image features.

Letters as in batching.py: T tokens of a packed row; D hidden size.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, vision_utils

from verl.batching import PackedBatch, send
from verl.config import Config, ConfigError

VISION_CLASSES = (
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
)
TEXT_CLASSES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM")
STAND_IN_GRID = (1, 4, 4)  # smallest image that any window layout accepts


def read_config(
    path: str,
    trust_remote_code: bool = False,
    overrides: Mapping[str, Any] | None = None,
    section: str = "worker.actor.model",
) -> PretrainedConfig:
    """The model's config.json with the overrides in it.

    Args:
        path: folder or hub name.
        trust_remote_code: whether code that comes with the model may run.
        overrides: see override_config.
        section: of the keys that messages name.

    Raises:
        ConfigError: the config cannot be read, or the forward pass of this trainer does not fit the model.
    """
    key = f"{section}.model_path = {path!r}"
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError([f"{key}: its config.json cannot be read: {error}"]) from error
    config = override_config(config, overrides or {}, f"{section}.override_config")
    names = config.architectures or ["no class"]
    if names[0] not in VISION_CLASSES + TEXT_CLASSES:
        supported = ", ".join(VISION_CLASSES + TEXT_CLASSES)
        raise ConfigError([f"{key}: its config.json names {names[0]}; supported are {supported}"])
    if _slides(config):
        raise ConfigError(
            [f"{key}: its layers attend within a sliding window, training to everything; set use_sliding_window=false"]
        )
    return config


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
    """The same as vLLM calls it: also with a bare config, to find out whether the architecture is another."""
    return config if type(config) is PretrainedConfig else override_config(config, overrides)


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class of transformers that a config of read_config names."""
    names: Any = config.architectures
    return getattr(transformers, names[0])


def critic_path(config: Config) -> str:
    """Where the critic's model comes from: its own path, or the actor's."""
    return config.worker.critic.model.model_path or config.worker.actor.model.model_path


def _slides(config: PretrainedConfig) -> bool:
    return "sliding_attention" in (getattr(config.get_text_config(), "layer_types", None) or ())


def vision_tower(model: PreTrainedModel) -> nn.Module | None:
    """The part that encodes images; None in a text model."""
    return getattr(model.model, "visual", None)


def decoder(model: PreTrainedModel) -> Any:
    """The part with the `layers` that read the prompt and write."""
    return getattr(model.model, "language_model", model.model)


def tower_tables(tower: Any, grids: Tensor) -> dict[str, Any]:
    """What a tower would derive from the grids of its images in its forward pass, waiting for the GPU at each step.

    Args:
        tower: of any family.
        grids: [images, 3] on the CPU.

    Returns:
        Keyword arguments of transformers' get_image_features.
    """
    tables: dict[str, Any] = {
        "position_ids": vision_utils.get_vision_position_ids(grids, tower.spatial_merge_size),
        "cu_seqlens": vision_utils.get_vision_cu_seqlens(grids),
    }
    tables["max_seqlen"] = int(tables["cu_seqlens"].diff().max())
    if hasattr(tower, "window_size"):
        sizes = tower.spatial_merge_size, tower.window_size, tower.patch_size
        tables["window_index"], tables["cu_window_seqlens"] = vision_utils.get_vision_window_index(grids, *sizes)
        tables["max_window_seqlen"] = int(tables["cu_window_seqlens"].diff().max())
    if hasattr(tower, "interpolation_mode"):
        options = {"mode": tower.interpolation_mode, "align_corners": tower.interpolation_align_corners}
        sizes = tower.num_grid_per_side, tower.config.spatial_merge_size
        tables["interp_indices"], tables["interp_weights"] = vision_utils.get_vision_interpolation_indices_and_weights(
            grids, num_grid_per_side=sizes[0], spatial_merge_size=sizes[1], **options
        )
    return tables


def stand_in_image(model: PreTrainedModel) -> tuple[Tensor, tuple[int, int, int]]:
    """Patches and grid of a black image: what a rank without images runs to keep in step with the others."""
    vision = model.config.vision_config
    patch_dim = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    frames, rows, columns = STAND_IN_GRID
    return torch.zeros(frames * rows * columns, patch_dim), STAND_IN_GRID


def decode(
    model: PreTrainedModel, batch: PackedBatch, pixel_values: Tensor | None, grids: Sequence[Sequence[int]] | None
) -> Tensor:
    """Hidden states [T, D] behind the last layer of a packed row; arguments as of ResponseLogProbs."""
    embeds = model.get_input_embeddings()(batch.input_ids).unsqueeze(0)  # [1, T, D]
    if vision_tower(model) is None:
        return model.model(
            inputs_embeds=embeds, position_ids=batch.position_ids[:1], use_cache=False, layout=batch.layout
        ).last_hidden_state[0]
    inputs: dict[str, Any] = {}
    if pixel_values is not None:
        embeds, inputs = _place_images(model, batch, embeds, pixel_values, grids or ())
    return model.model.language_model(
        inputs_embeds=embeds,
        position_ids=batch.position_ids.unsqueeze(1),
        use_cache=False,
        layout=batch.layout,
        **inputs,
    ).last_hidden_state[0]


def _place_images(
    model: PreTrainedModel, batch: PackedBatch, embeds: Tensor, pixel_values: Tensor, grids: Sequence[Sequence[int]]
) -> tuple[Tensor, dict[str, Any]]:
    """Embeddings [1, T, D] with each image's features in its places, and what a decoder takes beside them.

    Qwen3-VL adds features of middle layers of its tower to its first decoder layers ("deepstack", arXiv 2406.04334).
    """
    grid_table = torch.tensor(grids)
    tables = tower_tables(vision_tower(model), grid_table)
    tables = {k: send(v, embeds.device) if isinstance(v, Tensor) else v for k, v in tables.items()}
    encoded = model.model.get_image_features(pixel_values, grid_table, **tables)
    features = encoded.pooler_output  # per image [tokens, D]
    deep_layers = getattr(encoded, "deepstack_features", None) or []  # per layer [tokens of all images, D]
    if not batch.image_ids:
        for feature in (*features, *deep_layers):
            embeds = embeds + 0.0 * feature.sum()
        return embeds, {}
    numbers = list(dict.fromkeys(batch.image_ids))
    once = len(features) < len(batch.image_ids)
    sizes = [len(feature) for feature in features]

    def shown(per_image: Any) -> Tensor:
        return torch.cat([per_image[numbers.index(n) if once else i] for i, n in enumerate(batch.image_ids)])

    places = batch.input_ids == model.config.image_token_id
    states = shown(features).to(embeds.dtype)
    # By index: the backward pass of a masked scatter waits for the GPU to count what it gathers.
    index = places.nonzero_static(size=len(states)).squeeze(1)
    embeds = embeds.index_copy(1, index, states.unsqueeze(0))
    if not deep_layers:
        return embeds, {}
    return embeds, {
        "visual_pos_masks": places.view(1, -1),
        "deepstack_visual_embeds": [shown(layer.split(sizes)) for layer in deep_layers],
    }

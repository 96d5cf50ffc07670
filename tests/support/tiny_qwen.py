"""Models of a few thousand random parameters of every family, for tests that need the real class, nothing learned."""

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, Qwen2_5_VLConfig

IMAGE_TOKEN, VISION_START, VISION_END = 90, 91, 92
TOKENS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": 89,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
PATCH_DIM = 3 * 2 * 14 * 14
TEXT = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "bos_token_id": 93,
    "eos_token_id": 94,
    "pad_token_id": 95,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
EXPERTS |= {"mlp_only_layers": [1], "norm_topk_prob": True}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
TOWER = {"depth": 2, "hidden_size": 64, "num_heads": 2, "spatial_merge_size": 2, "temporal_patch_size": 2}
HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "num_hidden_layers": 3}
HYBRID |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_conv_kernel_dim": 4}
HYBRID |= {"linear_key_head_dim": 32, "linear_value_head_dim": 32, "head_dim": 32}
VISION_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
FAMILIES = (*VISION_FAMILIES, "qwen2", "qwen3", "qwen3_5_text")


def tiny_config(tie_word_embeddings: bool = False) -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(**config_arguments("qwen2_5_vl", tie_word_embeddings))


def config_arguments(family: str, tie_word_embeddings: bool) -> dict[str, Any]:
    """Arguments of the family's configuration class."""
    tied = {"tie_word_embeddings": tie_word_embeddings}
    if family == "qwen2":
        return TEXT | tied | {"rope_parameters": ROPE}
    if family == "qwen3":
        return TEXT | tied | {"rope_parameters": ROPE, "head_dim": 64}  # heads x their size is not the hidden size
    if family.startswith("qwen3_5"):
        return _hybrid_arguments(family, tied)
    sections: dict[str, Any] = {"mrope_section": [4, 6, 6]}
    text, tower = TEXT | tied, TOWER | {"patch_size": 14}
    if family == "qwen2_vl":
        tower = {key: value for key, value in tower.items() if key != "hidden_size"}
        tower |= {"embed_dim": 64, "hidden_size": 64, "mlp_ratio": 1}
    elif family == "qwen2_5_vl":
        tower |= {"intermediate_size": 64, "out_hidden_size": 64, "window_size": 56, "fullatt_block_indexes": [1]}
    else:
        sections["mrope_interleaved"] = True
        text |= {"head_dim": 32, "num_hidden_layers": 3}  # two of them after features of the tower were added
        tower |= {"intermediate_size": 64, "out_hidden_size": 64, "patch_size": 16, "num_position_embeddings": 16}
        tower |= {"deepstack_visual_indexes": [0, 1]}
        if family == "qwen3_vl_moe":
            text |= EXPERTS
    return {"text_config": text | {"rope_parameters": ROPE | sections}, "vision_config": tower} | TOKENS | tied


def _hybrid_arguments(family: str, tied: dict[str, bool]) -> dict[str, Any]:
    """Arguments of Qwen3.5's configurations: half of each head is rotated."""
    rope = ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = TEXT | HYBRID | tied | {"rope_parameters": rope}
    if "moe" in family:
        text |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        text |= {"shared_expert_intermediate_size": 48}
        del text["intermediate_size"]
    if family.endswith("_text"):
        return text
    tower = TOWER | {"intermediate_size": 64, "out_hidden_size": 64, "patch_size": 16, "num_position_embeddings": 16}
    return {"text_config": text, "vision_config": tower} | TOKENS | tied


CLASSES = {
    "qwen2_vl": ("Qwen2VLConfig", "Qwen2VLForConditionalGeneration"),
    "qwen2_5_vl": ("Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration"),
    "qwen3_vl": ("Qwen3VLConfig", "Qwen3VLForConditionalGeneration"),
    "qwen3_vl_moe": ("Qwen3VLMoeConfig", "Qwen3VLMoeForConditionalGeneration"),
    "qwen3_5": ("Qwen3_5Config", "Qwen3_5ForConditionalGeneration"),
    "qwen3_5_moe": ("Qwen3_5MoeConfig", "Qwen3_5MoeForConditionalGeneration"),
    "qwen3_5_text": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM"),
    "qwen3_5_moe_text": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
}


def tiny_model(seed: int = 0, tie_word_embeddings: bool = False, family: str = "qwen2_5_vl") -> PreTrainedModel:
    torch.manual_seed(seed)
    config_name, class_name = CLASSES[family]
    config = getattr(transformers, config_name)(**config_arguments(family, tie_word_embeddings))
    model = getattr(transformers, class_name)(config)
    for parameter in model.parameters():  # large enough for attention and logits to be far from uniform
        parameter.data.mul_(4.0 if parameter.dim() > 1 else 1.0)
    return model


def patch_dim(family: str) -> int:
    """Values of one patch."""
    return 3 * 2 * 16 * 16 if family.startswith(("qwen3_vl", "qwen3_5")) else PATCH_DIM

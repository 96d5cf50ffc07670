"""A Qwen2.5-VL of a few thousand random parameters, for tests that need the real class and nothing learned."""

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

IMAGE_TOKEN, VISION_START, VISION_END = 90, 91, 92
PATCH_DIM = 3 * 2 * 14 * 14


def tiny_config(tie_word_embeddings: bool = False) -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=96,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=512,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            bos_token_id=93,
            eos_token_id=94,
            pad_token_id=95,
            tie_word_embeddings=tie_word_embeddings,
        ),
        vision_config=dict(
            depth=2,
            hidden_size=64,
            intermediate_size=64,
            num_heads=2,
            out_hidden_size=64,
            patch_size=14,
            spatial_merge_size=2,
            temporal_patch_size=2,
            window_size=56,
            fullatt_block_indexes=[1],
        ),
        image_token_id=IMAGE_TOKEN,
        video_token_id=89,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=tie_word_embeddings,
    )


def tiny_model(seed: int = 0, **kwargs) -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(tiny_config(**kwargs))
    for parameter in model.parameters():  # large enough for attention and logits to be far from uniform
        parameter.data.mul_(4.0 if parameter.dim() > 1 else 1.0)
    return model

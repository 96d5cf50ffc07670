"""Models with random weights of published shapes, for benchmarks: their folders, and the weights if need be."""

import multiprocessing
import shutil
from pathlib import Path
from typing import Any

TOKENIZER_FOLDER = "configs/toy_model"

# Qwen2.5-VL-3B-Instruct's published shape.
RANDOM_MODELS: dict[str, dict[str, Any]] = {
    "random_qwen2_5_vl_3b": {
        "text_config": {
            "vocab_size": 151_936,
            "hidden_size": 2048,
            "intermediate_size": 11_008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128_000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            "layer_types": ["full_attention"] * 36,
        },
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    },
    # Qwen2.5-VL-7B-Instruct's.
    "random_qwen2_5_vl_7b": {
        "text_config": {
            "vocab_size": 152_064,
            "hidden_size": 3584,
            "intermediate_size": 18_944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 128_000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            "layer_types": ["full_attention"] * 28,
        },
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        "tie_word_embeddings": False,
    },
    # Qwen3-VL-30B-A3B-Instruct's.
    "random_qwen3_vl_30b_a3b": {
        "text_config": {
            "vocab_size": 151_936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "max_position_embeddings": 262_144,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        "vision_config": {
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "patch_size": 16,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        "tie_word_embeddings": False,
    },
    # Qwen3.5-4B's.
    "random_qwen3_5_4b": {
        "text_config": {
            "vocab_size": 248_320,
            "hidden_size": 2560,
            "intermediate_size": 9216,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_conv_kernel_dim": 4,
            "mamba_ssm_dtype": "float32",
            "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 8,
            "max_position_embeddings": 262_144,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e7,
                "partial_rotary_factor": 0.25,
                "mrope_section": [11, 11, 10],
                "mrope_interleaved": True,
            },
        },
        "vision_config": {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "out_hidden_size": 2560,
            "patch_size": 16,
            "num_position_embeddings": 2304,
        },
        "tie_word_embeddings": True,
    },
}


def describe_random_model(folder: Path) -> None:
    """Creates a model folder without weights: the shape in RANDOM_MODELS and the toy model's tokenizer."""
    from transformers import AutoConfig

    folder.mkdir(parents=True, exist_ok=True)
    for part in Path(TOKENIZER_FOLDER).iterdir():
        if part.suffix != ".safetensors":
            shutil.copy(part, folder)
    config = AutoConfig.from_pretrained(TOKENIZER_FOLDER)
    shape = RANDOM_MODELS[folder.name]
    if "patch_size" in shape["vision_config"]:
        config = _describe_third(folder, config, shape)
    else:
        config.tie_word_embeddings = shape.get("tie_word_embeddings", config.tie_word_embeddings)
        config.text_config.tie_word_embeddings = config.tie_word_embeddings
        for name in ("text_config", "vision_config"):
            for key, value in shape[name].items():
                setattr(getattr(config, name), key, value)
    config.save_pretrained(folder)


def _describe_third(folder: Path, toy: Any, shape: dict[str, Any]) -> Any:
    """The config of a Qwen3-VL or Qwen3.5 with the toy's tokens; writes its processor, whose patches are larger."""
    from transformers import AutoProcessor, Qwen3_5Config, Qwen3VLMoeConfig, Qwen3VLProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    known: Any = AutoProcessor.from_pretrained(TOKENIZER_FOLDER)
    image_processor = known.image_processor
    image_processor.patch_size = shape["vision_config"]["patch_size"]
    template = known.chat_template or known.tokenizer.chat_template
    Qwen3VLProcessor(
        image_processor, known.tokenizer, Qwen3VLVideoProcessor(), chat_template=template
    ).save_pretrained(folder)
    tokens = {key: value for key, value in toy.to_dict().items() if key.endswith("_token_id") and value is not None}
    has_experts = "num_experts" in shape["text_config"]
    config_class = Qwen3VLMoeConfig if has_experts else Qwen3_5Config
    config = config_class(**{**tokens, **shape}, dtype="bfloat16")
    config.architectures = [config_class.__name__.replace("Config", "ForConditionalGeneration")]
    return config


def draw_weights(folder: Path) -> None:
    """Writes random bf16 weights for a model folder, in a subprocess that frees the GPU."""
    if list(folder.glob("*.safetensors")):
        return
    drawing = multiprocessing.get_context("spawn").Process(target=_draw, args=(folder,))
    drawing.start()
    drawing.join()
    if drawing.exitcode:
        raise SystemExit(f"{folder.name}: its weights could not be drawn")


def _draw(folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    describe_random_model(folder)  # as the next run finds it, whose engine would compile for another configuration

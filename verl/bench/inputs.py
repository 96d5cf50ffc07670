"""Benchmark inputs: models with random weights of published shapes, random images, and a dummy reward."""

import io
import multiprocessing
import shutil
import zlib
from pathlib import Path
from statistics import NormalDist
from typing import Any

TOKENIZER_FOLDER = "configs/toy_model"
FILLER = " red"

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
}


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


def describe_random_model(folder: Path) -> None:
    """Creates a model folder without weights: the shape in RANDOM_MODELS and the toy model's tokenizer."""
    from transformers import AutoConfig

    folder.mkdir(parents=True, exist_ok=True)
    for part in Path(TOKENIZER_FOLDER).iterdir():
        if part.suffix != ".safetensors":
            shutil.copy(part, folder)
    config = AutoConfig.from_pretrained(TOKENIZER_FOLDER)
    shape = RANDOM_MODELS[folder.name]
    if "num_experts" in shape["text_config"]:
        config = _describe_qwen3_vl(folder, config, shape)
    else:
        config.tie_word_embeddings = shape.get("tie_word_embeddings", config.tie_word_embeddings)
        config.text_config.tie_word_embeddings = config.tie_word_embeddings
        for name in ("text_config", "vision_config"):
            for key, value in shape[name].items():
                setattr(getattr(config, name), key, value)
    config.save_pretrained(folder)


def _describe_qwen3_vl(folder: Path, toy: Any, shape: dict[str, Any]) -> Any:
    """The config of a Qwen3-VL with experts and the toy's tokens; writes its processor, whose patches are larger."""
    from transformers import AutoProcessor, Qwen3VLMoeConfig, Qwen3VLProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    known: Any = AutoProcessor.from_pretrained(TOKENIZER_FOLDER)
    image_processor = known.image_processor
    image_processor.patch_size = shape["vision_config"]["patch_size"]
    template = known.chat_template or known.tokenizer.chat_template
    Qwen3VLProcessor(
        image_processor, known.tokenizer, Qwen3VLVideoProcessor(), chat_template=template
    ).save_pretrained(folder)
    tokens = {key: value for key, value in toy.to_dict().items() if key.endswith("_token_id") and value is not None}
    config = Qwen3VLMoeConfig(**{**tokens, **shape}, dtype="bfloat16")
    config.architectures = ["Qwen3VLMoeForConditionalGeneration"]
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


def random_picture(rng: Any, size: tuple[int, int]) -> bytes:
    """A JPEG file of random blots."""
    from PIL import Image

    buffer = io.BytesIO()
    coarse = rng.integers(0, 256, (size[1] // 16 + 1, size[0] // 16 + 1, 3), dtype="uint8")
    Image.fromarray(coarse).resize(size).save(buffer, "JPEG")
    return buffer.getvalue()


def write_rows(path: Path, processor: Any, data: Any, size: tuple[int, int], num_tokens: int) -> None:
    """Writes a parquet file of rows with a random image and a prompt of exactly so many tokens."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from verl.data.dataset import RLHFDataset

    rng = np.random.default_rng(0)

    def row(text: str) -> dict[str, Any]:
        picture = {"bytes": random_picture(rng, size), "path": None}
        return {"problem": text, "answer_option_text": "-", "images": [picture]}

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([row("<image>")]), path)
    limits = {"min_pixels": data.min_pixels, "max_pixels": data.max_pixels, "resize_first": data.resize_first}
    missing = num_tokens - len(RLHFDataset(str(path), processor, **limits)[0].ids)
    if missing < 0:
        raise SystemExit(f"the image alone takes {num_tokens - missing} tokens; raise data.max_prompt_length")
    rows = [row("<image>" + FILLER * missing) for _ in range(data.rollout_batch_size)]
    pq.write_table(pa.Table.from_pylist(rows), path)

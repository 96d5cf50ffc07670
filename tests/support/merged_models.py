"""Tiny models as a checkpoint holds them, and the merged folder read back."""

from pathlib import Path

import torch
from torch.distributed import checkpoint
from transformers import AutoModelForImageTextToText, GenerationConfig, PreTrainedModel

from tests.support import tiny_qwen
from tests.support.tiny_qwen import IMAGE_TOKEN, VISION_END, VISION_START


def tiny_model(is_tied: bool = True, family: str = "qwen2_5_vl") -> PreTrainedModel:
    model = tiny_qwen.tiny_model(tie_word_embeddings=is_tied, family=family).eval()
    model.config.architectures = [type(model).__name__]
    return model


@torch.no_grad()
def image_logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.tensor([[1, 2, VISION_START, *[IMAGE_TOKEN] * 4, VISION_END, 5, 6]])
    values = tiny_qwen.patch_dim(model.config.model_type)
    pixels = torch.randn(16, values, generator=torch.Generator().manual_seed(1))
    grid = torch.tensor([[1, 4, 4]])
    mask, kinds = torch.ones_like(ids), (ids == IMAGE_TOKEN).int()
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels.to(model.dtype), "image_grid_thw": grid}
    return model(**inputs, mm_token_type_ids=kinds).logits


def save_huggingface_part(model: PreTrainedModel, actor_dir: Path) -> None:
    hf_dir = actor_dir / "huggingface"
    hf_dir.mkdir(parents=True)
    model.config.save_pretrained(hf_dir)
    GenerationConfig(eos_token_id=2, repetition_penalty=1.05).save_pretrained(hf_dir)
    (hf_dir / "tokenizer.json").write_text("{}")


def save_checkpoint(model, actor_dir: Path, change=lambda state: state) -> Path:
    save_huggingface_part(model, actor_dir)
    state = change(dict(model.state_dict()))
    checkpoint.save({"model": state, "optimizer": {"lr": 0.1}}, checkpoint_id=actor_dir, no_dist=True)
    return actor_dir


def load_merged(actor_dir: Path) -> PreTrainedModel:
    model, info = AutoModelForImageTextToText.from_pretrained(
        actor_dir / "huggingface", output_loading_info=True, dtype="auto"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()

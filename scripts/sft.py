#!/usr/bin/env python3
"""Supervised baseline: LoRA on the questions and the letter and text of their answers, without any reasoning.

    python3 scripts/sft.py --model_path Qwen/Qwen2.5-VL-3B-Instruct --output_dir runs/sft_3b [--OPTION VALUE ...]

Every option of transformers' TrainingArguments may be given; the defaults below are the paper's. The loss is that of
the answer alone: tokens of the prompt are masked. Writes OUTPUT_DIR/adapter and the merged model
OUTPUT_DIR/huggingface. A run that is started again goes on from its last checkpoint.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout's packages before installed ones

from verl.dataset import Prompt, RLHFDataset
from verl.qwen_vl import decode_image

ROOT = Path(__file__).resolve().parents[1]
IGNORED = -100  # no loss where a label has this value


@dataclass
class SftArguments(TrainingArguments):
    """transformers' own, with the paper's values."""

    output_dir: str = field(default="runs/sft")
    num_train_epochs: float = 3
    learning_rate: float = 1e-4
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = field(default=0.1, metadata={"help": "below 1: as a share of all steps"})
    per_device_train_batch_size: int = 4
    gradient_accumulation_steps: int = field(
        default=2, metadata={"help": "4 GPUs x 4 rows x 2: 32 rows a step, 645 steps in three epochs"}
    )
    bf16: bool = True
    gradient_checkpointing: bool = True
    logging_steps: float = 10
    save_strategy: str = "epoch"
    report_to: str = "tensorboard"
    remove_unused_columns: bool = field(default=False, metadata={"help": "rows are prompts, not columns"})
    model_path: str = "Qwen/Qwen2.5-VL-3B-Instruct"
    train_files: str = "hunarbatra/STVQA-7K@train"
    prompt_key: str = "question_with_options"
    answer_key: str = "answer_option_text_only"
    image_key: str = "images"
    format_prompt: str = str(ROOT / "configs" / "prompts" / "answer_only.jinja")
    max_length: int = field(default=2048, metadata={"help": "rows with longer prompts are left out"})
    max_pixels: int = field(default=589_824, metadata={"help": "768 x 768, 752 tokens of Qwen2.5-VL"})
    lora_rank: int = 8
    lora_alpha: int = 16


class Collator:
    """Prompts with their answers -> the model's inputs, right-padded, with labels for the answers alone."""

    def __init__(self, processor: Any, max_pixels: int):
        self.processor = processor
        self.max_pixels = max_pixels

    def __call__(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        tokenizer = self.processor.tokenizer
        ids, labels, pictures = [], [], []
        for prompt in prompts:
            answer = tokenizer(prompt.ground_truth, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            ids.append(torch.cat([prompt.ids, torch.tensor(answer)]))
            labels.append(torch.cat([torch.full_like(prompt.ids, IGNORED), torch.tensor(answer)]))
            pictures += [decode_image(image) for image in prompt.images]
        input_ids = pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
        lengths = torch.tensor([len(row) for row in ids]).unsqueeze(1)
        batch = {
            "input_ids": input_ids,
            "attention_mask": (torch.arange(input_ids.shape[1]) < lengths).long(),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            "mm_token_type_ids": (input_ids == self.processor.image_token_id).int(),
        }
        if not pictures:
            return batch
        size = {"min_pixels": self.processor.image_processor.size["shortest_edge"], "max_pixels": self.max_pixels}
        images = self.processor.image_processor(images=pictures, return_tensors="pt", **size)
        return batch | {key: images[key] for key in ("pixel_values", "image_grid_thw")}


def train(options: SftArguments) -> None:
    """Trains, and writes the adapter and the merged model."""
    processor = AutoProcessor.from_pretrained(options.model_path)
    rows = RLHFDataset(
        options.train_files,
        processor,
        prompt_key=options.prompt_key,
        answer_key=options.answer_key,
        image_key=options.image_key,
        format_prompt=options.format_prompt,
        max_prompt_length=options.max_length,
        max_pixels=options.max_pixels,
    )
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    model: Any = AutoModelForImageTextToText.from_pretrained(options.model_path, dtype=dtype)
    lora = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        target_modules="all-linear",
        exclude_modules=r".*visual.*",
        task_type="CAUSAL_LM",
    )
    model = cast(Any, get_peft_model(model, lora))
    model.enable_input_require_grads()
    trainer = Trainer(model, options, Collator(processor, options.max_pixels), rows)
    output = Path(options.output_dir)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(output)) if output.is_dir() else None)
    if trainer.is_world_process_zero():
        model.save_pretrained(str(output / "adapter"))
        model.merge_and_unload().save_pretrained(output / "huggingface")
        processor.save_pretrained(output / "huggingface")


def main() -> int:
    parser = HfArgumentParser(cast(Any, SftArguments), description="Supervised baseline with LoRA.")
    try:
        train(*parser.parse_args_into_dataclasses())
    except (ValueError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

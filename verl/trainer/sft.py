"""Training of the supervised baseline: prompts and answers to batches, LoRA, adapter and merged model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from spatialthinker.storage.images import load_image
from verl.data.dataset import Prompt, RLHFDataset, check_answer
from verl.trainer.sft_options import SftOptions

IGNORED = -100  # no loss where a label has this value


@dataclass
class SftArguments(SftOptions, TrainingArguments):
    """transformers' own, with the paper's values."""


class Collator:
    """Prompts with their answers -> the model's inputs, right-padded, with labels for the answers alone."""

    def __init__(self, processor: Any, max_pixels: int):
        self.processor = processor
        self.max_pixels = max_pixels

    def __call__(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        tokenizer = self.processor.tokenizer
        ids, labels, pictures = [], [], []
        for prompt in prompts:
            answer = tokenizer(str(prompt.ground_truth), add_special_tokens=False)["input_ids"] + [
                tokenizer.eos_token_id
            ]
            ids.append(torch.cat([prompt.ids, torch.tensor(answer)]))
            labels.append(torch.cat([torch.full_like(prompt.ids, IGNORED), torch.tensor(answer)]))
            pictures += [load_image(image) for image in prompt.images]
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
        row_check=check_answer,
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

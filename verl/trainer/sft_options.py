"""Options of the supervised baseline, apart from transformers so that `--help` costs no import of it."""

from argparse import ArgumentParser
from dataclasses import dataclass, field, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class SftOptions:
    """The paper's values of transformers' TrainingArguments, and the options of this baseline."""

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


def build_help_parser(description: str) -> ArgumentParser:
    """A parser of these options alone, for its help text."""
    parser = ArgumentParser(description=description, epilog="All options of TrainingArguments are taken too.")
    for option in fields(SftOptions):
        note = " ".join(filter(None, (option.metadata.get("help"), f"(default: {option.default})")))
        parser.add_argument(f"--{option.name}", metavar="VALUE", help=note.replace("%", "%%"))
    return parser

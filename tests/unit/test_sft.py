"""The supervised baseline on the toy model: the loss of the answers alone, an adapter and a merged model."""

from pathlib import Path

import pytest
import sft
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser

from spatialthinker.schema import parquet_path, write_parquet
from spatialthinker.synthetic import generate
from verl.data.dataset import RLHFDataset
from verl.trainer import sft as sft_training

ROOT = Path(__file__).parents[2]
TOY_MODEL = str(ROOT / "configs" / "toy_model")


@pytest.fixture
def locator(tmp_path) -> str:
    write_parquet([row for _, row in generate(4, seed=3)], parquet_path(tmp_path / "data", "train"))
    return f"{tmp_path / 'data'}@train"


def test_only_the_answer_has_a_loss(locator):
    processor = AutoProcessor.from_pretrained(TOY_MODEL)
    prompts = list(
        RLHFDataset(
            locator,
            processor,
            prompt_key="question_with_options",
            answer_key="answer_option_text_only",
            format_prompt=str(ROOT / "configs" / "prompts" / "answer_only.jinja"),
        )
    )
    batch = sft_training.Collator(processor, max_pixels=589_824)(prompts)
    for row, prompt in enumerate(prompts):
        taught = batch["labels"][row][batch["labels"][row] != sft_training.IGNORED]
        assert processor.tokenizer.decode(taught[:-1]) == processor.tokenizer.decode(
            processor.tokenizer(prompt.ground_truth, add_special_tokens=False)["input_ids"]
        )
        assert int(taught[-1]) == processor.tokenizer.eos_token_id
        length = int(batch["attention_mask"][row].sum())
        assert batch["input_ids"][row, :length].tolist() == [*prompt.ids.tolist(), *taught.tolist()]
    model = AutoModelForImageTextToText.from_pretrained(TOY_MODEL, dtype=torch.float32)
    assert torch.isfinite(model(**batch).loss)


def test_training_moves_the_model_and_writes_it_merged(locator, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    output = tmp_path / "out"
    given = f"--model_path {TOY_MODEL} --output_dir {output} --train_files {locator} --max_pixels 12544 --bf16 false"
    given += " --use_cpu true --report_to none --max_steps 2 --per_device_train_batch_size 2 --learning_rate 1e-2"
    given += " --gradient_accumulation_steps 1 --disable_tqdm true"
    (options,) = HfArgumentParser(sft_training.SftArguments).parse_args_into_dataclasses(given.split())
    assert (options.num_train_epochs, options.lora_rank, options.lr_scheduler_type) == (3, 8, "cosine")
    sft_training.train(options)
    before = load_file(Path(TOY_MODEL) / "model.safetensors")
    after = load_file(output / "huggingface" / "model.safetensors")
    assert after.keys() == before.keys()
    moved = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert moved and not any("visual" in name for name in moved)
    assert (output / "adapter" / "adapter_model.safetensors").is_file()


def test_a_data_set_that_is_not_there_ends_with_one_message(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv", ["sft.py", "--model_path", TOY_MODEL, "--train_files", f"{tmp_path}@train", "--use_cpu", "true"]
    )
    assert sft.main() == 2
    assert "give path@split" in capsys.readouterr().err

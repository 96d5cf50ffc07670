import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spatialthinker.prompts import render_prompt
from spatialthinker.rewards import format_failure
from spatialthinker.shapes import DEFAULT_CANVAS, draw
from spatialthinker.synthetic import generate, gold_response

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "toy_model"
sys.path.append(str(ROOT / "scripts"))

from toy import model as toy_model  # noqa: E402
from toy import training as toy_training  # noqa: E402
from toy.rows import CELLS, Rows, careless_reply, chat_text  # noqa: E402

PAIRS = list(generate(45, seed=3))


@pytest.fixture(scope="module")
def processor():
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32).eval()


def test_tokenizer_is_short_and_lossless(processor):
    tokenizer = processor.tokenizer
    assert all(len(tokenizer(str(number)).input_ids) == 1 for number in range(113))
    assert all(len(tokenizer(text).input_ids) == 1 for text in toy_model.fixed_texts())
    for text in [gold_response(row) for _, row in PAIRS] + ["Überall {x: [1.5, -2]} <b>\n\n</b>  two  blanks 2026"]:
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text and len(ids) <= 110


@pytest.mark.parametrize("template", ["spatial_thinker_full", "spatial_thinker"])
def test_prompt_costs_at_most_ninety_tokens(processor, template):
    for puzzle, row in PAIRS[:9]:
        problem = render_prompt(template, row.question_with_options, 112, 112)
        image = draw(DEFAULT_CANVAS, puzzle.shapes)
        inputs = processor(text=[chat_text(processor, problem)], images=[image], return_tensors="pt")
        assert inputs.image_grid_thw.tolist() == [[1, 8, 8]]
        assert (inputs.input_ids == processor.image_token_id).sum() == CELLS
        assert inputs.input_ids.shape[1] <= 90


def test_chat_template_has_the_structure_of_qwen(processor):
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi."}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>Hi.<|im_end|>\n<|im_start|>assistant\n"
    )
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}]
    text = processor.apply_chat_template(turns)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n"


def test_weights_are_small_and_complete(model):
    assert (FOLDER / "model.safetensors").stat().st_size <= 8_000_000
    assert json.loads((FOLDER / "config.json").read_text())["dtype"] == "bfloat16"
    assert 2_000_000 <= sum(p.numel() for p in model.parameters()) <= 3_500_000
    text, vision = model.config.text_config, model.config.vision_config
    assert text.hidden_size // text.num_attention_heads == vision.hidden_size // vision.num_heads == 32
    assert sum(text.rope_parameters["mrope_section"]) == 16
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_training_forward_equals_the_models_own(processor, model):
    rows = Rows(9, 0, processor, 1)
    pixels, ids, labels, _ = rows.batch(torch.arange(9), "gold")
    images = [draw(DEFAULT_CANVAS, puzzle.shapes) for puzzle, _ in generate(9, seed=0)]
    features = processor.image_processor(images, return_tensors="pt")
    statistics = processor.image_processor.image_mean, processor.image_processor.image_std
    patches = toy_training.patchify(pixels, *statistics)
    torch.testing.assert_close(patches.flatten(0, 1), features.pixel_values, atol=1e-6, rtol=0)
    with torch.no_grad():
        hidden = toy_training.read(model, toy_training.see(model.model.visual, patches), ids)
        expected = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == processor.image_token_id).int(),
            **features,
        ).logits
    torch.testing.assert_close(model.lm_head(hidden), expected, atol=2e-3, rtol=1e-3)
    replies = [processor.tokenizer.decode(line[line >= 0]) for line in labels]
    assert replies == [gold_response(row) + "<|im_end|>" for _, row in generate(9, seed=0)]


def test_careless_teacher_reasons_rightly():
    rng = random.Random(0)
    replies = [(gold_response(row), careless_reply(row, rng)) for _, row in PAIRS for _ in range(20)]
    ticked = sum(gold[gold.index("<answer>") :] != reply[reply.index("<answer>") :] for gold, reply in replies)
    formed = sum(format_failure(reply) is None for _, reply in replies)
    assert 0.2 < ticked / len(replies) < 0.6 and 0.85 < formed / len(replies) < 0.97
    for gold, reply in replies:
        thoughts = re.findall("<think>(.*)</think>", reply, re.DOTALL)
        assert not thoughts or thoughts == re.findall("<think>(.*)</think>", gold, re.DOTALL)


def test_shipped_model_leaves_room_to_learn(processor, model):
    scores = toy_training.Examiner(processor, 45, torch.device("cpu")).measure(model)
    assert scores["format"] > 0.85
    assert 0.3 < scores["accuracy"] < 0.85
    assert 0.4 < scores["iou"] < 0.95


@pytest.mark.e2e
def test_builder_runs(tmp_path):
    sizes = {"steps": 2, "careless_steps": 1, "rows": 40, "batch": 8, "examine_every": 5, "examine_rows": 4}
    arguments = [part for key, value in sizes.items() for part in (f"--{key}", str(value))]
    command = [sys.executable, "scripts/build_toy_model.py", "--out", str(tmp_path), *arguments]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"})
    shipped = {file.name for file in FOLDER.iterdir()}
    assert shipped <= {file.name for file in tmp_path.iterdir()}
    assert (tmp_path / "tokenizer.json").read_bytes() == (FOLDER / "tokenizer.json").read_bytes()

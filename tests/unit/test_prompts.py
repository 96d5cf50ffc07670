import subprocess
import sys

import pytest

from spatialthinker.prompts import PROMPTS, parse_image_size, render_prompt

QUESTION = "Where is it? costs $5 {x}\nOptions:\n(A) here\n(B) there"
TAGS = ("observe", "scene", "think", "answer")


def test_training_prompt_keeps_the_contract():
    text = render_prompt("spatial_thinker_full", QUESTION, 640, 480)
    assert text.startswith("<image>") and text.count("<image>") == 1
    assert text.endswith("\n\nQ. " + QUESTION)
    assert text.count("Image size: (640 x 480)\n") == 1
    assert "(A) behind\n</answer>" in text
    for tag in TAGS:
        assert text.count(f"<{tag}>") == text.count(f"</{tag}>") == 2
    firsts = [text.index(f"<{tag}>") for tag in TAGS]
    assert firsts == sorted(firsts)


@pytest.mark.parametrize("name", PROMPTS)
def test_every_template_renders(name):
    text = render_prompt(name, QUESTION, 640, 480)
    assert "$width" not in text and "$question" not in text
    assert (QUESTION in text) == (name != "vision")


def test_answer_shape_is_literal():
    for name in ("reasoning", "spatial_thinker"):
        assert "<answer> ({correct_option}) {correct_answer} </answer>" in render_prompt(name, QUESTION, 1, 1)


def test_evaluation_prompt_states_the_size():
    assert parse_image_size(render_prompt("spatial_thinker", QUESTION, 640, 480)) == (640, 480)
    with pytest.raises(ValueError, match="states the image size"):
        render_prompt("spatial_thinker", QUESTION)


def test_unknown_template():
    with pytest.raises(ValueError, match="unknown prompt template 'full'.*spatial_thinker"):
        render_prompt("full", QUESTION)


@pytest.mark.parametrize("text", ["", "Image size: Unknown", "Image size: (1.5 x 2)", "Image size: 640 x 480"])
def test_parse_image_size_refuses(text):
    with pytest.raises(ValueError, match="Image size"):
        parse_image_size(text)


def test_import_is_light():
    heavy = "torch ray vllm transformers datasets spacy pyarrow"
    code = (
        f"import sys, spatialthinker.prompts, spatialthinker.schema; print({{*'{heavy}'.split()}} & {{*sys.modules}})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

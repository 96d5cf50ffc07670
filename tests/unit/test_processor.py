"""A row of any family becomes the tokens of the family's own processor; what cannot be trained is named."""

import io
import json

import pytest
import torch
from datasets import Dataset
from PIL import Image

from spatialthinker.synthetic import generate
from tests.support.tiny_model_folder import save_tiny_model
from tests.support.tiny_qwen import FAMILIES, VISION_FAMILIES
from verl.config.records import ConfigError
from verl.data.dataset import DataError, RLHFDataset
from verl.data.processor import TextProcessor, load_processor, pixel_limits, vision_token_ids
from verl.model.families import read_config
from verl.model.qwen_vl import image_patches, load_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: save_tiny_model(tmp_path_factory.mktemp(family), family=family) for family in FAMILIES}


def write_rows(folder, rows):
    path = folder / "rows.parquet"
    Dataset.from_list(rows).to_parquet(path)
    return str(path)


def image_rows(count=3):
    return [vars(row) | {"images": {"bytes": row.images, "path": None}} for _, row in generate(count, seed=5)]


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_tokens_positions_and_patches_are_the_familys_own(tmp_path, folders, family):
    processor, model = load_processor(str(folders[family])), load_model(str(folders[family]), torch.float32)
    rows = image_rows()
    second = rows[1] | {"images": [rows[1]["images"], rows[2]["images"]], "problem": "<image>" + rows[1]["problem"]}
    data = RLHFDataset(write_rows(tmp_path, [second]), processor, min_pixels=70 * 70)
    (prompt,) = list(data)
    content = [{"type": "image"}, {"type": "image"}]
    content.append({"type": "text", "text": second["problem"].replace("<image>", "")})
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    images = [Image.open(io.BytesIO(image["bytes"])).convert("RGB") for image in second["images"]]
    expected = processor(images=images, text=[text], return_tensors="pt", **data.pixel_limits)
    assert prompt.ids.tolist() == expected["input_ids"][0].tolist()
    pixels, grids = image_patches(images, processor.image_processor, **data.pixel_limits)
    assert torch.equal(torch.tensor(grids), expected["image_grid_thw"])
    assert torch.equal(torch.cat(pixels), expected["pixel_values"])
    kinds = (expected["input_ids"] == processor.image_token_id).int()
    positions, _ = model.model.get_rope_index(expected["input_ids"], kinds, image_grid_thw=torch.tensor(grids))
    assert torch.equal(prompt.positions, positions[:, 0])


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_text_model_reads_rows_without_images(tmp_path, folders, family):
    processor = load_processor(str(folders[family]))
    assert isinstance(processor, TextProcessor) and vision_token_ids(processor) == []
    rows = [{"problem": "1 + 1 = ?", "answer_option_text": "2"}]
    (prompt,) = list(RLHFDataset(write_rows(tmp_path, rows), processor))
    assert processor.tokenizer.decode(prompt.ids) == "<|im_start|>user\n1 + 1 = ?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.ids.tolist() == prompt.raw_ids
    assert torch.equal(prompt.positions, torch.arange(len(prompt.ids)).expand(3, -1))
    for broken in (image_rows(1), [{"problem": "<image>1 + 1 = ?", "answer_option_text": "2"}]):
        with pytest.raises(DataError, match="row 0.*the model reads none; set data.text_only=true"):
            RLHFDataset(write_rows(tmp_path, broken), processor)


def test_one_limit_of_pixels_leaves_the_other_to_the_image_processor(folders):
    processor = load_processor(str(folders["qwen3_vl"]))
    data_limits = {"min_pixels": 96 * 96, "max_pixels": 112 * 112}
    assert pixel_limits(processor, 96 * 96, None) == data_limits
    _, (grid,) = image_patches([Image.new("RGB", (32, 32))], processor.image_processor, **data_limits)
    assert grid == (1, 6, 6)


def change_config(folder, target, **changes):
    target.mkdir()
    config = json.loads((folder / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    return str(target)


def test_unsupported_models_are_named_with_what_is_supported(tmp_path, folders):
    other = change_config(folders["qwen2"], tmp_path / "other", architectures=["LlamaForCausalLM"])
    with pytest.raises(ConfigError, match="names LlamaForCausalLM; supported are .*Qwen3VLFor.*Qwen2ForCausalLM"):
        read_config(other)
    sliding = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": None}
    with pytest.raises(ConfigError, match="sliding window.*use_sliding_window=false"):
        read_config(change_config(folders["qwen2"], tmp_path / "sliding", **sliding))
    with pytest.raises(ConfigError, match="config.json cannot be read"):
        read_config(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        load_processor(other)

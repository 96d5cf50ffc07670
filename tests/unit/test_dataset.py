import io
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoProcessor

from spatialthinker.synthetic import generate
from verl.dataset import BatchOrder, DataError, RLHFDataset, collate_prompts
from verl.trainer.main import check_spatial_row

TOY_MODEL = Path(__file__).parents[2] / "configs" / "toy_model"


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(TOY_MODEL)


@pytest.fixture(scope="module")
def rows():
    return [vars(row) | {"images": {"bytes": row.images, "path": None}} for _, row in generate(6, seed=5)]


def write(folder: Path, rows: list[dict]) -> str:
    Dataset.from_list(rows).to_parquet(folder / "train-00000-of-00001.parquet")
    return f"{folder}@train"


def opened(folder, rows, processor, **options):
    options = {"row_check": check_spatial_row, "max_prompt_length": 512} | options
    return RLHFDataset(write(folder, rows), processor, **options)


def test_tokens_and_positions_are_the_processors_own(tmp_path, rows, processor):
    data = opened(tmp_path, rows, processor)
    assert len(data) == len(rows)
    for prompt, row in zip(data.prompts, rows, strict=True):
        content = [{"type": "image"}, {"type": "text", "text": row["problem"].removeprefix("<image>")}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        image = Image.open(io.BytesIO(row["images"]["bytes"])).convert("RGB")
        expected = processor(images=[image], text=[text], return_tensors="pt")
        assert prompt.ids.tolist() == expected["input_ids"][0].tolist()
        assert prompt.positions.shape == (3, len(prompt.ids))
        assert prompt.ground_truth == row["answer_option_text"]


def test_collated_prompts_are_padded_on_the_left(tmp_path, rows, processor):
    data = opened(tmp_path, rows, processor)
    batch = collate_prompts(data.prompts, pad_token_id=0)
    assert batch.batch["prompt_ids"].shape[0] == len(rows) == len(batch)
    for row, prompt in enumerate(data.prompts):
        mask = batch.batch["prompt_mask"][row]
        assert torch.equal(batch.batch["prompt_ids"][row][mask], prompt.ids)
        assert torch.equal(batch.batch["prompt_position_ids"][row][:, mask], prompt.positions)
        assert bool(mask[-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, "1 image places but the row has 0 images"),
        ({"images": {"bytes": b"no picture", "path": None}}, "cannot identify image"),
        ({"problem": "<image> Q. where?"}, "Image size"),
        ({"answer_option_text": "<scene>{broken</scene><answer>(A) on</answer>"}, "scene"),
        ({"answer_option_text": "(A) on"}, "scene"),
        ({"problem": "Image size: (112 x 112) Q. where?"}, "no <image>"),
    ],
)
def test_a_bad_row_is_named_when_the_set_is_opened(tmp_path, rows, processor, change, message):
    broken = [*rows[:2], rows[2] | change, *rows[3:]]
    with pytest.raises(DataError, match=rf"row 2 \(image_id {rows[2]['image_id']}\)") as caught:
        opened(tmp_path, broken, processor)
    assert message.lower() in str(caught.value).lower()


def test_overlong_prompts_are_left_out_or_named_but_never_cut(tmp_path, rows, processor, capsys):
    lengths = sorted(len(prompt.ids) for prompt in opened(tmp_path, rows, processor).prompts)
    limit = lengths[2]
    kept = opened(tmp_path, rows, processor, max_prompt_length=limit)
    assert 0 < len(kept) < len(rows)
    assert all(len(prompt.ids) <= limit for prompt in kept.prompts)
    assert f"over {limit} tokens" in capsys.readouterr().out
    with pytest.raises(DataError, match=f"data.max_prompt_length={limit}"):
        opened(tmp_path, rows, processor, max_prompt_length=limit, filter_overlong_prompts=False)
    with pytest.raises(DataError, match="no prompt is left"):
        opened(tmp_path, rows, processor, max_prompt_length=1)


def test_missing_column_and_missing_split_name_the_knob(tmp_path, rows, processor):
    with pytest.raises(DataError, match=r"no column 'nothing' \(data.answer_key\)"):
        opened(tmp_path, rows, processor, answer_key="nothing")
    write(tmp_path, rows)
    with pytest.raises(DataError, match=r"holds no test-\*.parquet"):
        RLHFDataset(f"{tmp_path}@test", processor)


def test_format_prompt_is_a_text_or_a_template_file(tmp_path, rows, processor):
    options = {"prompt_key": "question_with_options", "answer_key": "answer_option_text_only", "row_check": None}
    as_text = opened(tmp_path, rows, processor, format_prompt="<image> Think first.", **options)
    assert as_text[0].problem == "<image> Think first. " + rows[0]["question_with_options"]
    template = tmp_path / "prompt.jinja"
    template.write_text("<image>{{ content }}\nThink first.\n")
    as_file = opened(tmp_path, rows, processor, format_prompt=str(template), **options)
    assert as_file[0].problem == f"<image>{rows[0]['question_with_options']}\nThink first."


def test_exif_rotation_is_applied_to_the_grid(tmp_path, rows, processor):
    picture = Image.new("RGB", (112, 56), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    stream = io.BytesIO()
    picture.save(stream, "JPEG", exif=exif)
    turned = rows[0] | {"images": {"bytes": stream.getvalue(), "path": None}}
    data = opened(tmp_path, [turned], processor, min_pixels=56 * 112, max_pixels=56 * 112)
    upright = data[0].positions[:, data[0].ids == processor.image_token_id]
    assert int(upright[1].max() - upright[1].min()) == 3  # 112 px high: 4 merged rows
    assert int(upright[2].max() - upright[2].min()) == 1


def test_batch_order_is_a_function_of_seed_and_step():
    order = BatchOrder(10, 3, shuffle=True, seed=1)
    epochs = [[order.rows(epoch * 3 + i) for i in range(3)] for epoch in range(3)]
    for epoch in epochs:
        assert len({row for batch in epoch for row in batch}) == 9
    assert epochs[0] != epochs[1] != epochs[2]
    assert BatchOrder(10, 3, shuffle=True, seed=1).rows(7) == epochs[2][1]
    assert BatchOrder(10, 3, shuffle=True, seed=2).rows(7) != epochs[2][1]
    assert [BatchOrder(10, 3, False, 1).rows(i) for i in range(4)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 1, 2]]
    with pytest.raises(DataError, match="data.rollout_batch_size=11"):
        BatchOrder(10, 11, True, 1)

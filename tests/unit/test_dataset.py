import base64
import copy
import datetime
import io
import json
import math
import pickle
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoProcessor

from spatialthinker.storage.images import encode
from spatialthinker.synthetic import generate
from verl.config.loading import load_config
from verl.config.records import ConfigError
from verl.data.dataset import BatchOrder, DataError, RLHFDataset, check_answer, collate_prompts
from verl.data.processor import TextProcessor, load_run_processor
from verl.data.prompt_text import read_format_prompt
from verl.trainer.rewards import check_spatial_row

BOX = '<scene>{{"objects": [{{"id": "a.1", "bbox": [0, 0, {}, 50]}}]}}</scene><answer>(A) on</answer>'
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
    for prompt, row in zip(list(data), rows, strict=True):
        content = [{"type": "image"}, {"type": "text", "text": row["problem"].removeprefix("<image>")}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        image = Image.open(io.BytesIO(row["images"]["bytes"])).convert("RGB")
        expected = processor(images=[image], text=[text], return_tensors="pt")
        assert prompt.ids.tolist() == expected["input_ids"][0].tolist()
        assert prompt.positions.shape == (3, len(prompt.ids))
        assert prompt.ground_truth == row["answer_option_text"]


def test_collated_prompts_are_padded_on_the_left(tmp_path, rows, processor):
    data = opened(tmp_path, rows, processor)
    batch = collate_prompts(list(data), pad_token_id=0)
    assert batch.batch["prompt_ids"].shape[0] == len(rows) == len(batch)
    for row, prompt in enumerate(list(data)):
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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda row: {"problem": row["problem"].replace("(112 x 112)", "(640 x 480)")},
            "states an image of 640 x 480",
        ),
        (lambda row: {"answer_option_text": BOX.format(900)}, r"the box of a.1, [0, 0, 900, 50], leaves the image"),
        (lambda row: {"answer_option_text": BOX.format(112)}, None),
    ],
)
def test_boxes_in_another_frame_are_doubted(tmp_path, rows, processor, capsys, change, words):
    """They cost the reward of the boxes, and no other number of a run would show it."""
    data = opened(tmp_path, [*rows[:2], rows[2] | change(rows[2]), *rows[3:]], processor)
    printed = capsys.readouterr().out
    assert len(data) == len(rows) and len(data.warnings) == (words is not None)
    if words is not None:
        assert f"1 of {len(rows)} rows look wrong. First row 2 (image_id" in printed and words in printed


def test_overlong_prompts_are_left_out_or_named_but_never_cut(tmp_path, rows, processor, capsys):
    lengths = sorted(len(prompt.ids) for prompt in list(opened(tmp_path, rows, processor)))
    limit = lengths[2]
    kept = opened(tmp_path, rows, processor, max_prompt_length=limit)
    assert 0 < len(kept) < len(rows)
    assert all(len(prompt.ids) <= limit for prompt in list(kept))
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


@pytest.mark.parametrize(
    ("content", "text", "prompt"),
    [
        ("<image>What?", "Think first.", "<image> Think first. What?"),
        ("<image> What?", " Think first.\n", "<image> Think first.  What?"),
        ("What is <image>?", "Think first.", "<image> Think first. What is ?"),
        ("What?", "Think first.", "Think first. What?"),
        ("What? ", "Think first.\nTwice.", "Think first.\nTwice. What? "),
        ("<image><image>Same?", "Think first.", "<image><image> Think first. Same?"),
        ("<image>\n<image> and <image>?", "Think first.", "<image>\n<image> Think first.  and <image>?"),
        ("A: <image> B: <image>", "Think first.", "Think first. A: <image> B: <image>"),
        ("<image>What?", "Look <image> and think.", "Look <image> and think. What?"),
    ],
)
def test_a_text_comes_before_the_prompt_and_behind_its_image(content, text, prompt):
    assert read_format_prompt(text)(content) == prompt


@pytest.mark.parametrize("answer", [5, 2.5, {"x": 1, "y": [2, 3]}, ["a", "b"], True])
def test_answers_of_any_type_reach_a_reward_file_as_they_are(tmp_path, processor, answer):
    data = plain(tmp_path, [MIXED_ROWS[1] | {"answer": answer}] * 2, processor)
    assert data[0].ground_truth == answer and type(data[0].ground_truth) is type(answer)
    batch = collate_prompts([data[0], data[1]], pad_token_id=0)
    assert batch.non_tensor_batch["ground_truth"].tolist() == [answer, answer]
    if isinstance(answer, dict | list):
        with pytest.raises(DataError, match="row 0: the ground truth is .*worker.reward.reward_function"):
            plain(tmp_path, [MIXED_ROWS[1] | {"answer": answer}], processor, row_check=check_answer)
    else:
        plain(tmp_path, [MIXED_ROWS[1] | {"answer": answer}], processor, row_check=check_answer)


@pytest.mark.parametrize("size", [(300, 200), (150, 221), (90, 61), (640, 480), (700, 650), (1200, 900)])
def test_images_resized_first_have_easyr1s_grids(tmp_path, processor, size):
    bounds = {"min_pixels": 300 * 300, "max_pixels": 600 * 600}
    rows = [{"prompt": "<image>?", "answer": "1", "images": [shot(*size)]}]
    (prompt,) = plain(tmp_path, rows, processor, resize_first=True, **bounds)
    width, height = size
    for bound, is_beyond in ((600 * 600, int.__gt__), (300 * 300, int.__lt__)):
        if is_beyond(width * height, bound):
            factor = math.sqrt(bound / (width * height))
            width, height = int(width * factor), int(height * factor)
    picture = Image.open(io.BytesIO(shot(*size))).resize((width, height))
    grid = processor.image_processor(images=[picture])["image_grid_thw"][0]
    assert Image.open(io.BytesIO(prompt.images[0])).size == (width, height)
    assert prompt.ids.tolist().count(processor.image_token_id) == int(grid.prod()) // 4


def test_resizing_first_gives_other_grids_than_one_step_for_many_small_pictures(tmp_path, processor):
    rows = [
        {"prompt": "<image>?", "answer": "1", "images": [shot(width, height)]}
        for width in range(100, 200, 20)
        for height in range(90, 200, 20)
    ]
    bounds = {"min_pixels": 300 * 300, "max_pixels": 600 * 600}
    two_steps, one_step = (plain(tmp_path, rows, processor, resize_first=first, **bounds) for first in (True, False))
    differing = sum(a.grids != b.grids for a, b in zip(two_steps.entries, one_step.entries, strict=True))
    assert differing > len(rows) / 2


@pytest.mark.parametrize("end", [True, False])
def test_a_tokenizer_without_a_pad_token_pads_with_its_end_token(tmp_path, end):
    for name in ("tokenizer.json", "processor_config.json", "config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((TOY_MODEL / name).read_bytes())
    settings = json.loads((TOY_MODEL / "tokenizer_config.json").read_text())
    for name in ("pad_token",) if end else ("pad_token", "eos_token"):
        settings.pop(name)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    config = load_config([f"worker.actor.model.tokenizer_path={tmp_path}"])
    if end:
        tokenizer = load_run_processor(config).tokenizer
        assert tokenizer.pad_token_id == tokenizer.eos_token_id is not None
    else:
        with pytest.raises(ConfigError, match="tokenizer_path.*neither a pad_token nor an eos_token"):
            load_run_processor(config)


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


def shot(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "blue").save(file, "PNG")
    return file.getvalue()


def plain(folder, rows, processor, **options):
    options = {"prompt_key": "prompt", "answer_key": "answer", "max_prompt_length": 512} | options
    return RLHFDataset(write(folder, rows), processor, **options)


MIXED_ROWS = [
    {"prompt": "<image>Which of <image> is larger?", "answer": "1", "images": [shot(112, 56), shot(84, 140)]},
    {"prompt": "What is 1 + 1?", "answer": "2", "images": []},
    {"prompt": "Describe <image>", "answer": "3", "images": [shot(56, 56)]},
]


def test_rows_with_several_one_and_no_images_share_a_batch(tmp_path, processor):
    data = plain(tmp_path, MIXED_ROWS, processor)
    batch = collate_prompts(list(data), pad_token_id=0)
    assert [len(images) for images in batch.non_tensor_batch["images"]] == [2, 0, 1]
    for index, row in enumerate(MIXED_ROWS):
        content = [
            {"type": "image"} if part == "<image>" else {"type": "text", "text": part}
            for part in re.split("(<image>)", row["prompt"])
            if part
        ]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        pictures = [Image.open(io.BytesIO(image)).convert("RGB") for image in row["images"]] or None
        expected = processor(images=pictures, text=[text])["input_ids"][0]
        assert batch.batch["prompt_ids"][index][batch.batch["prompt_mask"][index]].tolist() == list(expected)
        assert data[index].raw_ids.count(processor.image_token_id) == len(row["images"])
    parts = batch.split(1)  # the images of a row stay with it through every split
    assert [len(part.non_tensor_batch["images"][0]) for part in parts] == [2, 0, 1]


def test_text_only_and_mixed_data_leave_images_out(tmp_path, processor):
    rows = [MIXED_ROWS[0], MIXED_ROWS[2], MIXED_ROWS[2]]
    assert [len(prompt.images) for prompt in plain(tmp_path, rows, processor, text_only=True)] == [0, 0, 0]
    mixed = plain(tmp_path, rows, processor, mixed_data=True)
    assert [len(prompt.images) for prompt in mixed] == [0, 1, 0]
    assert mixed[2].problem == "Describe " and processor.image_token_id not in mixed[2].ids.tolist()


def test_images_by_path_are_read_when_asked_for(tmp_path, processor):
    (tmp_path / "a.png").write_bytes(shot(112, 56))
    rows = [{"prompt": "<image>What?", "answer": "1", "images": ["a.png"]}, MIXED_ROWS[1]]
    data = plain(tmp_path, rows, processor, image_dir=str(tmp_path))
    assert data[0].images == [shot(112, 56)] and data[1].images == []


def test_an_open_data_set_holds_no_image(tmp_path, processor):
    rows = [MIXED_ROWS[0] | {"images": [shot(112, 56), shot(84, 140)]}] * 4
    data = plain(tmp_path, rows, processor)
    held = pickle.dumps(data.entries)
    assert shot(112, 56) not in held and len(held) < 4 * 2000


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"images": []}, {}, "2 image places but the row has 0 images; write one <image> per image"),
        ({"prompt": "What?"}, {}, "0 image places but the row has 2 images"),
        ({}, {"max_images": 1}, "2 images are more than worker.rollout.limit_images=1"),
        ({"images": [shot(4200, 20), shot(56, 56)]}, {}, "aspect ratio"),
        ({"prompt": "<video>What?"}, {}, "only images are trained on"),
        ({"answer": None}, {}, "column 'answer' must hold an answer, got None"),
        ({"prompt": "<image><|image_pad|><image>?"}, {}, "3 image places but the row has 2 images"),
    ],
)
def test_a_row_that_would_break_a_pass_is_named(tmp_path, processor, change, options, message):
    with pytest.raises(DataError, match="row 1: ") as caught:
        plain(tmp_path, [MIXED_ROWS[1], MIXED_ROWS[0] | change], processor, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("answer", [datetime.date(2024, 1, 2), 5, True, [1.5], b"5", {"x": [b"5"], "y": {"z": 1}}])
def test_an_answer_of_any_type_reaches_the_prompt_as_it_is(tmp_path, processor, answer):
    rows = [MIXED_ROWS[1] | {"answer": answer, "level": 3, "points": [[1, 2]], "mask": {"size": [4, 4], "runs": b"x"}}]
    prompt = plain(tmp_path, rows, processor)[0]
    assert prompt.ground_truth == answer and type(prompt.ground_truth) is type(answer)
    assert prompt.columns == {name: value for name, value in rows[0].items() if name != "images"}
    assert collate_prompts([prompt], 0).non_tensor_batch["columns"].tolist() == [prompt.columns]


@pytest.mark.parametrize("answer", [float("nan"), {"x": [float("inf")]}])
def test_an_answer_with_a_number_that_is_not_finite_is_named(tmp_path, processor, answer):
    with pytest.raises(DataError, match="row 0: column 'answer' must hold numbers that are finite"):
        plain(tmp_path, [MIXED_ROWS[1] | {"answer": answer}], processor)


def test_a_chat_template_that_fails_is_named_with_the_row(tmp_path, processor):
    broken = copy.deepcopy(processor)
    broken.chat_template = "{{ raise_exception('no users') }}"
    with pytest.raises(DataError, match="row 0: a template fails: no users; see data.override_chat_template"):
        plain(tmp_path, [MIXED_ROWS[1]], broken)


def test_images_of_extreme_sizes_get_the_processors_own_tokens(tmp_path, processor):
    """Sizes at which rounding differs between formulas: one token too many is an error in the middle of a run."""
    sizes = [(1, 1), (28, 27), (41, 43), (113, 2000), (1999, 11), (333, 777)]
    rows = [{"prompt": "<image>?", "answer": "1", "images": [shot(*size)]} for size in sizes]
    bounds = {"min_pixels": 50 * 50, "max_pixels": 200 * 200}
    data = plain(tmp_path, rows, processor, **bounds)
    for prompt in data:
        picture = Image.open(io.BytesIO(prompt.images[0])).convert("RGB")
        grid = processor.image_processor(images=[picture], **bounds)["image_grid_thw"][0]
        assert prompt.ids.tolist().count(processor.image_token_id) == int(grid.prod()) // 4


def test_a_text_model_takes_rows_without_images_and_no_others(tmp_path, processor):
    (tokens,) = [prompt.ids for prompt in plain(tmp_path, MIXED_ROWS[1:2], TextProcessor(processor.tokenizer))]
    assert "What is 1 + 1?" in processor.tokenizer.decode(tokens)
    with pytest.raises(DataError, match="row 0: .*the model reads none; set data.text_only=true"):
        plain(tmp_path, MIXED_ROWS, TextProcessor(processor.tokenizer))
    assert len(plain(tmp_path, MIXED_ROWS, TextProcessor(processor.tokenizer), text_only=True)) == 3


def test_the_chat_template_may_be_replaced_and_must_be_there(tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text("{% for message in messages %}>{{ message.content[0].text }}{% endfor %}")
    config = load_config([f"worker.actor.model.model_path={TOY_MODEL}", f"data.override_chat_template={file}"])
    changed = load_run_processor(config)
    data = plain(tmp_path, [MIXED_ROWS[1]], changed)
    assert changed.tokenizer.decode(data[0].ids) == ">What is 1 + 1?"
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "config.json"):
        (tmp_path / name).write_bytes((TOY_MODEL / name).read_bytes())
    with pytest.raises(ConfigError, match="tokenizer_path.*no chat template; give one with data.override_chat_templ"):
        load_run_processor(load_config([f"worker.actor.model.tokenizer_path={tmp_path}"]))


def noisy(kind: str) -> bytes:
    return encode(Image.effect_noise((112, 112), 90).convert("RGB"), kind)


def corrupt(data: bytes) -> bytes:
    """The file with its header and its end, and nothing between that a decoder could read."""
    middle = len(data) // 2
    if data[:3] == b"GIF":
        return data[:middle]
    return data[:middle] + bytes(len(data) - middle - 12) + data[-12:]


def with_images(rows: list[dict], images: dict[int, object]) -> list[dict]:
    return [row | {"images": images.get(number, row["images"]["bytes"])} for number, row in enumerate(rows)]


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_bad_image_is_named_before_the_step_that_needs_it_or_makes_room_for_a_spare(
    tmp_path, rows, processor, capsys, kind
):
    broken = with_images(rows, {1: corrupt(noisy(kind)), 4: corrupt(noisy(kind))})
    stopping = opened(tmp_path, broken, processor)
    assert stopping.readable([0, 2]) == [0, 2]
    for _ in range(2):  # the same at every try
        with pytest.raises(DataError, match=r"row 1 \(image_id .*data.on_bad_row=skip"):
            stopping.readable([0, 1, 4], [2, 3])
    skipping = opened(tmp_path, broken, processor, on_bad_row="skip")
    assert len(skipping) == 6
    assert skipping.readable([0, 1, 2], [4, 5, 3]) == [0, 5, 2] == skipping.readable([0, 1, 2], [4, 5, 3])
    assert skipping.readable([0, 1, 2]) == [0, 2]
    said = capsys.readouterr().out
    assert said.count("row 1 (image_id") == said.count("row 4 (image_id") == 1
    with pytest.raises(DataError, match="only 0 of 1 prompts"):
        skipping.readable([1])
    with pytest.raises(DataError, match="only 1 of 2 prompts"):
        skipping.readable([0, 1], [4])


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (noisy("JPEG")[:-900], "truncated"),
        (noisy("PNG")[:-900], "truncated"),
        ("A" * 72, "cannot identify"),
        ("/dev/zero", "no regular file"),
        ("x" * 5000 + ".png", "no image file"),
    ],
)
def test_a_bad_row_at_the_start_stops_or_is_left_out(tmp_path, rows, processor, capsys, image, words):
    held = [{"images": image}, {"images": base64.b64encode(noisy("PNG")).decode()}]
    if isinstance(image, bytes):
        held[1] = {"images": noisy("PNG")}
    broken = [row | entry for row, entry in zip(rows[:2], held, strict=True)]
    with pytest.raises(DataError, match=rf"row 0 \(image_id .*{words}.*data.on_bad_row=skip"):
        opened(tmp_path, broken, processor)
    data = opened(tmp_path, broken, processor, on_bad_row="skip")
    assert len(data) == 1 and Image.open(io.BytesIO(data[0].images[0])).size == (112, 112)
    assert f"row 0 (image_id {rows[0]['image_id']})" in capsys.readouterr().out


def test_an_image_that_vanished_since_the_start_is_named(tmp_path, rows, processor):
    path = tmp_path / "a.png"
    path.write_bytes(noisy("PNG"))
    data = opened(tmp_path, [rows[0] | {"images": str(path)}], processor)
    path.unlink()
    with pytest.raises(DataError, match=r"row 0 \(image_id .*no image file"):
        data[0]
    with pytest.raises(DataError, match=r"row 0 \(image_id"):
        data.readable([0])


def test_values_that_are_cut_are_said_with_the_row(tmp_path, rows, processor, capsys):
    wide = encode(Image.new("I;16", (112, 112), 9000), "PNG")
    opened(tmp_path, with_images(rows, {2: wide}), processor)
    assert re.search(r"1 of 6 rows look wrong. First row 2 \(image_id .*I;16.*8 bits", capsys.readouterr().out)


def test_spare_rows_are_the_rest_of_the_epoch_from_the_batch_on():
    order = BatchOrder(10, 3, shuffle=True, seed=1)
    for batch in range(6):
        epoch = [row for other in range(batch // 3 * 3, batch // 3 * 3 + 3) for row in order.rows(other)]
        assert sorted(order.rows(batch) + order.spares(batch)) == list(range(10))
        assert order.spares(batch)[:3] == order.rows(batch + 1) or batch % 3 == 2
        assert set(epoch) <= set(order.rows(batch) + order.spares(batch))
    assert BatchOrder(5, 2, False, 1).spares(1) == [4, 0, 1]

"""Several sources in one run: shares, order, resume, faults before the start."""

import base64
import io
import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from verl.config.loading import load_config
from verl.config.records import ConfigError, SourceConfig
from verl.config.sources import name_source, share_prompts
from verl.data.dataset import BatchOrder
from verl.data.mixture import MixedOrder, MixedSet, build_order, describe_shares
from verl.reward import MixedReward, RewardError
from verl.trainer.batches import scale_advantages
from verl.trainer.metrics import compute_reward_metrics


def source(path: str, **fields: Any) -> SourceConfig:
    return SourceConfig(path=path, **fields)


class Rows(list):
    """A set of so many prompts."""

    processor, on_bad_row = None, "stop"

    @property
    def entries(self) -> list[Any]:
        return list(self)


def mixed(*sizes: int, **fields: Any) -> MixedSet:
    """A set of sources with these numbers of rows; a field is one value for each source."""
    sets: Any = [Rows(range(size)) for size in sizes]
    chosen = [{name: values[index] for name, values in fields.items()} for index in range(len(sizes))]
    return MixedSet(sets, [source(f"s{index}", **each) for index, each in enumerate(chosen)])


def rows(order: Any, batch: int) -> list[int]:
    return order.mix(batch, [part for part, _ in order.parts(batch)])


def test_every_batch_has_each_sources_share():
    order = build_order(mixed(40, 5, 30, 10, weight=[0.5, 0.25, "natural", "natural"]), 8, True, 1)
    for batch in range(30):
        chosen = rows(order, batch)
        assert [sum(low <= row < high for row in chosen) for low, high in ((0, 40), (40, 45), (45, 85))] == [4, 2, 2]
    drawn = Counter(row for batch in range(20) for row in rows(order, batch))  # one epoch of the natural pool
    assert all(drawn[row] == 1 for row in range(45, 85)) and all(drawn[row] == 2 for row in range(40))
    assert all(drawn[row] == 8 for row in range(40, 45))


def test_the_order_is_a_function_of_seed_and_batch_alone():
    data = mixed(7, 5, weight=[0.5, 0.5])
    first, again, other = (build_order(data, 4, True, seed) for seed in (1, 1, 2))
    expected = [rows(first, batch) for batch in range(12)]
    assert [rows(again, batch) for batch in reversed(range(12))] == expected[::-1]
    assert [rows(other, batch) for batch in range(12)] != expected


def test_natural_sources_are_one_set_whose_repeats_count():
    order = build_order(mixed(4, 2, repeat=[1, 3]), 5, True, 1)
    drawn = Counter(row for batch in range(2) for row in rows(order, batch))
    assert drawn == {0: 1, 1: 1, 2: 1, 3: 1, 4: 3, 5: 3}


def test_a_bad_row_is_replaced_from_its_own_source():
    order = build_order(mixed(6, 6, weight=[0.5, 0.5]), 4, True, 1)
    (chosen, spares), (others, other_spares) = order.parts(0)
    assert {*chosen, *spares} == set(range(6)) and {*others, *other_spares} == set(range(6, 12))
    assert not {*chosen} & {*spares}


def test_one_source_in_a_list_has_the_order_of_a_path():
    order = build_order(mixed(12), 4, True, 1)
    plain = BatchOrder(12, 4, True, 1)
    assert isinstance(order, BatchOrder) and [order.rows(b) for b in range(6)] == [plain.rows(b) for b in range(6)]


def test_a_mixed_order_goes_on_where_the_pool_ends_and_keeps_order_without_shuffle():
    order = MixedOrder([(np.arange(3), 2), (np.arange(3, 8), 2)], False, 0)
    assert [rows(order, batch) for batch in range(3)] == [[0, 1, 3, 4], [2, 0, 5, 6], [1, 2, 7, 3]]


@pytest.mark.parametrize(
    ("weights", "size", "expected"),
    [
        ([0.5, 0.25, 0.25], 8, ([4, 2, 2], 0)),
        ([1 / 3, 1 / 3, 1 / 3], 8, ([3, 3, 2], 0)),
        (["natural", 0.25], 8, ([0, 2], 6)),
        (["natural", "natural"], 8, ([0, 0], 8)),
    ],
)
def test_shares_are_whole_prompts_that_fill_the_batch(weights, size, expected):
    assert share_prompts([source("a", weight=weight) for weight in weights], size) == expected


def test_a_source_smaller_than_its_share_is_said():
    lines = describe_shares(mixed(100, 4, weight=[0.5, 0.5]), 8, 10)
    assert lines[0] == "Source s0: 100 prompts, 4 of 8 in a batch"
    assert lines[1].endswith("4 of 8 in a batch; it is smaller than its share, so that each is drawn 10.0 times")


def test_a_source_is_called_by_its_file():
    assert [name_source(source(path)) for path in ("x/a.jsonl@train", "x/b", "owner/C")] == ["a", "b", "C"]


@pytest.fixture
def load(tmp_path):
    for name in "ab":
        row = {"problem": "q", "answer_option_text": "5"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")

    def run(*entries: str, **overrides: Any):
        files = ", ".join(f"{{path: {tmp_path}/{'ab'[i]}.jsonl{entry}}}" for i, entry in enumerate(entries))
        more = [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]
        arguments = [
            "config=configs/toy_cpu.yaml",
            f"data.train_files=[{files}]",
            f"data.val_files={tmp_path}/a.jsonl",
        ]
        return load_config([*arguments, *more], ("math", "r1v", "spatial_sgg"))

    return run


def test_a_list_of_sources_is_read_with_its_defaults(load):
    first, second = load(", weight: 0.75, reward: math", ", weight: 0.25, advantage_scale: 0").data.train_files
    assert (first.weight, first.reward, first.repeat, first.advantage_scale) == (0.75, "math", 1, 1.0)
    assert (second.weight, second.reward, second.advantage_scale) == (0.25, None, 0)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ((", weight: 0.5", ", weight: 0.4"), "the weights add up to 0.9 and must add up to 1"),
        ((", weight: -0.5", ", weight: 1.5"), "data.train_files[0].weight = -0.5: must be number, at least 0"),
        ((", weight: 1.0", ""), "leave nothing for natural sources"),
        ((", weight: 0.01", ", weight: 0.99"), "source a: weight = 0.01: is less than one prompt of a batch of 32"),
        ((", weight: 0.5, repeat: 2", ", weight: 0.5"), "source a: repeat = 2: counts only with weight: natural"),
        ((", colour: 5",), "data.train_files[0].colour = 5: must be one of the keys path, name"),
        ((", reward: nothing",), "source a: reward = 'nothing': must be one of math, r1v"),
        ((", reward: no.py:f",), "there is no file no.py"),
        ((", name: x", ", name: x"), "two sources are called 'x'"),
        ((", name: a/b",), "a source is called 'a/b'"),
    ],
)
def test_a_fault_of_a_list_is_named_before_anything_starts(load, entries, words):
    with pytest.raises(ConfigError) as caught:
        load(*entries)
    assert words in str(caught.value)


def test_rows_with_and_without_images_stand_in_one_batch(load, tmp_path):
    """A source of texts beside one of pictures: collated together, in a model that reads both."""
    from verl.data.dataset import collate_prompts
    from verl.data.processor import load_run_processor
    from verl.trainer.main import build_datasets

    picture = io.BytesIO()
    Image.new("RGB", (56, 84), (200, 30, 30)).save(picture, "PNG")
    row = {"problem": "<image>What is red?", "answer_option_text": "5"}
    row["images"] = {"bytes": base64.b64encode(picture.getvalue()).decode(), "path": None}
    (tmp_path / "b.jsonl").write_text(json.dumps(row) + "\n")
    config = load(", weight: 0.5", ", weight: 0.5", worker__reward__score_function="math")
    processor = load_run_processor(config)
    mixed, _ = build_datasets(config, processor)
    batch = collate_prompts([mixed[0], mixed[1]], processor.tokenizer.pad_token_id)
    assert [len(images) for images in batch.non_tensor_batch["images"]] == [0, 1]
    assert list(batch.non_tensor_batch["source"]) == ["a", "b"]
    tokens = (batch.batch["prompt_ids"] == processor.image_token_id).sum(1)
    assert tokens.tolist() == [0, 2 * 3]


def test_each_source_has_its_own_metrics():
    scores = {"overall": torch.tensor([[1.0, 0.0], [0.5, torch.nan], [0.25, 0.25]]), "x": torch.zeros(3, 2)}
    scores["x"][1] = 1.0
    found = compute_reward_metrics(scores, ["a", "b", "a"])
    expected = {"reward/overall": 0.4, "reward/x": 0.2, "reward/a/overall": 0.375, "reward/b/overall": 0.5}
    assert found == pytest.approx(expected | {"reward/b/x": 1.0})


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4)])
def test_a_source_scales_its_advantages(shape):
    scaled = scale_advantages(torch.ones(shape), ["a", "b"], {"b": 0.0})
    assert torch.equal(scaled[0], torch.ones(shape[1:])) and not scaled[1].any()


def plain(items):
    return [{"overall": float(item["response"] == "5"), "format": float(len(item["response"]) < 3)} for item in items]


def short(items):
    return [{"overall": 1 / len(item["response"])} for item in items]


def test_a_weighted_sum_and_a_gate_are_a_configuration():
    items = [{"response": text, "uid": "7"} for text in ("5", "66", "777777")]
    reward = MixedReward(
        "both", {"plain": plain, "short": short}, {"plain": 0.75, "short": 0.5}, {("plain", "format"): 1.0}
    )
    assert [score["overall"] for score in reward(items)] == [1.25, 0.25, 0.0]
    assert reward(items)[1] == {
        "overall": 0.25, "gate": 1.0, "plain/overall": 0.0, "plain/format": 1.0, "short/overall": 0.5
    }  # fmt: skip
    off = MixedReward("off", {"plain": plain}, {"plain": 0.0}, {})
    assert [score["overall"] for score in off(items)] == [0.0] * 3 and off(items)[0]["plain/overall"] == 1.0
    with pytest.raises(RewardError, match="a gate names the part 'colour' of plain, which has overall, format"):
        MixedReward("bad", {"plain": plain}, {}, {("plain", "colour"): 1.0})(items)

"""The mixed toy run's rows, warm-up file, configuration and table; the training itself is no unit."""

import io
import json
import random

import mixed_run
import pyarrow.parquet as pq
import pytest
from PIL import Image
from toy import mixture

from spatialthinker.response import section
from spatialthinker.rewards import REWARDS, RewardInput
from spatialthinker.rewards.gold import gold_response
from verl.config.loading import load_config
from verl.config.sources import list_sources


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture, "SPLITS", {"train": 24, "val": 9})
        mixture.write_sources(folder)
    return folder


def read(data, source, split="train"):
    return pq.read_table(data / source / f"{split}.parquet").to_pylist()


@pytest.mark.parametrize("source", mixture.SOURCES)
def test_the_truth_of_a_row_earns_all_and_the_hasty_teacher_less(data, source):
    rows = read(data, source)
    assert len(rows) >= 8 and len({row["images"]["bytes"] for row in rows}) == len(rows)
    assert not {row["images"]["bytes"] for row in rows} & {row["images"]["bytes"] for row in read(data, source, "val")}
    reward = rows[0]["reward"]

    def score(texts):
        inputs = [RewardInput(text, row["answer"], row["problem"]) for text, row in zip(texts, rows, strict=True)]
        return [result["overall"] for result in REWARDS[reward](inputs)]

    assert score([gold_response(reward, row["answer"]) for row in rows]) == pytest.approx([1.0] * len(rows))
    hasty = score([row["reply"] for row in rows])
    assert 0.2 < sum(hasty) / len(hasty) < 0.95


def test_widths_and_points_are_those_of_the_drawing(data):
    for row in read(data, "numbers"):
        scene = json.loads(section(row["reply"], "scene") or "")
        x1, y1, x2, y2 = scene["objects"][0]["bbox"]
        image = Image.open(io.BytesIO(row["images"]["bytes"]))
        colours = image.crop((x1, y1, x2, y2)).getcolors()
        assert int(row["answer"]) == x2 - x1 == y2 - y1 and colours and len(colours) > 1
    for row in read(data, "points"):
        assert json.loads(row["answer"]) == json.loads(section(row["reply"], "scene") or "")["objects"][0]["bbox"]


def test_rows_are_the_same_for_a_seed(data, tmp_path, monkeypatch):
    monkeypatch.setattr(mixture, "SPLITS", {"train": 24})
    monkeypatch.setattr(mixture, "_count_rows", lambda *_: iter([{"x": random.random()}]))
    mixture.write_sources(tmp_path)
    for source in ("scenes", "numbers", "points"):
        assert read(tmp_path, source) == read(data, source)


def test_the_warm_up_has_all_replies(data):
    rows = pq.read_table(mixture.write_warm_up(data)).to_pylist()
    assert set(rows[0]) == {"images", "problem", "reply"}
    assert len(rows) == sum(len(read(data, source)) for source in mixture.SOURCES)


def test_a_source_without_its_reward_has_no_advantages(data, tmp_path, monkeypatch):
    monkeypatch.chdir(mixed_run.ROOT)
    mixed_run.write_config(tmp_path / "config.yaml", data, mixed_run.ROOT / "configs" / "toy_model", ["points"])
    config = load_config([f"config={tmp_path / 'config.yaml'}"], tuple(REWARDS))
    scales = [source.advantage_scale for source in list_sources(config.data.train_files)]
    assert scales == [1.0, 1.0, 0.0, 1.0]
    paths = [source.path for source in list_sources(config.data.val_files)]
    assert paths == [f"{data / s}@val" for s in mixture.SOURCES]
    assert config.trainer.save_checkpoint_path == str(tmp_path / "checkpoints")


def test_the_table_is_of_the_first_and_the_last_validation(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step, gain in ((0, 0.0), (16, 0.1), (48, 0.25)):
        rows = [
            {"source": source, "score": {"overall": 0.5 + gain * (source == "points")}}
            for source in mixture.SOURCES
            for _ in range(4)
        ]
        (folder / f"validation_step_{step}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = mixed_run.report(folder, ["scenes"])
    assert {name: facts["gain"] for name, facts in found.items()} == {
        "scenes": 0.0, "numbers": 0.0, "points": 0.25, "counts": 0.0
    }  # fmt: skip
    assert Image.open(tmp_path / "curves.png").width > 500

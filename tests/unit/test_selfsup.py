"""Rows from pictures through the command: columns, the same bytes, going on after a kill, and what is refused."""

import hashlib
import io
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_gen.generate_data import main
from data_gen.journal import newest_lines
from data_gen.questions.records import PROVENANCE, read_records
from data_gen.selfsup import run
from data_gen.selfsup.tasks import ANNOTATED, TASKS, WITH_DEPTH
from spatialthinker.schema import COLUMNS
from tests.support.pictures import photograph, save_textures, texture

PLAIN = [name for name in TASKS if name not in (*ANNOTATED, *WITH_DEPTH)]


def preprocess(source: Path | str, out: Path, *arguments: str) -> int:
    return main(
        ["preprocess_data", "--provider=selfsup", f"--source={source}", f"--out={out}", "--processes=1", *arguments]
    )


def rows(out: Path) -> list[dict]:
    return [row for path in sorted(out.with_suffix("").glob("*")) for row in pq.read_table(path).to_pylist()]


def digests(out: Path) -> dict[str, str]:
    files = [out, out.with_suffix(".jsonl"), *sorted(out.with_suffix("").glob("*"))]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def reasons(out: Path) -> dict[str, str]:
    return {line["key"]: line["reason"] for line in newest_lines(out.with_suffix(".jsonl")) if "reason" in line}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = save_textures(tmp_path / "pictures", 5)
    photograph().save(folder / "photograph.png")
    return folder


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "BLOCK_PICTURES", 2)


def test_a_folder_of_pictures_gives_rows_of_every_task_that_needs_nothing_else(pictures: Path, tmp_path: Path):
    assert preprocess(pictures, out := tmp_path / "rows.csv") == 0
    found = rows(out)
    assert len(found) == 6 * 8 and {row["model"] for row in found} == set(PLAIN)
    assert list(found[0]) == [*COLUMNS, *PROVENANCE, "reward"]
    for row in found:
        image = Image.open(io.BytesIO(row["images"]["bytes"]))
        assert f"Image size: ({image.width} x {image.height})" in row["problem"]
        assert row["problem"].startswith("<image>") and row["source"] == str(pictures)
        assert row["answer_option_text"].endswith(f"<answer>{row['answer_option_text_only']}</answer>")
        assert row["reward"] in ("choice", "ordering", "boxes", "points") and bool(row["options"]) == (
            row["reward"] == "choice"
        )


def test_a_data_set_is_published_from_the_rows_and_pictures_never_cross_splits(pictures: Path, tmp_path: Path):
    preprocess(pictures, out := tmp_path / "rows.csv")
    arguments = [f"--input_file={out}", "--val_split=0.4", f"--out={tmp_path}"]
    assert main(["generate_hf_data", *arguments]) == 0
    splits = {
        name: pq.read_table(tmp_path / "hf_data" / f"{name}-00000-of-00001.parquet") for name in ("train", "val")
    }
    ids = {name: {row["image_id"].rpartition("#")[0] for row in table.to_pylist()} for name, table in splits.items()}
    assert ids["train"] and ids["val"] and not ids["train"] & ids["val"]
    images = {row["image_id"]: row["images"]["bytes"] for row in rows(out)}
    for row in splits["train"].to_pylist():
        assert row["images"]["bytes"] == images[row["image_id"]] and row["reward"]
    assert main(["report", f"--input_file={out}"]) == 0 and "ordering" not in out.with_suffix(".html").read_text()[:10]
    assert len(list(read_records(tmp_path / "data_train.csv"))) == splits["train"].num_rows
    assert {record.reward for record in read_records(tmp_path / "data_val.csv")} >= {"choice", "ordering"}


def test_the_same_seed_gives_the_same_bytes_and_another_one_other_rows(pictures: Path, tmp_path: Path, small_blocks):
    few = "--rows_per_image=2"
    preprocess(pictures, one := tmp_path / "one" / "rows.csv", few)
    preprocess(pictures, two := tmp_path / "two" / "rows.csv", few)
    preprocess(pictures, other := tmp_path / "other" / "rows.csv", few, "--seed=1")
    ours, theirs = digests(one), digests(two)
    assert len(ours) == 5 and [ours[name] == theirs[name] for name in ours if name != "rows.jsonl"] == [True] * 4
    lines = [list(newest_lines(out.with_suffix(".jsonl"))) for out in (one, two)]
    assert lines[0] == lines[1]  # the first line alone differs: it names the folder of the rows
    assert digests(other)["train-00000.parquet"] != ours["train-00000.parquet"]


def test_a_run_over_more_pictures_goes_on_from_one_over_fewer(pictures: Path, tmp_path: Path, small_blocks):
    few = "--rows_per_image=2"
    for cap in ("--data_cap=3", "--data_cap=5", "--data_cap=6"):
        assert preprocess(pictures, out := tmp_path / "parts.csv", cap, few) == 0
    preprocess(pictures, whole := tmp_path / "whole.csv", few)
    assert list(digests(out).values())[2:] == list(digests(whole).values())[2:]
    assert out.read_bytes() == whole.read_bytes()


def test_the_dial_sets_the_level(pictures: Path, tmp_path: Path):
    for difficulty, level in (("0", "easy"), ("0.5", "medium"), ("1", "hard")):
        preprocess(pictures, out := tmp_path / f"{level}.csv", f"--difficulty={difficulty}", "--rows_per_image=2")
        assert {row["level"] for row in rows(out)} == {level}


def test_broken_small_empty_and_repeated_pictures_are_left_out_with_their_reasons(pictures: Path, tmp_path: Path):
    (pictures / "broken.jpg").write_bytes((pictures / "00000.jpg").read_bytes()[:3000])
    texture(9, (150, 300)).save(pictures / "small.png")
    Image.new("RGB", (300, 300), (9, 80, 200)).save(pictures / "empty.png")
    twin = Image.open(pictures / "00001.jpg").resize((400, 300))
    twin.save(pictures / "twin.jpg", quality=40)
    assert preprocess(pictures, out := tmp_path / "rows.csv", "--rows_per_image=1") == 0
    found = reasons(out)
    assert found.keys() == {"broken.jpg", "small.png", "empty.png", "twin.jpg"}
    assert found["broken.jpg"].startswith("its image cannot be decoded")
    assert found["small.png"] == "too small: 150 x 300 pixels; the shorter side needs 160"
    assert found["empty.png"] == "empty: hardly any contrast"
    assert found["twin.jpg"] == "near-duplicate: looks like 00001.jpg"


def test_a_folder_without_pictures_is_refused(tmp_path: Path, capsys):
    (tmp_path / "notes.txt").write_text("none")
    assert preprocess(tmp_path, tmp_path / "out" / "rows.csv") == 2
    assert "the folder holds no picture (.jpg" in capsys.readouterr().err


@pytest.mark.parametrize("difficulty", ["1.5", "-0.1", "hard"])
def test_a_difficulty_out_of_range_is_refused(difficulty: str, pictures: Path, tmp_path: Path, capsys):
    assert preprocess(pictures, tmp_path / "rows.csv", f"--difficulty={difficulty}") == 2
    assert "--difficulty" in (message := capsys.readouterr().err) and "from 0 to 1" in message
    assert not (tmp_path / "rows.csv").exists()


def test_an_unknown_task_and_one_without_its_files_are_refused(pictures: Path, tmp_path: Path, capsys):
    assert preprocess(pictures, tmp_path / "rows.csv", "--tasks=rotaton") == 2
    assert "nearest is rotation" in capsys.readouterr().err
    assert preprocess(pictures, tmp_path / "rows.csv", "--tasks=count") == 2
    assert "--tasks count on a folder of pictures needs --annotations" in capsys.readouterr().err
    assert preprocess(pictures, tmp_path / "rows.csv", "--tasks=nearer") == 2
    assert "--tasks nearer on a folder of pictures needs --depth" in capsys.readouterr().err


def test_a_misspelt_provider_is_told_all_of_them_and_a_cluster_takes_no_pictures(tmp_path: Path, capsys):
    arguments = [f"--source={tmp_path}", f"--out={tmp_path / 'rows.csv'}"]
    assert main(["preprocess_data", "--provider=selfsop", *arguments]) == 2
    assert "need one of anthropic, openai, template, selfsup; nearest is selfsup" in capsys.readouterr().err
    assert main(["preprocess_on_cluster", "--provider=selfsup", *arguments]) == 2
    assert "works on one machine; give it to preprocess_data" in capsys.readouterr().err


def test_depth_gives_its_rows_and_depth_of_another_size_is_named(pictures: Path, tmp_path: Path):
    (depth := tmp_path / "depth").mkdir()
    metres = np.repeat(np.linspace(1, 6, 480)[None], 360, axis=0)
    np.save(depth / "00000.npy", metres.astype(np.float32))
    Image.fromarray((1000 * metres).astype(np.uint16)).save(depth / "00001.png")
    np.save(depth / "00002.npy", metres[:100])
    arguments = ("--tasks=nearer,depth_order,depth_distance", f"--depth={depth}", "--difficulty=0.3")
    assert preprocess(pictures, out := tmp_path / "rows.csv", *arguments) == 0
    made = Counter(row["image_id"].partition("#")[0] for row in rows(out))
    assert made == {"00000.jpg": 8, "00001.jpg": 8}
    assert {float(row["answer_only"]) for row in rows(out) if row["model"] == "depth_distance"} <= set(
        np.round(np.arange(1, 6.01, 0.01), 2)
    )
    found = reasons(out)
    assert found["00002.jpg"] == "its depth has 480 x 100 pixels, the picture 480 x 360; give both in one size"
    assert found["00003.jpg"] == "no task fits the picture"


def coco(folder: Path, **changes: object) -> Path:
    box = {"category_id": 7, "image_id": 1}
    value = {
        "images": [{"id": 1, "file_name": "photograph.png"}, {"id": 2, "file_name": "gone.jpg"}],
        "categories": [{"id": 7, "name": "face"}],
        "annotations": [{**box, "id": 4, "bbox": [100, 100, 90, 120]}, {**box, "id": 5, "bbox": [220, 60, 80, 80]}],
    }
    (folder / "coco.json").write_text(json.dumps(value | changes))
    return folder / "coco.json"


def test_annotations_of_coco_give_counts_and_boxes(pictures: Path, tmp_path: Path):
    arguments = ("--tasks=count,boxes", f"--annotations={coco(tmp_path)}", "--difficulty=0.5", "--rows_per_image=2")
    assert preprocess(pictures, out := tmp_path / "rows.csv", *arguments) == 0
    found = {row["model"]: row for row in rows(out)}
    assert found.keys() == {"boxes"}  # two is no medium count
    assert found["boxes"]["answer_only"].count("[") == 3 and found["boxes"]["reward"] == "boxes"
    assert json.loads(found["boxes"]["answer"].partition("</scene>")[0].removeprefix("<scene>"))["objects"][1]["id"]
    assert reasons(out)["gone.jpg"] == "the annotations name it, but the folder has no such picture"
    assert preprocess(pictures, out, "--overwrite", *arguments[:2], "--difficulty=0.1") == 0
    assert {row["answer_only"] for row in rows(out) if row["model"] == "count"} == {"2"}


def test_annotations_of_visual_genome_are_read_by_the_name_of_the_picture(pictures: Path, tmp_path: Path):
    item = {"image_id": "photograph", "objects": [{"names": ["Face"], "x": 100, "y": 100, "w": 90, "h": 120}]}
    (tmp_path / "objects.json").write_text(json.dumps([item]))
    arguments = ("--tasks=count", f"--annotations={tmp_path / 'objects.json'}", "--difficulty=0")
    assert preprocess(pictures, out := tmp_path / "rows.csv", *arguments) == 0
    assert {(row["answer_only"], "'face'" in row["question_only"]) for row in rows(out)} == {("1", True)}


def test_annotations_that_do_not_fit_are_refused(pictures: Path, tmp_path: Path, capsys):
    stray = coco(tmp_path, annotations=[{"id": 4, "image_id": 3, "category_id": 7, "bbox": [1, 1, 5, 5]}])
    assert preprocess(pictures, tmp_path / "rows.csv", f"--annotations={stray}") == 2
    assert "annotation 4 is of image_id 3, which is not in images" in capsys.readouterr().err
    (tmp_path / "other.json").write_text('{"boxes": []}')
    assert preprocess(pictures, tmp_path / "rows.csv", f"--annotations={tmp_path / 'other.json'}") == 2
    assert "neither COCO's form" in capsys.readouterr().err
    assert preprocess(pictures, tmp_path / "rows.csv", f"--annotations={tmp_path / 'none.json'}") == 2
    assert "cannot be read" in capsys.readouterr().err


def test_pictures_of_a_parquet_file_are_used_with_their_objects(pictures: Path, tmp_path: Path):
    import pyarrow as pa

    data = (pictures / "photograph.png").read_bytes()
    objects = json.dumps([{"id": "face.1", "bbox": [100, 100, 190, 220]}])
    table = pa.table({"image_id": ["one", "two"], "image": [data, b"broken"], "objects": [objects, "[]"]})
    pq.write_table(table, tmp_path / "set.parquet")
    arguments = ("--difficulty=0", "--tasks=boxes,rotation", "--rows_per_image=2")
    assert preprocess(tmp_path / "set.parquet", out := tmp_path / "rows.csv", *arguments) == 0
    assert {row["model"] for row in rows(out)} == {"boxes", "rotation"}
    assert reasons(out)["two"].startswith("its image cannot be decoded")


def test_a_run_that_gives_no_row_says_the_first_reason(tmp_path: Path, capsys):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (300, 300)).save(tmp_path / "pictures" / "black.png")
    assert preprocess(tmp_path / "pictures", tmp_path / "rows.csv") == 2
    assert "no picture gave a row; the first reason: empty" in capsys.readouterr().err


def test_files_of_others_and_other_settings_are_refused(pictures: Path, tmp_path: Path, capsys):
    (tmp_path / "rows").mkdir()
    assert preprocess(pictures, tmp_path / "rows.csv") == 2
    assert "exists without a journal" in capsys.readouterr().err
    os.rmdir(tmp_path / "rows")
    assert preprocess(pictures, tmp_path / "rows.csv", "--tasks=rotation", "--rows_per_image=1") == 0
    assert preprocess(pictures, tmp_path / "rows.csv", "--tasks=mirroring", "--rows_per_image=1") == 2
    assert "was written with other settings (tasks" in capsys.readouterr().err


def test_only_choices_are_validated_by_a_model(pictures: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "test-key")
    preprocess(pictures, out := tmp_path / "rows.csv", "--tasks=patch_order", "--rows_per_image=1")
    assert main(["validate_with_gpt4o", f"--input_file={out}", f"--output_file={tmp_path / 'kept.csv'}"]) == 2
    assert "rows have no options, and only choices are judged" in capsys.readouterr().err

import json
from dataclasses import asdict

import pytest

from spatialthinker.schema import COLUMNS, VqaRow, build_row, parquet_path, read_parquet, write_parquet
from spatialthinker.synthetic import generate

SCENE = {"objects": [{"id": "cat.1", "bbox": [1, 2, 3, 4]}], "relationships": []}
PARTS = {
    "image_id": "row-7",
    "image": b"bytes",
    "problem": "<image>prompt",
    "question": "Where is the cat?",
    "options": ["left", "right"],
    "answer_index": 1,
    "scene": SCENE,
    "category": "instance_location",
    "level": "easy",
    "rating": 7,
}


def test_build_row_derives_every_column():
    row = build_row(**PARTS)
    scene = f"<scene>{json.dumps(SCENE)}</scene>\n"
    assert row.answer == scene + "<answer>B</answer>"
    assert row.answer_text == scene + "<answer>right</answer>"
    assert row.answer_option_text == scene + "<answer>(B) right</answer>"
    assert (row.answer_only, row.answer_text_only, row.answer_option_text_only) == ("B", "right", "(B) right")
    assert row.question_with_options == "Where is the cat?\nOptions:\n(A) left\n(B) right"
    assert len(COLUMNS) == len(asdict(row)) == 15


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"category": "Relation"}, "category 'Relation'"),
        ({"level": "trivial"}, "level 'trivial'"),
        ({"rating": 11}, "rating 11"),
        ({"options": ["left"]}, "options"),
        ({"options": ["left", "left"]}, "options"),
        ({"options": list("abcde")}, "options"),
        ({"answer_index": 2}, "answer index 2"),
    ],
)
def test_build_row_refuses_and_names_the_row(change, said):
    with pytest.raises(ValueError, match=f"row row-7: .*{said}"):
        build_row(**PARTS | change)


def test_parquet_round_trip(tmp_path):
    rows = [row for _, row in generate(9, seed=1)]
    path = write_parquet(rows, parquet_path(tmp_path, "val"))
    assert path.name == "val-00000-of-00001.parquet"
    assert read_parquet(path) == rows
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_datasets_reads_images_as_images(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [row for _, row in generate(3, seed=1)]
    path = write_parquet(rows, parquet_path(tmp_path / "data", "train"))
    loaded = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.column_names == list(COLUMNS)
    assert loaded[0]["images"].size == (112, 112)
    assert loaded[1]["options"] == rows[1].options
    assert loaded.features["rating"].dtype == "int32"


def test_read_parquet_names_missing_columns(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"problem": ["x"]}), tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match="lacks the columns image_id"):
        read_parquet(tmp_path / "bad.parquet")


def test_columns_are_the_public_ones():
    public = (
        "image_id images problem question_only answer answer_only answer_text answer_text_only answer_option_text "
        "answer_option_text_only category level question_with_options options rating"
    )
    assert list(COLUMNS) == public.split()
    assert list(VqaRow.__dataclass_fields__) == public.split()

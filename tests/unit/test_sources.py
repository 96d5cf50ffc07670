"""Every way in which rows and their images may lie on the disk."""

import io
import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from PIL import Image

from verl.data.sources import DataError, fit_to_bounds, image_sources, load_rows, resize_encoded

ROWS = [{"problem": f"question {i}", "answer": str(i)} for i in range(3)]


def picture(width: int = 56, height: int = 28, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, kind)
    return file.getvalue()


def write_jsonl(rows: list[dict], path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


WRITERS = {
    "rows.parquet": lambda rows, path: Dataset.from_list(rows).to_parquet(path),
    "rows.csv": lambda rows, path: Dataset.from_list(rows).to_csv(path),
    "rows.jsonl": write_jsonl,
    "rows.json": lambda rows, path: path.write_text(json.dumps(rows)),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", WRITERS)
def test_a_single_file(tmp_path, name):
    WRITERS[name](ROWS, tmp_path / name)
    for locator in (f"{tmp_path / name}", f"{tmp_path / name}@train"):
        assert load_rows(locator)["problem"][:] == [row["problem"] for row in ROWS]
    with pytest.raises(DataError, match="a single file has no splits but train; drop @val"):
        load_rows(f"{tmp_path / name}@val")


def test_a_saved_data_set_with_and_without_splits_and_its_arrow_file(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    DatasetDict(train=Dataset.from_list(ROWS), val=Dataset.from_list(ROWS[:1])).save_to_disk(tmp_path / "two")
    assert len(load_rows(f"{tmp_path / 'one'}")) == 3
    assert len(load_rows(f"{tmp_path / 'two'}@val")) == 1
    assert len(load_rows(str(next((tmp_path / "one").glob("*.arrow"))))) == 3
    with pytest.raises(DataError, match="holds no split 'test'; it has train, val"):
        load_rows(f"{tmp_path / 'two'}@test")


def test_a_folder_of_splits_whatever_else_lies_in_it(tmp_path):
    (tmp_path / "README.md").write_text("Some rows.")
    write_jsonl(ROWS, tmp_path / "train.jsonl")
    write_jsonl(ROWS[:2], tmp_path / "test.jsonl")
    assert (len(load_rows(str(tmp_path))), len(load_rows(f"{tmp_path}@test"))) == (3, 2)
    with pytest.raises(DataError, match="no val-.*give path@split"):
        load_rows(f"{tmp_path}@val")


def test_splits_may_be_folders_or_lie_in_data_or_have_no_names(tmp_path):
    for place, name in ((tmp_path / "a" / "val", "x.jsonl"), (tmp_path / "b" / "data", "val-0.jsonl")):
        place.mkdir(parents=True)
        write_jsonl(ROWS, place / name)
        assert len(load_rows(f"{tmp_path / place.relative_to(tmp_path).parts[0]}@val")) == 3
    (tmp_path / "c").mkdir()
    for name in ("part1.jsonl", "part2.jsonl"):
        write_jsonl(ROWS, tmp_path / "c" / name)
    assert len(load_rows(str(tmp_path / "c"))) == 6
    Dataset.from_list(ROWS).to_parquet(tmp_path / "c" / "part3.parquet")
    with pytest.raises(DataError, match="files of several kinds"):
        load_rows(str(tmp_path / "c"))


def test_a_path_may_hold_the_mark_of_a_split(tmp_path):
    (tmp_path / "a@b").mkdir()
    Dataset.from_list(ROWS).to_parquet(tmp_path / "a@b" / "val-00000-of-00001.parquet")
    assert len(load_rows(f"{tmp_path / 'a@b'}@val")) == 3


@pytest.mark.parametrize(("name", "text"), [("rows.txt", "a"), ("rows.json", "{broken"), ("rows.parquet", "no")])
def test_a_file_that_is_no_data_is_named(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=name):
        load_rows(str(tmp_path / name))


def test_images_stay_encoded_also_in_lists(tmp_path):
    red = picture()
    for value in (Image.open(io.BytesIO(red)), [Image.open(io.BytesIO(red))] * 2):
        Dataset.from_list([{"images": value}]).to_parquet(tmp_path / "rows.parquet")
        cell = load_rows(str(tmp_path / "rows.parquet"))[0]["images"]
        assert image_sources(cell) == [red] * (len(value) if isinstance(value, list) else 1)


def test_an_image_is_bytes_or_a_path_or_a_picture(tmp_path):
    red = picture()
    file = tmp_path / "red.png"
    file.write_bytes(red)
    drawn = Image.open(io.BytesIO(red))
    assert image_sources(red) == image_sources([red]) == image_sources({"bytes": red, "path": "x.png"}) == [red]
    assert image_sources("red.png", str(tmp_path)) == image_sources(str(file)) == [file]
    assert image_sources([{"bytes": None, "path": "red.png"}, red], str(tmp_path)) == [file, red]
    (encoded,) = image_sources(drawn)
    assert isinstance(encoded, bytes) and list(Image.open(io.BytesIO(encoded)).getdata()) == list(drawn.getdata())
    assert image_sources(None) == image_sources([]) == image_sources("") == []


@pytest.mark.parametrize(
    ("cell", "words"),
    [("none.png", "no image file here/none.png; relative paths start at data.image_dir=here"), ([3], "got int")],
)
def test_an_image_that_is_not_there_is_named(cell, words):
    with pytest.raises(ValueError, match=words):
        image_sources(cell, "here")


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_a_text_file_in_another_encoding_is_named_with_its_line(tmp_path, encoding, kind):
    lines = {
        "jsonl": ['{"a": "x"}', '{"a": "caf\xe9"}'],
        "json": ['[{"a": "x"},', '{"a": "caf\xe9"}]'],
        "csv": ["a", "caf\xe9"],
    }
    path = tmp_path / f"train.{kind}"
    path.write_bytes("\n".join([*lines[kind], ""]).encode(encoding))
    for locator in (str(path), str(tmp_path)):
        with pytest.raises(DataError, match=rf"train.{kind}, line [12]: .*store the file in UTF-8"):
            load_rows(locator)
    path.write_bytes("\n".join(lines[kind]).encode("utf-8-sig" if kind == "jsonl" else "utf-8"))
    assert load_rows(str(path))[-1]["a"] == "caf\xe9"


@pytest.mark.parametrize(
    "name", ["a[bc].jsonl", "run[ab]/rows.jsonl", "r?ws.jsonl", "*.jsonl", "{x,y}.jsonl", "%20.jsonl"]
)
def test_a_path_is_no_pattern(tmp_path, name):
    for path, answer in (("ab.jsonl", "wrong"), ("runa/rows.jsonl", "wrong"), ("x.jsonl", "wrong"), (name, "right")):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        write_jsonl([{"problem": answer}], tmp_path / path)
    assert load_rows(str(tmp_path / name))["problem"][:] == ["right"]


@pytest.mark.parametrize("folder", ["run[ab]", "run*", "run[!b]"])
def test_a_folder_is_no_pattern(tmp_path, folder):
    for name, answer in (("runa", "wrong"), (folder, "right")):
        (tmp_path / name).mkdir()
        Dataset.from_list([{"problem": answer}]).to_parquet(tmp_path / name / "train-0.parquet")
        Dataset.from_list([{"problem": answer}]).save_to_disk(tmp_path / name / "saved")
    assert load_rows(str(tmp_path / folder))["problem"][:] == ["right"]
    assert load_rows(str(tmp_path / folder / "saved"))["problem"][:] == ["right"]


ANSWERS = [
    "007",
    "1e3",
    "1_000",
    "1.10",
    "true",
    "NA",
    "None",
    "null",
    "2025-01-01",
    "2025_01_01",
    "0x1F",
    "-0",
    "inf",
]


@pytest.mark.parametrize("extension", ["csv", "jsonl", "json"])
@pytest.mark.parametrize(
    "answers", [*([answer] for answer in ANSWERS), ANSWERS, ["2024-02-30", "2024-02-29"]], ids=repr
)
def test_answers_in_text_files_stay_the_text_that_they_are(tmp_path, extension, answers):
    rows = [{"problem": "p", "answer": answer} for answer in answers]
    path = tmp_path / f"rows.{extension}"
    if extension == "csv":
        path.write_text("problem,answer\n" + "".join(f"p,{answer}\n" for answer in answers))
    else:
        WRITERS[f"rows.{extension}"](rows, path)
    assert load_rows(str(path))["answer"][:] == answers


def test_dates_inside_structures_of_a_json_file_stay_text(tmp_path):
    rows = [{"answer": {"day": f"2024-02-0{i}T10:00:00Z", "days": ["2024-01-01"]}, "size": i} for i in (1, 2)]
    write_jsonl(rows, tmp_path / "rows.jsonl")
    assert load_rows(str(tmp_path / "rows.jsonl"))[:] == {
        "answer": [row["answer"] for row in rows],
        "size": [row["size"] for row in rows],
    }


def test_an_empty_cell_of_a_csv_is_none_and_a_column_needs_no_name(tmp_path):
    (tmp_path / "rows.csv").write_text(",problem,answer\n0,p,\n1,q,5\n", encoding="utf-8-sig")
    rows = load_rows(str(tmp_path / "rows.csv"))
    assert rows["problem"][:] == ["p", "q"] and rows["answer"][:] == [None, "5"]


@pytest.mark.parametrize("size", [(300, 200), (640, 480), (1, 1), (3000, 2000), (511, 513), (50, 2000)])
def test_sizes_are_scaled_to_the_bounds_as_easyr1_does(size):
    width, height = size
    for bound, is_beyond in ((1_000_000, int.__gt__), (262_144, int.__lt__)):
        if is_beyond(width * height, bound):
            factor = (bound / (width * height)) ** 0.5
            width, height = int(width * factor), int(height * factor)
    assert fit_to_bounds(size, 262_144, 1_000_000) == (width, height)
    assert fit_to_bounds(size, None, None) == size


def test_an_image_is_resized_without_loss_and_only_where_it_must_be():
    red = picture(56, 28)
    assert resize_encoded(red, (56, 28)) is red
    other = Image.open(io.BytesIO(resize_encoded(red, (112, 57))))
    assert other.size == (112, 57) and other.format == "PNG" and other.getextrema() == ((255, 255), (0, 0), (0, 0))


@pytest.mark.parametrize(
    "answers",
    [
        ["1", 2, "two"],
        [5, "007", "1e3", "true", "null", "[1]", '"q"'],
        [{"b": "1"}, {"b": 2}],
        [["1", 2], [3]],
        [True, "true"],
        [["1"], "1", "2025-01-01"],
    ],
)
@pytest.mark.parametrize("as_list", [False, True])
def test_a_json_column_of_several_types_keeps_each_value_as_it_is_written(tmp_path, answers, as_list):
    rows, file = [{"answer": answer} for answer in answers], tmp_path / "rows.json"
    file.write_text(json.dumps(rows)) if as_list else write_jsonl(rows, file)
    loaded = load_rows(str(file))["answer"][:]
    assert loaded == answers and [type(value) for value in loaded] == [type(value) for value in answers]


@pytest.mark.parametrize("answers", [[10**30], [5, 2**64], [0.5, 2**53 + 1], [{"x": 0.5}, {"x": -(2**54) - 1}]])
def test_a_whole_number_that_would_be_rounded_is_named(tmp_path, answers):
    write_jsonl([{"answer": answer} for answer in answers], tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match=r"rows.jsonl.*the number -?\d{16,} would be rounded to .*; write it as text"):
        load_rows(str(tmp_path / "rows.jsonl"))


def test_long_numbers_that_nothing_rounds_are_taken(tmp_path):
    rows = [{"id": 2**53 + 1, "x": 0.12345678901234567}, {"id": 2**63 - 1, "x": 1e300}]
    write_jsonl(rows, tmp_path / "rows.jsonl")
    assert list(load_rows(str(tmp_path / "rows.jsonl"))) == rows


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "rows.arrow"])
def test_an_empty_file_is_named_alone_and_among_others(tmp_path, name):
    (tmp_path / name).touch()
    for locator in (tmp_path / name, tmp_path):
        with pytest.raises(DataError, match=f"{name} is empty"):
            load_rows(str(locator))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("rows.jsonl", '{"a": 1}\n{"a":\n', "line 2: no JSON"),
        ("rows.jsonl", '{"a": 1}\r\n\r\n{"a": 1},\r\n', "line 3: no JSON .Extra data"),
        ("rows.json", '[{"a": 1},\n {"a": 2},\n]', "line 3: no JSON"),
        ("rows.jsonl", '{"a": 1}\n{"a": 1, "a": 2}\n', "specified twice in row 1"),
        ("rows.csv", "a,b\n1,2\n3,4,5\n", "line 3, saw 3"),
    ],
)
def test_the_line_that_breaks_a_file_is_named(tmp_path, name, text, words):
    (tmp_path / name).write_bytes(text.encode())
    with pytest.raises(DataError, match=f"{name}.*{words}"):
        load_rows(str(tmp_path / name))


@pytest.mark.parametrize("head", ["a,a", "\ufeffa,b,a", '"a",a', "b,a,a,b"])
def test_a_csv_with_two_columns_of_a_name_is_refused(tmp_path, head):
    (tmp_path / "rows.csv").write_text(f"{head}\n{','.join('1' * (head.count(',') + 1))}\n")
    with pytest.raises(DataError, match="rows.csv has two columns 'a'; rename or remove one"):
        load_rows(str(tmp_path / "rows.csv"))
    (tmp_path / "rows.csv").write_text("a,,\n1,2,3\n")
    assert load_rows(str(tmp_path / "rows.csv"))[0]["a"] == "1"

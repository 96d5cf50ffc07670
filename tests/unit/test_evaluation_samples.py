"""Every benchmark row reads data of its own schema; what is wrong with a row or a path is named."""

import io
import random

import datasets
import pytest
from PIL import Image

from evaluation.benchmarks import BENCHMARKS, FULL_TEMPLATE
from evaluation.samples import IMAGE_MARK, build_request, find_files, load_samples, parse_list, select_samples
from evaluation.scoring import grade_response
from spatialthinker.prompts import PROMPTS
from spatialthinker.schema import parquet_path, write_parquet
from spatialthinker.synthetic import generate

STRING_LISTS = ("mmmu_pro", "mmmu_pro_vision_only", "mmmu-pro-vision")


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def png(size=(40, 30), color="red", **options):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG", **options)
    return {"bytes": buffer.getvalue(), "path": None}


def fixture_rows(name):
    """Two rows in the schema of a benchmark; the second one's answer is its second choice."""
    benchmark = BENCHMARKS[name]
    answers = {"choice": ("A", "(B)"), "value": ("A", "7"), "choice_or_value": ("A", "7.5"), "flag": ("1", "0")}
    rows = []
    for index in range(2):
        row = {column: png() if i == 0 or index == 0 else None for i, column in enumerate(benchmark.images)}
        row[benchmark.answer] = answers[benchmark.reference][index]
        if benchmark.question:
            row[benchmark.question] = f"What is this, number {index}?"
        if benchmark.choices:
            choices = ["dog", "cat"] if index == 0 or benchmark.reference == "choice" else []
            row[benchmark.choices] = str(choices) if name in STRING_LISTS else choices
        if benchmark.task:
            row[benchmark.task] = f"task {index}"
        if benchmark.prompt:
            row[benchmark.prompt] = f"{IMAGE_MARK}Image size: (40 x 30) number {index}"
        if benchmark.ground_truth:
            row[benchmark.ground_truth] = "<scene>{}</scene>"
        rows.append(row)
    return rows


def save_rows(rows, folder, split, images):
    folder.mkdir(exist_ok=True)
    table = datasets.Dataset.from_list(rows)
    for column in images:
        table = table.cast_column(column, datasets.Image())
    table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_reads_its_own_schema(name, tmp_path):
    benchmark = BENCHMARKS[name]
    path = save_rows(fixture_rows(name), tmp_path / "data", benchmark.split, benchmark.images)
    first, second = load_samples(name, benchmark, path)
    assert (first.id, second.id) == ("000000", "000001")
    assert (first.task, second.task) == (("task 0", "task 1") if benchmark.task else (None, None))
    for template in benchmark.templates:
        request = build_request(first, template)
        assert len(request.images) == len(benchmark.images) == request.prompt.count(IMAGE_MARK)
        if template in ("spatial_thinker", FULL_TEMPLATE):
            assert "(40 x 30)" in request.prompt
    assert len(build_request(second, benchmark.templates[0]).images) == 1
    for sample in (first, second):
        right = f"<answer>({sample.reference})</answer>" if sample.reference.letter else sample.reference.text
        assert grade_response(right, sample.choices, sample.reference, "stop").is_correct
        assert not grade_response("nothing", sample.choices, sample.reference, "stop").is_correct


def test_every_template_belongs_to_a_prompt():
    for name, benchmark in BENCHMARKS.items():
        assert set(benchmark.templates) <= PROMPTS.keys(), name


def test_the_training_prompt_is_the_row_s_own(tmp_path):
    rows = [row for _, row in generate(3, seed=1)]
    write_parquet(rows, parquet_path(tmp_path / "data", "val"))
    samples = load_samples("stvqa", BENCHMARKS["stvqa"], str(tmp_path / "data"))
    for sample, row in zip(samples, rows, strict=True):
        assert build_request(sample, FULL_TEMPLATE).prompt == row.problem
        assert (sample.reference.letter, sample.choices) == (row.answer_only, tuple(row.options))
        assert (sample.task, sample.ground_truth) == (row.category, row.answer_option_text)


def test_images_are_turned_upright_and_left_encoded_until_asked_for(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    rows = [fixture_rows("mmvp")[0] | {"image": png(exif=exif)}, fixture_rows("mmvp")[0]]
    rows[1]["image"] = {"bytes": rows[1]["image"]["bytes"][:60], "path": None}
    path = save_rows(rows, tmp_path / "data", "train", ["image"])
    turned, broken = load_samples("mmvp", BENCHMARKS["mmvp"], path)
    assert build_request(turned, "reasoning").images[0].size == (30, 40)
    with pytest.raises(ValueError, match="item 000001: its image cannot be decoded"):
        build_request(broken, "reasoning")


def test_a_row_without_image_is_an_error_of_that_item(tmp_path):
    rows = [row | {"image": png() if index else None} for index, row in enumerate(fixture_rows("mmvp"))]
    path = save_rows(rows, tmp_path / "data", "train", ["image"])
    with pytest.raises(ValueError, match="item 000000: no image"):
        build_request(load_samples("mmvp", BENCHMARKS["mmvp"], path)[0], "reasoning")


def test_faults_of_the_data_are_named(tmp_path):
    rows = fixture_rows("stvqa")
    short = [{key: value for key, value in row.items() if key != "options"} for row in rows]
    path = save_rows(short, tmp_path / "short", "val", ["images"])
    with pytest.raises(ValueError, match="stvqa: no column options; the data has images"):
        load_samples("stvqa", BENCHMARKS["stvqa"], path)
    path = save_rows([rows[0], rows[1] | {"answer_only": "E"}], tmp_path / "wrong", "val", ["images"])
    with pytest.raises(ValueError, match="stvqa, row 1: answer 'E' names none of the choices"):
        load_samples("stvqa", BENCHMARKS["stvqa"], path)
    with pytest.raises(FileNotFoundError, match="nowhere: no such data file or folder"):
        load_samples("stvqa", BENCHMARKS["stvqa"], str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="no data file of split 'test'; found val-00000-of-00001.parquet"):
        load_samples("stvqa", BENCHMARKS["stvqa"], path, "test")


def test_files_of_a_split(tmp_path):
    for name in ("train-00000-of-00001.parquet", "validation-00000-of-00001.parquet", "README.md"):
        (tmp_path / name).touch()
    assert [path.name for path in find_files(tmp_path, "val")] == ["validation-00000-of-00001.parquet"]
    assert find_files(tmp_path / "train-00000-of-00001.parquet", "val")
    with pytest.raises(ValueError, match="not one of"):
        find_files(tmp_path / "README.md", "val")


def test_items_are_shuffled_first_and_then_cut(tmp_path):
    rows = [fixture_rows("stvqa")[0] | {"problem": f"{IMAGE_MARK}{index}"} for index in range(30)]
    benchmark = BENCHMARKS["stvqa"]
    path = save_rows(rows, tmp_path / "data", "val", ["images"])
    samples = load_samples("stvqa", benchmark, path)
    order = list(range(30))
    random.Random(42).shuffle(order)
    chosen = select_samples(samples, benchmark, 42, 5)
    assert [int(sample.id) for sample in chosen] == order[:5]
    assert select_samples(samples, BENCHMARKS["3dsrbench_full"], 42, None) == samples


@pytest.mark.parametrize(
    "text",
    [
        "['a b', \"it's\"]",
        '["a b", "it\'s"]',
        "['a b' \"it's\"]",
        "['a b'\n \"it's\"]",
        ["a b", "it's"],
        ("a b", "it's"),
    ],
)
def test_lists_in_any_notation(text):
    assert parse_list(text) == ("a b", "it's")


def test_odd_lists():
    assert parse_list(None) == parse_list("") == parse_list("[]") == ()
    assert parse_list("[1, 2.5]") == ("1", "2.5")
    for text in ("a, b", "['a', b(]", "{'a': 1}", "['a"):
        with pytest.raises(ValueError, match="is no list"):
            parse_list(text)

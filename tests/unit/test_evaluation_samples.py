"""Every benchmark row reads data of its own schema; what is wrong with a row or a path is named."""

import io
import json
import random

import datasets
import pytest
from PIL import Image

from evaluation.benchmarks.benchmark import FULL_TEMPLATE
from evaluation.benchmarks.choices import find_choices, parse_list
from evaluation.benchmarks.data_files import find_files
from evaluation.benchmarks.rows import BENCHMARKS
from evaluation.benchmarks.samples import _build_sample, build_request, load_samples, select_samples
from evaluation.benchmarks.templates import check_template_file, render_question
from spatialthinker.prompts import IMAGE_MARK, PROMPTS
from spatialthinker.schema import parquet_path, write_parquet
from spatialthinker.synthetic import generate
from tests.support.benchmark_rows import PICTURE, ROWS, png, write_benchmark


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def picture(**options):
    return {"bytes": png(**options), "path": None}


def fixture_rows(name):
    return [dict(row) for row in ROWS[name]]


def save_rows(rows, folder, split, images):
    folder.mkdir(exist_ok=True)
    table = datasets.Dataset.from_list(rows)
    for column in images:
        table = table.cast_column(column, datasets.Image())
    table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


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
    rows = [fixture_rows("mmvp")[0] | {"image": picture(exif=exif)}, fixture_rows("mmvp")[0]]
    rows[1]["image"] = {"bytes": rows[1]["image"]["bytes"][:60], "path": None}
    path = save_rows(rows, tmp_path / "data", "train", ["image"])
    turned, broken = load_samples("mmvp", BENCHMARKS["mmvp"], path)
    assert build_request(turned, "reasoning").images[0].size == (30, 40)
    with pytest.raises(ValueError, match="item 000001: its image cannot be decoded"):
        build_request(broken, "reasoning")


def test_a_row_without_image_is_an_error_of_that_item(tmp_path):
    rows = [row | {"image": PICTURE if index else None} for index, row in enumerate(fixture_rows("mmvp"))]
    path = save_rows(rows, tmp_path / "data", "train", ["image"])
    with pytest.raises(ValueError, match="item 000000: no image"):
        build_request(load_samples("mmvp", BENCHMARKS["mmvp"], path)[0], "reasoning")


def test_a_missing_image_file_is_an_error_of_that_item(tmp_path):
    write_benchmark("omnispatial", tmp_path / "data", "test")
    (tmp_path / "data" / "image_files/Complex_Logic/1.png").unlink()
    samples = load_samples("omnispatial", BENCHMARKS["omnispatial"], str(tmp_path / "data"))
    with pytest.raises(ValueError, match=r"item 000000: its image cannot be read: .*1\.png"):
        build_request(samples[0], "reasoning")


def test_a_jpeg_that_was_cut_off_is_an_error_of_that_item(tmp_path):
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(buffer, "JPEG")
    for size, is_whole in ((None, True), (len(buffer.getvalue()) // 2, False)):
        row = fixture_rows("mmvp")[0] | {"image": {"bytes": buffer.getvalue()[:size], "path": None}}
        path = save_rows([row], tmp_path / str(size), "train", ["image"])
        (sample,) = load_samples("mmvp", BENCHMARKS["mmvp"], path)
        if is_whole:
            assert build_request(sample, "reasoning").images[0].size == (64, 64)
            continue
        with pytest.raises(ValueError, match="item 000000: its image cannot be decoded: image file is truncated"):
            build_request(sample, "reasoning")


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
    with pytest.raises(ValueError, match="a cell of 60000 characters is no list; the limit is 50000"):
        parse_list("['a', ".ljust(59_999) + "]")
    assert len(parse_list(json.dumps(["a"] * 20_000))) == 20_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": []}, "no choices in the row"),
        ({"options": [None, "b"]}, "empty element before another"),
        ({"options": "left, right"}, "is no list"),
        ({"options": [f"choice {i}" for i in range(27)]}, "27 choices, at most 26"),
        ({"question_with_options": "  "}, "question_with_options is empty"),
        ({"answer_only": None}, "the answer column is empty"),
    ],
)
def test_a_faulty_row_is_named_with_its_fault(change, message):
    row = ROWS["stvqa"][0] | change
    with pytest.raises(ValueError, match=message):
        _build_sample(BENCHMARKS["stvqa"], 0, "000000", row)


def test_integer_labels_and_many_options_are_read():
    lettered = ROWS["stvqa"][0] | {"options": ["(A) dog", "(B) cat"], "answer_only": "(B) cat"}
    sample = _build_sample(BENCHMARKS["stvqa"], 0, "000000", lettered)
    assert (sample.choices, sample.reference.letter) == (("dog", "cat"), "B")
    row = ROWS["stvqa"][0] | {"options": [f"choice {i}" for i in range(12)], "answer_only": 10}
    sample = _build_sample(BENCHMARKS["stvqa"], 0, "000000", row)
    assert (sample.reference.letter, sample.reference.text) == ("K", "choice 10")


def test_a_limit_holds_for_each_task():
    samples = [
        _build_sample(BENCHMARKS["lego"], i, f"{i:06d}", ROWS["lego"][0] | {"category": "ab"[i % 3 == 0]})
        for i in range(12)
    ]
    chosen = select_samples(samples, BENCHMARKS["lego"], 42, limit_per_task=2)
    assert sorted(sample.task for sample in chosen) == ["a", "a", "b", "b"]
    assert len(select_samples(samples, BENCHMARKS["lego"], 42, 3, 2)) == 3


def test_several_images_state_each_size():
    prompt = render_question("spatial_thinker", "Which?", (), [(40, 30), (20, 10)])
    assert "Image size: (40 x 30)\nSize of image 2: (20 x 10)" in prompt


def test_a_template_may_be_a_file(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(
        "{{ question }} {{ width }}x{{ height }}{% for c in choices %} {{ letters[loop.index0] }}={{ c }}{% endfor %}"
    )
    assert render_question(str(path), "Which?", ("dog", "cat"), [(40, 30)]) == "Which? 40x30 A=dog B=cat"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ question }", "line 1"),
        ("{{ question }} {{ widht }}", "unknown variable 'widht'; known: question"),
        ("Think.", "does not use"),
    ],
)
def test_a_faulty_template_file_is_named(text, message, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        check_template_file(str(path))


@pytest.mark.parametrize(
    "code",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('touch {path}').read() }}",
        "{{ question.__class__.__base__.__subclasses__() }}",
        "{{ choices.append('e') }}",
    ],
)
def test_a_template_file_runs_no_code(code, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{{ question }} " + code.replace("{path}", str(tmp_path / "ran")))
    with pytest.raises(ValueError, match=r"mine\.jinja: "):
        render_question(str(path), "Which?", ("dog", "cat"), [(40, 30)])
    assert not (tmp_path / "ran").exists()


def test_more_choices_than_letters_are_cut_at_the_last_letter():
    question = "Which? " + " ".join(f"{letter}. item {letter}" for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZBC")
    assert len(find_choices(question)) == 26
    assert find_choices("A. x " * 1000) == ()
    assert find_choices("A. x " * 1000 + "B. y") == ("x", "y")


@pytest.mark.parametrize("text", ["[" * 100_000 + "]", "['" + "\\'" * 1000 + "]", "['a' b 'c']"])
def test_a_list_that_is_none_is_one_error(text):
    with pytest.raises(ValueError, match="is no list"):
        parse_list(text)

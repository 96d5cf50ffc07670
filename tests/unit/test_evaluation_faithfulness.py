"""What answers rest on: further passes over one engine, their journals, figures by hand, tables and the page."""

import json

import datasets
import pytest

from evaluation import compare, evals
from evaluation.benchmarks.interventions import GREY, blank_images, give_scene, true_scene
from evaluation.benchmarks.rows import BENCHMARKS
from evaluation.benchmarks.samples import build_request, load_samples
from evaluation.engines.api import make_request
from evaluation.engines.local import Answer, ModelOptions
from evaluation.engines.replicas import LOCAL_BACKENDS
from evaluation.reports.faithfulness import measure_faithfulness
from evaluation.reports.intervals import wilson_interval
from spatialthinker.schema import parquet_path, read_parquet, write_parquet
from spatialthinker.synthetic import generate, gold_response
from tests.support.tiny_model_folder import save_tiny_model

ITEMS = 18  # two of each category


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_parquet([row for _, row in generate(ITEMS, seed=3, split="val")], parquet_path(folder, "val"))
    return folder


@pytest.fixture(autouse=True)
def private_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="module")
def gold(data_dir):
    return [gold_response(row) for row in read_parquet(parquet_path(data_dir, "val"))]


def run(data_dir, out_dir, *more, model_dir=None):
    if model_dir is None:
        model_dir = out_dir / "model"
        model_dir.mkdir(parents=True, exist_ok=True)
        (model_dir / "config.json").write_text("{}")
        (model_dir / "model.safetensors").write_bytes(b"0")
    arguments = ["--dataset", "stvqa", "--template", "spatial_thinker_full", "--max_tokens", "4", "--output_dir"]
    arguments += [str(out_dir), "--data_path", str(data_dir), "--model_path", str(model_dir)]
    return evals.main([*arguments, "--custom_filename", "run", *more])


def summary_of(out_dir):
    return json.loads((out_dir / "run.summary.json").read_text())


@pytest.fixture
def answerer(gold, monkeypatch):
    """Right where the image is seen or the true scene is given, else the last letter; notes loads and questions."""

    class Answerer:
        loads: list[ModelOptions] = []
        asked: list[tuple[str, str]] = []
        broken: set[str] = set()

        def __init__(self, options):
            self.options = options
            self.loads.append(options)

        def answer(self, samples):
            for sample in samples:
                request = build_request(sample, self.options.template)
                colours = {image.getcolors() is not None and len(image.getcolors()) for image in request.images}
                is_blank, own = colours == {1}, gold[int(sample.id)]
                self.asked.append(("given" if sample.prefix else "blank" if is_blank else "own", sample.id))
                if is_blank and sample.id in self.broken:
                    yield sample, Answer(error=f"item {sample.id}: broken")
                elif is_blank:
                    yield sample, Answer(request.prompt, "<answer>(A)</answer>", "stop", cost_usd=0.5)
                else:
                    yield sample, Answer(request.prompt, own, "stop", cost_usd=0.5)

    monkeypatch.setitem(LOCAL_BACKENDS, "huggingface", Answerer)
    Answerer.loads, Answerer.asked, Answerer.broken = [], [], set()
    return Answerer


def test_three_passes_take_one_load_and_are_figures_with_intervals(data_dir, tmp_path, answerer, capsys):
    assert run(data_dir, tmp_path, "--faithfulness") == 0
    assert len(answerer.loads) == 1 and len(answerer.asked) == 3 * ITEMS == len(set(answerer.asked))
    printed = capsys.readouterr().out
    assert "stvqa: 36 further answers for blank, true_scene, about 18.0000 dollars" in printed
    assert "answers that follow from the model's own scene" in printed and "further passes cost 18.0000" in printed
    summary = summary_of(tmp_path)
    found = summary["faithfulness"]
    assert (found["follows"]["asked"], found["follows"]["n"], found["follows"]["correct"]) == (16, 16, 16)
    assert found["kinds"]["count"] == {"asked": 2, "decided": 2, "followed": 2} and "orientation" not in found["kinds"]
    right = sum(row.answer_only == "A" for row in read_parquet(parquet_path(data_dir, "val")))
    assert (found["blank"]["n"], found["blank"]["correct"]) == (ITEMS, right)
    assert (found["blank"]["accuracy_low"], found["blank"]["accuracy_high"]) == wilson_interval(right, ITEMS)
    assert (found["true_scene"]["accuracy"], found["cost_usd"], summary["cost_usd"]) == (1, 18, 9)


def test_passes_go_on_where_they_stopped_and_may_come_later(data_dir, tmp_path, answerer, capsys):
    assert run(data_dir, tmp_path) == 0 and summary_of(tmp_path)["faithfulness"] is None
    answerer.broken = {"000003"}
    assert run(data_dir, tmp_path, "--faithfulness", "--resume") == 2
    assert "pass blank: item 000003: broken" in capsys.readouterr().err
    assert summary_of(tmp_path)["faithfulness"]["blank"]["errors"] == 1
    assert len(answerer.asked) == 3 * ITEMS
    journal = tmp_path / "run.true_scene.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:6]))
    answerer.broken, answerer.asked = set(), []
    assert run(data_dir, tmp_path, "--faithfulness", "--resume") == 0
    assert answerer.asked[0] == ("blank", "000003") and len(answerer.asked) == 1 + ITEMS - 5
    assert run(data_dir, tmp_path, "--faithfulness", "--resume") == 0 and len(answerer.loads) == 3
    assert run(data_dir, tmp_path, "--faithfulness", "--resume", "--max_tokens", "9") == 2


def test_a_model_that_ignores_its_scene_does_not_follow_it(data_dir, gold):
    samples = load_samples("stvqa", BENCHMARKS["stvqa"], str(data_dir))
    marks = []
    for sample, text in zip(samples, gold, strict=True):
        last = "ABCD"[len(sample.choices) - 1]
        text = text.replace(text[text.index("<answer>") :], f"<answer>({last})</answer>")
        marks.append((sample, evals.grade(sample, Answer(sample.prompt, text, "stop"), BENCHMARKS["stvqa"])))
    found = measure_faithfulness(marks, {})
    decided = [record.correct for sample, record in marks if sample.task != "orientation"]
    assert found["follows"]["n"] == 16 and found["follows"]["correct"] == sum(decided) < 16
    silent = [(sample, evals.grade(sample, Answer("", "", "stop"), BENCHMARKS["stvqa"])) for sample in samples]
    nothing = measure_faithfulness(silent, {})["follows"]
    assert (nothing["asked"], nothing["n"], nothing["accuracy_low"], nothing["accuracy_high"]) == (16, 0, 0, 1)


def test_blank_images_keep_their_sizes_and_a_true_scene_stands_in_the_models_own_words(data_dir, gold):
    sample = load_samples("stvqa", BENCHMARKS["stvqa"], str(data_dir))[0]
    (image,), (blank,) = sample.read_images(), blank_images(sample).read_images()
    assert blank.size == image.size and blank.getcolors() == [(image.width * image.height, GREY)]
    scene = (true_scene(sample) or "").strip()
    own = "<observe>A cat.</observe>\n<scene>{}</scene><think>x</think><answer>(A)</answer>"
    given = give_scene(sample, own)
    assert given.prefix == f"<observe>A cat.</observe>\n<scene>\n{scene}\n</scene>\n"
    assert give_scene(sample, "no scene at all").prefix == f"<scene>\n{scene}\n</scene>\n"
    _, request = make_request(given, ModelOptions("a", "spatial_thinker_full"))
    assert request.text.endswith(f"Repeat it word for word and go on from there:\n{given.prefix}")


def test_an_engine_goes_on_from_the_true_scene(data_dir, tmp_path):
    model_dir = save_tiny_model(tmp_path / "tiny")
    assert run(data_dir, tmp_path, "--faithfulness", "--num_samples", "4", model_dir=model_dir) == 0
    lines = [json.loads(line) for line in (tmp_path / "run.true_scene.jsonl").read_text().splitlines()]
    assert lines[0]["settings"]["pass"] == "true_scene" and len(lines) == 5
    for line in lines[1:]:
        assert line["reasoning"].startswith("<scene>\n{") and line["response_tokens"] <= 4


def test_comparisons_and_their_page_show_the_figures(data_dir, tmp_path, answerer, capsys):
    for name in ("one", "two"):
        assert run(data_dir, tmp_path / name, "--faithfulness") == 0
    out = tmp_path / "comparison"
    assert compare.main([str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(out), "--published", "none"]) == 0
    table = json.loads((out / "table.json").read_text())["faithfulness"]
    assert list(table) == [
        "stvqa: answers that follow from the model's own scene",
        "stvqa: accuracy with the image blanked",
        "stvqa: accuracy with the true scene given",
    ]
    assert all(len(row) == 2 for row in table.values())
    assert "| stvqa: accuracy with the true scene given | 100.0 [82.4, 100.0], n 18 |" in capsys.readouterr().out
    page = (out / "index.html").read_text()
    assert "accuracy with the image blanked" in page and page.count("Its scene leads to (") == 2 * 16
    (tmp_path / "one" / "run.summary.json").write_text("[")
    assert compare.main([str(tmp_path / "one"), "--out", str(out)]) == 2
    assert "run.summary.json: damaged" in capsys.readouterr().err

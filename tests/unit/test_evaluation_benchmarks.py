"""Every benchmark goes through the whole program, its rows in the columns of its own data set."""

import json
from itertools import cycle

import datasets
import pytest

from evaluation import evals
from evaluation.benchmarks.benchmark import FULL_TEMPLATE
from evaluation.benchmarks.choices import find_choices
from evaluation.benchmarks.rows import BENCHMARKS, SUITES
from evaluation.benchmarks.samples import _build_sample, build_request, load_samples
from evaluation.command_line import list_members, parse_arguments
from evaluation.engines.local import Answer
from evaluation.engines.replicas import LOCAL_BACKENDS
from evaluation.reports.summary import summarize
from spatialthinker.prompts import IMAGE_MARK
from tests.support.benchmark_rows import ROWS, png, write_benchmark

STYLES = (
    "{letter}",
    "({letter})",
    "**{letter}**",
    "\\boxed{{{letter}}}",
    "{letter}.",
    "({letter}) {text}",
    "{letter}. {text}",
    "{text}",
    "{upper}",
    "Answer: ({letter})",
    "<think>It could be (A) or (B).</think><answer>{letter}: {text}</answer>",
    "The correct answer is ({letter}).",
    "<answer> ({letter}) {upper} </answer>",
)


def write_answer(sample, style):
    """A right answer; open ones have no letter."""
    reference = sample.reference
    if reference.form == "points":
        return "<answer>[(0.5, 0.5), (0.25, 0.75)]</answer>"
    if reference.letter is None:
        return f"<answer>{reference.text}</answer>"
    text = reference.text or reference.letter
    box = f" {list(reference.box)}" if reference.box else ""
    return style.format(letter=reference.letter, text=text, upper=text.upper()) + box


class PerfectAnswerer:
    """Right in another style each time."""

    def __init__(self, options):
        self.options = options

    def answer(self, samples):
        for sample, style in zip(samples, cycle(STYLES), strict=False):
            request = build_request(sample, self.options.template)
            yield sample, Answer(prompt=request.prompt, text=write_answer(sample, style), finish_reason="stop")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    for name, benchmark in BENCHMARKS.items():
        write_benchmark(name, folder / "data" / name, benchmark.split)
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"0")
    arguments = ["--dataset", "all", "--template", "reasoning", "--model_path", str(model)]
    arguments += ["--data_path", str(folder / "data"), "--output_dir", str(folder / "out")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.setitem(LOCAL_BACKENDS, "huggingface", PerfectAnswerer)
        args = parse_arguments(arguments, None)
        yield args, *evals.prepare(args), folder / "out"


def test_every_benchmark_has_its_rows():
    assert ROWS.keys() == BENCHMARKS.keys()
    assert len(BENCHMARKS) >= 38


def test_a_perfect_answerer_is_right_everywhere(prepared, capsys):
    args, jobs, backend, out = prepared
    assert [job.dataset for job in jobs] == list(BENCHMARKS)
    assert evals.run(args, jobs, backend) == 0
    for name in BENCHMARKS:
        records = json.loads((out / f"{name}_model_reasoning_strict.json").read_text())
        assert [record["correct"] for record in records] == [1] * len(ROWS[name]), (name, records)
        summary = json.loads((out / f"{name}_model_reasoning_strict.summary.json").read_text())
        assert summary["parse_failure_rate"] == 0
        assert all(group["accuracy"] == 1 and group["n"] for group in summary["groups"].values()), name
        assert name in (out / f"{name}_model_reasoning_strict.summary.md").read_text()
    assert f"mean accuracy over {len(BENCHMARKS)} data sets: 1.000" in capsys.readouterr().out


def test_a_constant_letter_has_its_base_rate_and_silence_nothing(prepared):
    _, jobs, _, _ = prepared
    for job in jobs:
        for sample in job.samples:
            for scoring in ("strict", "paper"):
                silent = evals.grade(sample, Answer(text="", finish_reason="stop"), job.benchmark, scoring)
                assert silent.correct == 0 and silent.kind == "unparsed"
            constant = evals.grade(sample, Answer(text="A", finish_reason="stop"), job.benchmark)
            is_right = sample.reference.letter == "A" and sample.reference.box is None
            assert constant.correct == int(is_right), job.dataset


def test_every_template_shows_every_image_and_the_size(prepared):
    for job in prepared[1]:
        for template in job.benchmark.templates:
            request = build_request(job.samples[0], template)
            assert request.prompt.count(IMAGE_MARK) == len(request.images) > 0, (job.dataset, template)
            if template in ("spatial_thinker", FULL_TEMPLATE):
                assert "Image size: (40 x 30)" in request.prompt
            if template == "reasoning":
                assert "directly" not in request.prompt


def test_groups_are_those_of_the_official_evaluations(prepared):
    jobs = {job.dataset: job for job in prepared[1]}
    groups = {name: sorted(sizes.values()) for name, sizes in jobs["3dsrbench_circular"].group_sizes.items()}
    assert groups == {"circular": [2, 2], "flip": [2, 2], "flip_circular": [4]}
    groups = {name: sorted(sizes.values()) for name, sizes in jobs["hallusionbench"].group_sizes.items()}
    assert groups == {"question_pair": [2], "figure": [1, 1]}
    assert dict(jobs["3dsrbench_full"].group_sizes["view"]) == {"0/height": 2}


def test_choices_are_read_from_questions():
    assert find_choices("Which?\nOptions: A: dog, B: cat, C: 1, 2, D: hen") == ("dog", "cat", "1, 2", "hen")
    assert find_choices("Is A. Smith left? A. Yes B. No") == ("Yes", "No")
    assert find_choices("Which?\n(A) dog\n(B) cat\nThink first.") == ("dog", "cat")
    assert find_choices("(A) " * 100_000 + "\n(A) dog\n(B) cat") == ("dog", "cat")
    assert find_choices("How many?") == find_choices("Only (A) one") == ()


def test_easi8_is_one_command_with_one_load_and_prints_its_table(prepared, tmp_path, capsys):
    args, jobs, _, _ = prepared
    loads = []

    class Answerer(PerfectAnswerer):
        def __init__(self, options):
            loads.append(options)
            super().__init__(options)

    arguments = ["--dataset", "easi8", "--template", "reasoning", "--model_path", args.model_path]
    arguments += ["--data_path", args.data_path, "--output_dir", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LOCAL_BACKENDS, "huggingface", Answerer)
        assert evals.main(arguments) == 0
    assert len(loads) == 1 and loads[0].images_per_prompt == 32
    printed = capsys.readouterr().out
    table = printed[printed.rindex("easi8 ") :].splitlines()
    assert [line.split(":")[0] for line in table[2:10]] == list(SUITES["easi8"])
    assert all("1.000 - 1.000" in line for line in table[2:11])
    assert table[10].split()[:2] == ["mean", str(sum(len(ROWS[name]) for name in list_members("easi8")) - 3)]


def test_a_silent_answerer_scores_0_by_every_own_rule(prepared):
    for job in prepared[1]:
        silent = [evals.grade(sample, Answer(text="", finish_reason="stop"), job.benchmark) for sample in job.samples]
        figures = summarize(silent, {}, job.group_sizes, rule=job.benchmark.rule)["official"]
        assert all(figure["value"] <= 0 for figure in figures.values()), job.dataset
        assert bool(figures) == (job.benchmark.rule is not None)


def test_the_right_choice_of_sat_has_no_fixed_place():
    row = ROWS["sat"][0]
    letters = {_build_sample(BENCHMARKS["sat"], i, f"{i:06d}", row).reference.letter for i in range(9)}
    assert letters == {"A", "B"}


def test_only_the_images_that_a_question_names_are_sent(tmp_path):
    rows = ROWS["mmmu_pro"]
    pictures = {f"image_{i}": {"bytes": png((10 * i, 10)), "path": None} for i in (1, 2, 3)}
    question = "How do <image 3> and <image 1> differ?"
    table = datasets.Dataset.from_list([row | pictures | {"question": question} for row in rows])
    for i in range(1, 4):
        table = table.cast_column(f"image_{i}", datasets.Image())
    (tmp_path / "data").mkdir()
    table.to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    sample, _ = load_samples("mmmu_pro", BENCHMARKS["mmmu_pro"], str(tmp_path / "data"))
    assert [image.size for image in build_request(sample, "reasoning").images] == [(30, 10), (10, 10)]


def test_the_context_of_a_question_stands_before_it(prepared):
    (job,) = (job for job in prepared[1] if job.dataset == "emma-chem")
    assert job.samples[0].question.startswith("A zoo.\n") or job.samples[1].question.startswith("A zoo.\n")

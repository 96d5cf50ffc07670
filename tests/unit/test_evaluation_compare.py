"""Comparisons: hand-worked statistics, the paper's own averages, and the page of runs on drawn scenes."""

import io
import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from evaluation import compare, evals
from evaluation.benchmarks.rows import BENCHMARKS, SUITES
from evaluation.benchmarks.samples import fingerprint_samples, load_samples
from evaluation.engines.local import Answer
from evaluation.journal import AnswerJournal, Record
from evaluation.reports.comparison import (
    AnsweredRun,
    Model,
    compare_models,
    compare_runs,
    find_journals,
    group_models,
    measure_accuracy,
    short_name,
)
from evaluation.reports.published import MODELS, PUBLISHED, match_model
from spatialthinker.schema import parquet_path, read_parquet, write_parquet
from spatialthinker.synthetic import generate, gold_response

ITEMS = 24
AVERAGES_OF_14 = {
    "GPT-5": 71.5,
    "GPT-4o": 65.8,
    "Qwen2.5-VL-3B": 56.8,
    "SFT-3B": 60.7,
    "Vanilla-GRPO-3B": 62.0,
    "SpatialThinker-3B": 65.9,
    "Qwen2.5-VL-7B": 62.8,
    "SFT-7B": 64.9,
    "Vanilla-GRPO-7B": 67.2,
    "SpatialThinker-7B": 70.5,
    "Qwen3-VL-30B-A3B": 68.1,
    "SpatialThinker-30B": 74.5,
}


def fake_run(
    marks: str, model: str = "a/base", benchmark: str = "mmvp", cluster_size: int | None = None, **settings
) -> AnsweredRun:
    """A run whose item i is right (1), wrong (0) or without an answer (-); neighbours form clusters of a size."""
    records = {
        str(i): Record("", "A", "", "A" if mark == "1" else "B", int(mark), None, id=str(i), kind="letter")
        if cluster_size is None
        else Record("", "A", "", "", int(mark), None, id=str(i), kind="letter", cluster=str(i // cluster_size))
        for i, mark in enumerate(marks)
        if mark != "-"
    }
    fixed = {"dataset": benchmark, "model_path": model, "template": "reasoning", "data_fingerprint": "d"}
    return AnsweredRun(Path(f"{model}_{benchmark}.jsonl"), fixed | settings, records, marks.count("-"))


def write_journal(folder: Path, data_dir: Path, name: str, share_right: float, **settings) -> Path:
    """A journal of evals.py for a model that sees the boxes a little off and is right this often."""
    rng = random.Random(name)
    samples = load_samples("stvqa", BENCHMARKS["stvqa"], str(data_dir))
    rows = read_parquet(parquet_path(data_dir, "val"))
    fixed = {"dataset": "stvqa", "template": "spatial_thinker_full", "model_path": f"models/{name}"}
    fixed["data_fingerprint"] = fingerprint_samples(samples)
    with AnswerJournal(folder / f"{name}.jsonl", fixed | settings, is_resumed=False) as journal:
        for index, (sample, row) in enumerate(zip(samples, rows, strict=True)):
            text = re.sub(r"\b\d+(?=[,\]])", lambda m: str(max(0, int(m[0]) + rng.randint(-4, 4))), gold_response(row))
            if rng.random() > share_right:
                text = re.sub(r"<answer>.*</answer>", "<answer> <b>(Z)</b> nowhere </answer>", text, flags=re.DOTALL)
            if index == 0:
                text = "<answer>I cannot see"
            journal.add(evals.grade(sample, Answer(row.problem, text, "stop", 300, 150), BENCHMARKS["stvqa"]))
    return journal.path


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_parquet([row for _, row in generate(ITEMS, seed=5, split="val")], parquet_path(folder, "val"))
    return folder


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory, data_dir):
    folder = tmp_path_factory.mktemp("runs")
    write_journal(folder, data_dir, "before", 0.3)
    write_journal(folder, data_dir, "later", 0.9)
    return folder


def test_a_leaderboard_has_a_row_for_each_line_with_a_paired_test():
    """BLINK's and SITE's benchmarks count as one; other rules than accuracy have their own figure."""
    marks = {"base": ("0011", "0101"), "other": ("1111", "0111")}
    models = []
    for name, (blink, rest) in marks.items():
        runs = {}
        for member in (each for line in SUITES["easi8"].values() for each in line):
            is_blink = member in SUITES["easi8"]["BLINK"]
            run = fake_run(blink if is_blink else rest, f"a/{name}", member)
            facts = {"id": "among_1", "choices": 4, "sizes": {"flip_circular": 2}}
            records = {
                item: replace(record, facts=facts, groups={"flip_circular": f"{int(item) // 2}"})
                for item, record in run.records.items()
            }
            runs[member] = replace(run, records=records)
        models.append(Model(name, {}, runs))
    comparison = compare_models([*models, Model("part", {}, {"mmvp": fake_run("11")})])
    rows = comparison["suites"]["easi8"]
    names = {line.partition(":")[0]: row for line, row in rows.items()}
    assert list(names) == [*SUITES["easi8"], "mean"]
    blink = names["BLINK"]
    assert blink["accuracy"]["base"]["n"] == 56 and blink["accuracy"]["base"]["accuracy"] == 0.5
    assert blink["accuracy"]["other"]["accuracy"] == 1
    difference = blink["difference"]["other"]
    assert (difference["gained"], difference["lost"], difference["n"]) == (28, 0, 56)
    assert difference["p_value"] == pytest.approx(2 / 2**28)
    assert names["EmbSpatial"]["difference"]["other"]["gained"] == 1
    for label in marks:
        values = [row["accuracy"][label]["accuracy"] for line, row in names.items() if line != "mean"]
        assert names["mean"]["accuracy"][label]["accuracy"] == pytest.approx(sum(values) / 8)
    assert names["mean"]["difference"] == {}
    text = compare.format_markdown(comparison)
    (line,) = (each for each in text.splitlines() if each.startswith("| BLINK: "))
    assert (
        line.startswith("| BLINK: accuracy | 50.0 [") and "+50.0" in line and "| easi8 | base | other | part |" in text
    )
    assert compare_models(models[:1] + [Model("part", {}, {"mmvp": fake_run("11")})])["suites"]["easi8"]
    assert compare_models([Model("part", {}, {"mmvp": fake_run("11")}), *models])["suites"] == {}
    mindcube = replace(models[0].runs["mindcube-tiny"], records=fake_run("0101").records)
    older = Model("older", {}, models[0].runs | {"mindcube-tiny": mindcube})
    assert compare_models([older])["suites"] == {}  # without the ids that MindCube's rule reads


@pytest.mark.parametrize(
    ("base", "other", "gained", "lost", "p_value"),
    [
        ("0000011111", "1111111111", 5, 0, 2 / 2**5),
        ("1100", "0011", 2, 2, 1.0),
        ("1" + "0" * 9, "0" + "1" * 9, 9, 1, 2 * (1 + 10) / 2**10),
        ("1010", "1010", 0, 0, 1.0),
    ],
)
def test_mcnemars_exact_test_by_hand(base, other, gained, lost, p_value):
    result = compare_runs(fake_run(base), fake_run(other))
    assert result is not None and (result["gained"], result["lost"]) == (gained, lost)
    assert result["p_value"] == pytest.approx(p_value)
    assert result["difference"] == pytest.approx((gained - lost) / len(base))


def test_the_bootstrap_interval_is_that_of_the_paired_differences():
    n, gained, lost = 1000, 120, 60
    result = compare_runs(
        fake_run("0" * gained + "1" * lost + "1" * (n - gained - lost)),
        fake_run("1" * gained + "0" * lost + "1" * (n - gained - lost)),
    )
    assert result is not None
    mean = (gained - lost) / n
    error = math.sqrt(((gained + lost) / n - mean**2) / n)
    assert (result["low"], result["high"]) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=2e-3)


def test_copies_of_an_item_in_one_cluster_add_no_certainty():
    base, other = "0" * 9 + "1" * 11, "1" * 9 + "0" + "1" * 10
    single = compare_runs(fake_run(base), fake_run(other))
    copies = ["".join(mark * 4 for mark in marks) for marks in (base, other)]
    clustered = compare_runs(*(fake_run(marks, cluster_size=4) for marks in copies))
    naive = compare_runs(*map(fake_run, copies))
    assert single is not None and clustered is not None and naive is not None
    assert (clustered["n"], clustered["gained"], clustered["difference"]) == (80, 36, single["difference"])
    assert [clustered[edge] for edge in ("low", "high")] == pytest.approx(
        [single[edge] for edge in ("low", "high")],
        abs=0.051,  # one item of 20
    )
    assert clustered["p_value"] == pytest.approx(single["p_value"], abs=0.006) and naive["p_value"] < 1e-5
    # Two views of one scene that move in opposite directions are no difference.
    assert compare_runs(fake_run("01", cluster_size=2), fake_run("10", cluster_size=2))["p_value"] == 1


def test_only_items_that_both_answered_count():
    result = compare_runs(fake_run("11--00"), fake_run("01-110"))
    assert result is not None and (result["n"], result["gained"], result["lost"]) == (4, 1, 1)
    assert compare_runs(fake_run("1--"), fake_run("-10")) is None
    assert measure_accuracy(fake_run("11--00"))["accuracy"] == 0.5 and measure_accuracy(fake_run("1--"))["errors"] == 2


def test_many_tests_are_adjusted_together_and_the_average_is_over_shared_benchmarks():
    bases = [fake_run("0" * 10, benchmark=name) for name in ("mmvp", "lego", "stvqa")]
    others = [fake_run("1" * right + "0" * (10 - right), "b/new", name) for right, name in ((10, "mmvp"), (5, "lego"))]
    result = compare_models(group_models([*bases, *others]))
    tests = {name: row["difference"].get("new") for name, row in result["benchmarks"].items()}
    assert tests["mmvp"]["p_value"] == pytest.approx(2 / 2**10) and tests["stvqa"] is None
    assert tests["mmvp"]["q_value"] == pytest.approx(2 * 2 / 2**10)  # smallest of two: doubled
    assert tests["lego"]["q_value"] == pytest.approx(tests["lego"]["p_value"])
    assert result["average"]["benchmarks"] == ["mmvp", "lego"]
    assert result["average"]["accuracy"]["new"]["accuracy"] == pytest.approx(0.75)
    difference = result["average"]["difference"]["new"]
    assert difference["difference"] == pytest.approx(0.75)
    # Of ten items each only lego's five vary: the mean's standard error is half of sqrt(0.25 / 10).
    assert difference["high"] - difference["low"] == pytest.approx(2 * 1.96 * 0.5 * math.sqrt(0.025), abs=0.06)


def test_models_are_told_apart_by_what_differs():
    same = [fake_run("10"), fake_run("01", benchmark="lego")]
    other_template = fake_run("11", template="spatial_thinker")
    models = group_models([*same, other_template])
    assert [model.label for model in models] == ["base (template reasoning)", "base (template spatial_thinker)"]
    assert list(models[0].runs) == ["mmvp", "lego"]
    with pytest.raises(ValueError, match="leave one out"):
        group_models([same[0], fake_run("11")])
    with pytest.raises(ValueError, match="different data of mmvp"):
        group_models([same[0], fake_run("11", "b/new", data_fingerprint="e")])


def test_short_names():
    assert short_name("Qwen/Qwen2.5-VL-3B-Instruct") == "Qwen2.5-VL-3B-Instruct"
    assert short_name("runs/x/checkpoints/global_step_36/actor/huggingface") == "x step 36"
    assert short_name("global_step_36/actor/huggingface/") == "global_step_36"


def test_published_figures_give_the_papers_own_averages():
    single = "3dsrbench cv-bench mmvp spatialreasoner spatialbench stvqa mindcube-tiny mmstar vstar realworld_qa"
    names = [*single.split(), "mme-realworld-lite", "robospatial", "hallusionbench"]
    for model, average in AVERAGES_OF_14.items():
        blink = (PUBLISHED["blink-spatial"][model] + PUBLISHED["blink-depth"][model]) / 2
        assert (sum(PUBLISHED[name][model] for name in names) + blink) / 14 == pytest.approx(average, abs=0.11), model
    for model, value in PUBLISHED["cv-bench"].items():
        halves = PUBLISHED["cv-bench-2D"][model], PUBLISHED["cv-bench-3D"][model]
        assert value == pytest.approx(sum(halves) / 2, abs=0.11), model


def test_published_models_are_found_by_name():
    assert match_model("Qwen/Qwen2.5-VL-3B-Instruct") == "Qwen2.5-VL-3B"
    assert match_model("OX-PIXL/SpatialThinker-7B") == "SpatialThinker-7B"
    assert match_model("gpt-4o-2024-05-13") == "GPT-4o"
    assert match_model("configs/toy_model") is None
    assert set(compare.DEFAULT_MODELS) <= set(MODELS)


def test_a_run_is_named_by_any_of_its_files(tmp_path):
    for name in ("a.jsonl", "a.json", "a.summary.json", "b.5.jsonl"):
        (tmp_path / name).touch()
    a, b = tmp_path / "a.jsonl", tmp_path / "b.5.jsonl"
    for name in ("a", "a.jsonl", "a.json", "a.summary.json"):
        assert find_journals([str(tmp_path / name)]) == [a]
    assert find_journals([str(tmp_path / "b.5"), str(tmp_path)]) == [b, a]


def page_items(page: str) -> Sequence[str]:
    return re.findall(r'<article class="card item".*?</article>', page, re.DOTALL)


def test_a_comparison_writes_table_figure_and_page(runs_dir, data_dir, tmp_path, capsys):
    names = [str(runs_dir / name) for name in ("before", "later.json")]
    arguments = ["--data_path", str(data_dir), "--out", str(tmp_path)]
    assert compare.main([*names, *arguments]) == 0
    facts = json.loads((tmp_path / "table.json").read_text())
    row = facts["benchmarks"]["stvqa"]
    assert facts["baseline"] == "before" and row["accuracy"]["later"]["n"] == ITEMS
    test = row["difference"]["later"]
    assert 0 < test["low"] < test["difference"] < test["high"] and test["q_value"] < 0.05
    table = (tmp_path / "table.md").read_text()
    assert f"**{100 * test['difference']:+.1f}**" in table and "| 92.5 | 92.8 |" in table
    assert table in capsys.readouterr().out
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "index.html").read_text()
    assert not re.search(r'(src|href|srcset)="(?!data:|#)', page)
    assert "http" not in re.sub(r"data:[^\"]*", "", page)
    items = page_items(page)
    assert len(items) == ITEMS
    assert all(item.count("data:image/webp") == 1 for item in items)  # one image, however many scenes over it
    assert sum(item.count("<use ") for item in items) == 2 * (ITEMS - 1)
    assert "Its scene graph cannot be read." in items[0] and 'data-verdicts="00"' in items[0]
    assert "&lt;b&gt;(Z)" in page and "<b>" not in page
    for item in items:
        assert ('data-disagreement="2"' in item) == bool(re.search(r'data-verdicts="(01|10)"', item))


def test_items_of_disagreement_come_first_and_a_page_may_have_none(runs_dir, data_dir, tmp_path):
    names = [str(runs_dir / name) for name in ("before", "later")]
    arguments = [*names, "--data_path", f"stvqa={data_dir}", "--out", str(tmp_path), "--published", "none"]
    assert compare.main([*arguments, "--page_items", "4"]) == 0
    page = (tmp_path / "index.html").read_text()
    assert page.count('data-disagreement="2"') == 4 and f"4 of {ITEMS} items" in page and "(paper)" not in page
    assert compare.main([*arguments, "--page_items", "0"]) == 0
    assert not page_items((tmp_path / "index.html").read_text())


def test_images_are_found_where_the_run_had_them(data_dir, tmp_path, capsys):
    for name, path in (("here", data_dir), ("gone", tmp_path / "gone")):
        write_journal(tmp_path / name, data_dir, name, 0.5, data_path=str(path), split="val")
        assert compare.main([str(tmp_path / name), "--out", str(tmp_path / name)]) == 0
        assert ("data:image/webp" in (tmp_path / name / "index.html").read_text()) == (name == "here")
    assert "stvqa on the page without images" in capsys.readouterr().err


def test_one_run_is_a_table_without_tests(runs_dir, data_dir, tmp_path):
    arguments = ["--data_path", str(data_dir), "--out", str(tmp_path), "--published", "GPT-4o"]
    assert compare.main([str(runs_dir / "later"), *arguments]) == 0
    table = (tmp_path / "table.md").read_text()
    assert "McNemar" not in table and "| GPT-4o (paper) |" in table and "| 77.0 |" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no journal"),
        (["{runs}/before", "--published", "GPT4o"], "nearest is 'GPT-4o'"),
        (["{runs}/before", "--page_items", "-1"], "at least 0"),
        (["{runs}/before", "--data_path", "lego={data}"], "the runs are of stvqa"),
        (["{runs}/before", "--data_path", "no/data"], "no/data: no such data file"),
        (["{runs}/before", "--data_path", "{other}"], "not the data of"),
        (["{other}/journal"], "not a line of a journal"),
        (["{runs}/before", "{other}/foreign"], "different data of stvqa"),
    ],
)
def test_bad_input_is_named_and_ends_with_2(arguments, message, runs_dir, data_dir, tmp_path, capsys):
    other = tmp_path / "other"
    write_parquet([row for _, row in generate(2, seed=6, split="val")], parquet_path(other, "val"))
    (other / "journal.jsonl").write_text("[1]\n")
    write_journal(other, other, "foreign", 1)
    places = {"runs": str(runs_dir), "data": str(data_dir), "other": str(other)}
    out = tmp_path / "out"
    assert compare.main([*(part.format(**places) for part in arguments), "--out", str(out)]) == 2
    assert message in capsys.readouterr().err and not out.exists()


def test_a_journal_without_answers_is_named(tmp_path, capsys):
    with AnswerJournal(tmp_path / "x.jsonl", {"dataset": "stvqa", "model_path": "m"}, is_resumed=False) as journal:
        journal.add(Record("", "A", "", "", 0, None, id="0", status="error", error="broken"))
    assert compare.main([str(tmp_path / "x"), "--out", str(tmp_path / "out")]) == 2
    assert "none of its 1 items has an answer" in capsys.readouterr().err


def test_models_need_not_share_a_benchmark(tmp_path):
    models = group_models([fake_run("10"), fake_run("11", "b/new", "lego")])
    comparison = compare_models(models, ["SpatialThinker-7B"])
    assert comparison["average"] is None and not comparison["benchmarks"]["lego"]["difference"]
    compare.draw_figure(comparison, tmp_path / "figure.png")
    assert "| lego |  | 100.0" in compare.format_markdown(comparison)
    assert isinstance(models[1], Model)


def test_a_question_of_two_images_shows_both_and_a_broken_one_says_so(tmp_path):
    import datasets

    columns: dict[str, Any] = {
        "prompt": ["Which view is from the left?\n(A) first (B) second"] * 2,
        "answer": ["(A)", "(B)"],
    }
    columns["choices"] = [["first", "second"]] * 2
    good = io.BytesIO()
    Image.new("RGB", (700, 350), "teal").save(good, "PNG")
    for name in ("image_1", "image_2"):
        columns[name] = [{"bytes": good.getvalue(), "path": None}, {"bytes": b"no image", "path": None}]
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "data" / "val.parquet")
    samples = load_samples("blink-multi-view", BENCHMARKS["blink-multi-view"], str(tmp_path / "data"))
    settings = {"dataset": "blink-multi-view", "model_path": "a/b", "data_fingerprint": fingerprint_samples(samples)}
    with AnswerJournal(tmp_path / "x.jsonl", settings, is_resumed=False) as journal:
        for sample in samples:
            journal.add(evals.grade(sample, Answer("p", "(A)", "stop"), BENCHMARKS["stvqa"]))
    assert compare.main([str(tmp_path / "x"), "--data_path", str(tmp_path / "data"), "--out", str(tmp_path)]) == 0
    whole, broken = page_items((tmp_path / "index.html").read_text())
    assert whole.count("data:image/webp") == 2 and 'width="448" height="224"' in whole and "<rect" not in whole
    assert "its image cannot be decoded" in broken and "data:image" not in broken
    assert "answer: (A) first" in whole and whole.count("second") == 1  # the question lists its choices itself


def test_a_benchmark_of_another_version_is_compared_without_images(tmp_path, capsys):
    with AnswerJournal(tmp_path / "x.jsonl", {"dataset": "old", "model_path": "m"}, is_resumed=False) as journal:
        journal.add(Record("<image>Is it?", "A", "A", "A", 1, None, id="0", kind="letter"))
    assert compare.main([str(tmp_path / "x"), "--out", str(tmp_path)]) == 0
    assert "no such benchmark" in capsys.readouterr().err
    assert "Is it?" in page_items((tmp_path / "index.html").read_text())[0]

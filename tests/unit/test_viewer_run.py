"""Reading of a run by the viewer: steps as they come, older forms, and files that are broken."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.recorded_runs import make_group, make_rows, write_log, write_old_run, write_recorded_run, write_step
from verl.viewer.lines import LineFile
from verl.viewer.main import main
from verl.viewer.queries import describe_run, find_groups, read_checks, read_metrics, show_prompt, show_rollout
from verl.viewer.run import Run


def read(folder: Path) -> Run:
    run = Run(folder)
    run.refresh()
    return run


def small_step(step: int, **changes: object) -> list[dict]:
    """Two groups of two bare rows; the scores are 0, 1 and 0.5, 0.5."""
    scores = (0.0, 1.0, 0.5, 0.5)
    rows = [
        {"step": step, "kind": "train", "group": i // 2, "sample": i % 2, "uid": f"row{i // 2}", "score": scores[i]}
        for i in range(4)
    ]
    return [row | changes for row in rows]


def test_a_recorded_run_is_read_as_it_was_written(tmp_path):
    write_recorded_run(tmp_path / "run", steps=(1, 2), num_groups=3, num_samples=2)
    run = read(tmp_path / "run")
    about = describe_run(run)
    assert about["rollouts"] == 12 and about["parts"] == ["format", "count", "accuracy", "spatial_score"]
    assert [(step["kind"], step["step"], step["groups"]) for step in about["steps"]] == [
        ("train", 1, 3),
        ("train", 2, 3),
    ]
    assert about["reward"] == "spatial_sgg" and about["problems"] == []
    (written,) = [
        row
        for row in pq.read_table(tmp_path / "run" / "rollouts" / "train_step_000002.parquet").to_pylist()
        if (row["group"], row["sample"]) == (1, 1)
    ]
    shown = show_rollout(run, "train", 2, 1, 1)
    for name in ("score", "advantage", "iou_mean", "uid", "answer", "response_tokens", "kl_mean"):
        assert shown[name] == written[name]
    assert shown["truth"] == written["ground_truth"] and shown["problem"] == written["problem"]
    assert "".join(text for _, text in shown["sections"]) == written["response"]
    assert [pair["iou"] for pair in shown["pairs"]] == [
        match["iou"] for match in json.loads(written["boxes"])["matches"]
    ]
    assert read_metrics(run)["actor/kl_loss"] == [[1, 0.001], [2, 0.002]]
    assert read_checks(run)[0]["check"] == "no_variance"


def test_a_folder_that_goes_away_is_named_and_read_again_once_it_is_back(tmp_path):
    run = read(write_recorded_run(tmp_path / "run", steps=(1, 2), num_groups=2, num_samples=2))
    before = describe_run(run)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    run.refresh(is_forced=True)
    about = describe_run(run)
    assert about["rollouts"] == 0 and about["last_step"] is None and about["revision"] > before["revision"]
    assert [text for text in about["problems"] if "is gone" in text] and not find_groups(run, {}, "newest", 0, 5)[
        "total"
    ]
    (tmp_path / "elsewhere").rename(tmp_path / "run")
    run.refresh(is_forced=True)
    again = describe_run(run)
    assert again | {"revision": 0} == before | {"revision": 0} and again["revision"] > about["revision"]


def test_marks_of_failures_are_no_parts_and_can_be_filtered_by(tmp_path):
    marks = {"part:count": 0.5, "part:format_failure/bad_box": 1.0}
    write_step(tmp_path / "run", small_step(1, **marks))
    run = read(tmp_path / "run")
    assert describe_run(run)["parts"] == ["count"]
    assert show_rollout(run, "train", 1, 0, 0)["parts"] == {"count": 0.5}
    assert find_groups(run, {"min.part:format_failure/bad_box": "1"}, "newest", 0, 5)["total"] == 2


def test_the_checkpoints_of_a_quickstart_are_found_in_its_folder(tmp_path):
    write_step(tmp_path / "run" / "checkpoints", small_step(3))
    assert describe_run(read(tmp_path / "run"))["rollouts"] == 4


def test_a_new_step_appears_and_a_step_written_anew_replaces_the_old_one(tmp_path):
    write_step(tmp_path, small_step(1))
    run = read(tmp_path)
    before = run.revision
    run.refresh(is_forced=True)
    assert run.revision == before
    write_step(tmp_path, small_step(2))
    run.refresh(is_forced=True)
    assert run.revision == before + 1 and len(run.snapshot) == 8
    write_step(tmp_path, small_step(1, score=0.25)[:2])
    run.refresh(is_forced=True)
    assert len(run.snapshot) == 6 and set(run.snapshot.numbers["score"][:2]) == {0.25}
    (tmp_path / "rollouts" / "train_step_000002.parquet").unlink()
    run.refresh(is_forced=True)
    assert len(run.snapshot) == 2


def test_columns_that_a_file_lacks_are_null_and_those_of_all_files_are_there(tmp_path):
    write_step(tmp_path, small_step(1))
    write_step(tmp_path, small_step(2, **{"part:bonus": 0.5, "category": "depth"}))
    run = read(tmp_path)
    assert describe_run(run)["parts"] == ["bonus"]
    bonus = run.snapshot.numbers["part:bonus"]
    assert np.isnan(bonus[:4]).all() and set(bonus[4:]) == {0.5}
    groups = find_groups(run, {}, "oldest", 0, 10)["groups"]
    assert [group["category"] for group in groups] == [None, None, "depth", "depth"]
    assert show_rollout(run, "train", 1, 0, 0)["layout"] is None


def test_rows_in_any_order_form_their_groups_with_their_spread(tmp_path):
    write_step(tmp_path, [small_step(1)[place] for place in (3, 0, 2, 1)])
    run = read(tmp_path)
    groups = find_groups(run, {}, "oldest", 0, 10)["groups"]
    assert [[sample["score"] for sample in group["samples"]] for group in groups] == [[0.0, 1.0], [0.5, 0.5]]
    assert [group["spread"] for group in groups] == [1.0, 0.0]


@pytest.mark.parametrize("score", [None, math.nan, math.inf])
def test_a_score_that_is_none_or_no_number_is_no_score(tmp_path, score):
    write_step(tmp_path, [row | {"score": score if row["sample"] else 0.5} for row in small_step(1)])
    run = read(tmp_path)
    sample = find_groups(run, {}, "oldest", 0, 10)["groups"][0]["samples"][1]
    assert sample["score"] is None
    if score is not math.inf:
        assert find_groups(run, {"odd": "no_score"}, "oldest", 0, 10)["rollouts"] == 2


def test_a_run_without_recorded_rollouts_shows_its_validations(tmp_path):
    write_old_run(tmp_path / "run", num_rows=3)
    run = read(tmp_path / "run")
    about = describe_run(run)
    assert [(step["kind"], step["step"], step["rollouts"]) for step in about["steps"]] == [
        ("val", 0, 3),
        ("val", 4, 3),
    ]
    assert "recorded no rollouts" in about["problems"][0]
    shown = show_rollout(run, "val", 4, 1, 0)
    assert shown["parts"]["format"] == 1.0 and shown["pairs"][0]["iou"] > 0.3 and shown["layout"]["boxes"]
    assert run.pictures.scaled(shown["images"][0], 320)[1] == "image/png"
    cut = show_rollout(run, "val", 0, 0, 0)
    assert cut["failure"] == "missing_observe" and "no closed section <observe>" in cut["why"]
    assert [group["step"] for group in show_prompt(run, shown["uid"], None)["groups"]] == [0, 4]


def test_generations_alone_are_shown_too(tmp_path):
    write_old_run(tmp_path, num_rows=3)
    for path in tmp_path.glob("validation_step_*.jsonl"):
        path.unlink()
    assert [step["rollouts"] for step in describe_run(read(tmp_path))["steps"]] == [2, 2]


def test_a_folder_that_is_no_run_is_refused_with_one_message(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("no run")
    assert main([str(tmp_path)]) == 2
    assert "is no folder of a run" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_step_cut_short_is_left_out_and_named(tmp_path, share):
    write_step(tmp_path, small_step(1))
    path = write_step(tmp_path, small_step(2))
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    run = read(tmp_path)
    assert len(run.snapshot) == 4
    assert any("train_step_000002.parquet cannot be read" in problem for problem in run.problems)
    path.write_bytes(data)
    run.refresh(is_forced=True)
    assert len(run.snapshot) == 8 and not run.problems


def test_unfinished_and_foreign_files_are_no_steps(tmp_path):
    path = write_step(tmp_path, small_step(1))
    path.with_suffix(".tmp").write_bytes(b"PAR1")
    (path.parent / "train_step_000002.parquet.tmp").write_bytes(b"PAR1")
    pq.write_table(pa.table({"other": [1]}), path.parent / "notes.parquet")
    assert len(read(tmp_path).snapshot) == 4


def test_pipes_in_the_place_of_files_are_not_waited_for(tmp_path):
    write_step(tmp_path, small_step(1))
    for name in ("rollouts/train_step_000002.parquet", "rollouts/checks.jsonl", "experiment_log.jsonl"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "rollouts" / "images" / "aa").mkdir(parents=True)
    os.mkfifo(tmp_path / "rollouts" / "images" / "aa" / ("a" * 64))
    run = read(tmp_path)
    assert len(run.snapshot) == 4 and run.pictures.size("a" * 64) is None


def test_records_without_an_id_are_known_by_their_problem(tmp_path):
    write_old_run(tmp_path, num_rows=2)
    for path in tmp_path.glob("*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({k: v for k, v in one.items() if k != "uid"}) + "\n" for one in lines))
    run = read(tmp_path)
    uid = show_rollout(run, "val", 0, 1, 0)["uid"]
    assert len(uid) == 16 and len(show_prompt(run, uid, None)["groups"]) == 2


def test_records_that_are_broken_leave_the_others(tmp_path):
    write_old_run(tmp_path, num_rows=3)
    path = tmp_path / "validation_step_4.jsonl"
    first, second, third = path.read_text().splitlines()
    odd = json.dumps({"problem": 5, "response": None, "score": {"overall": "high", "format": None}, "sample": 0})
    path.write_text("\n".join([first, "[1]", odd, "{", '{"response": "\\ud800"}', third[: len(third) // 2]]))
    run = read(tmp_path)
    shown = [one["samples"][0] for one in find_groups(run, {"step": "4"}, "oldest", 0, 10)["groups"]]
    assert [one["score"] is None for one in shown] == [False, True, True]
    assert [text.partition(" is left")[0] for text in run.problems[:3]] == [
        f"line {number} of validation_step_4.jsonl" for number in (2, 4, 6)
    ]


def test_lines_cut_short_are_read_once_they_are_whole(tmp_path):
    path = tmp_path / "experiment_log.jsonl"
    path.write_bytes(b'{"step": 1}\nnonsense\n[1]\n{"step": 2, "x": ')
    lines = LineFile(path)
    assert lines.refresh() and lines.objects == [{"step": 1}]
    assert len(lines.problems) == 3 and "line 2" in lines.problems[0] and "no end yet" in lines.problems[-1]
    with path.open("ab") as file:
        file.write(b'NaN}\n{"step": 3}\n')
    assert lines.refresh() and [line["step"] for line in lines.objects] == [1, 2, 3]
    assert not lines.refresh()
    path.write_bytes(b'{"step": 9}\n')  # a resumed run writes it anew
    assert lines.refresh() and lines.objects == [{"step": 9}]


def test_values_of_the_log_that_are_no_numbers_are_left_out(tmp_path):
    write_log(tmp_path, [1, 2], odd=None, text="x", flag=True, big=math.inf)
    assert not {"odd", "text", "flag", "big"} & read_metrics(read(tmp_path)).keys()


def test_a_newer_version_of_the_files_is_named(tmp_path):
    write_step(tmp_path, small_step(1))
    (tmp_path / "rollouts" / "about.json").write_text('{"version": 7}')
    assert any("version 7" in problem for problem in read(tmp_path).problems)


def test_tokens_show_their_ids_where_there_is_no_tokenizer(tmp_path):
    tokens = {"token_ids": [5, 6], "token_log_probs": [-0.5, math.nan], "token_ratios": [1.5, 1.0]}
    write_step(tmp_path, small_step(1, **tokens))
    shown = show_rollout(read(tmp_path), "train", 1, 0, 0)["tokens"]
    assert shown["tokens"] == [["5 ", -0.5, 1.5], ["6 ", None, 1.0]] and "ids" in shown["note"]


def test_a_long_log_is_thinned_and_keeps_its_ends(tmp_path):
    with (tmp_path / "experiment_log.jsonl").open("w") as file:
        file.writelines(json.dumps({"step": step, "x": step}) + "\n" for step in range(5000))
    points = read_metrics(read(tmp_path))["x"]
    assert len(points) <= 801 and points[0] == [0, 0] and points[-1] == [4999, 4999]


def test_the_group_writer_of_these_tests_agrees_with_the_reward():
    import random

    rows = make_group(make_rows(1)[0], 1, 0, 4, 1.0, random.Random(0))
    assert all(row["right"] == (row["part:accuracy"] == 1.0) for row in rows)
    assert all((row["score"] > 0.5) == row["right"] for row in rows)

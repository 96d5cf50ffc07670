"""Filters of rollouts narrow by number, text and what is odd, each and together; groups come in the order asked."""

import math
from pathlib import Path
from typing import Any

import pytest

from tests.support.recorded_runs import write_step
from verl.viewer.filters import select
from verl.viewer.queries import compare_runs, find_groups
from verl.viewer.run import Run


def row(step: int, group: int, sample: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "kind": "train", "group": group, "sample": sample, "uid": f"row{group}"} | more


ROWS = [
    row(1, 0, 0, score=0.9, right=True, iou_mean=0.8, category="depth", response="A cat.", advantage=1.0),
    row(1, 0, 1, score=0.7, right=True, iou_mean=0.2, category="depth", response="A dog.", advantage=-1.0),
    row(1, 1, 0, score=0.3, right=False, iou_mean=0.9, category="count", response="A Cat?", advantage=0.0),
    row(1, 1, 1, score=0.3, right=False, iou_mean=0.1, category="count", response="100% [a]", failure="bad_box"),
    row(2, 0, 0, score=math.nan, right=None, iou_mean=None, response="cat", stop_reason="length", source="x"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    write_step(folder, ROWS[:4])
    write_step(folder, ROWS[4:])
    run = Run(folder)
    run.refresh()
    return run


@pytest.mark.parametrize(
    ("query", "rows"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"step": "1"}, [0, 1, 2, 3]),
        ({"from": "2"}, [4]),
        ({"to": "1", "right": "yes"}, [0, 1]),
        ({"right": "no"}, [2, 3]),
        ({"odd": "right_bad_boxes"}, [1]),
        ({"odd": "wrong_good_boxes"}, [2]),
        ({"odd": "no_variance"}, [2, 3]),
        ({"odd": "no_score"}, [4]),
        ({"odd": "cut_off"}, [4]),
        ({"odd": "format_failure"}, [3]),
        ({"failure": "*"}, [3]),
        ({"failure": "bad_box"}, [3]),
        ({"failure": "bad_id"}, []),
        ({"category": "depth", "max.score": "0.8"}, [1]),
        ({"min.advantage": "0"}, [0, 2]),
        ({"min.iou_mean": "0.2", "max.iou_mean": "0.8"}, [0, 1]),
        ({"text": "CAT"}, [0, 2, 4]),
        ({"text": "cat", "right": "no"}, [2]),
        ({"text": "100% [a]"}, [3]),
        ({"text": "."}, [0, 1]),
        ({"source": "*"}, [4]),
        ({"kind": "val"}, []),
        ({"uid": "row1"}, [2, 3]),
    ],
)
def test_filters_leave_the_rollouts_that_pass_all_of_them(run, query, rows):
    assert select(run, run.snapshot, query).nonzero()[0].tolist() == rows


def test_boxes_are_judged_by_the_reward_where_no_iou_is_known(tmp_path):
    write_step(
        tmp_path, [row(1, 0, i, right=True, **{"part:spatial_score": score}) for i, score in enumerate((0.9, 0.1))]
    )
    run = Run(tmp_path)
    run.refresh()
    assert select(run, run.snapshot, {"odd": "right_bad_boxes"}).tolist() == [False, True]


@pytest.mark.parametrize(
    ("sort", "order"),
    [
        ("newest", [(2, 0), (1, 0), (1, 1)]),
        ("oldest", [(1, 0), (1, 1), (2, 0)]),
        ("score", [(1, 1), (1, 0), (2, 0)]),
        ("-score", [(1, 0), (1, 1), (2, 0)]),
        ("spread", [(1, 1), (1, 0), (2, 0)]),
        ("-iou_mean", [(1, 1), (1, 0), (2, 0)]),
    ],
)
def test_groups_come_in_order_and_what_has_no_value_comes_last(run, sort, order):
    groups = find_groups(run, {}, sort, 0, 10)["groups"]
    assert [(group["step"], group["group"]) for group in groups] == order


def test_a_group_is_ordered_by_the_rollouts_that_pass(run):
    groups = find_groups(run, {"max.score": "0.8"}, "-score", 0, 10)["groups"]
    assert [group["group"] for group in groups] == [0, 1]
    assert [sample["passes"] for sample in groups[0]["samples"]] == [False, True]


def test_pages_of_groups_are_the_whole_in_parts(run):
    whole = find_groups(run, {}, "oldest", 0, 10)
    parts = [find_groups(run, {}, "oldest", offset, 1) for offset in range(3)]
    assert [group for part in parts for group in part["groups"]] == whole["groups"]
    assert whole["total"] == 3 and find_groups(run, {}, "oldest", 99, 5)["groups"] == []


def test_two_runs_are_compared_on_the_prompts_of_both(run, tmp_path):
    write_step(tmp_path, [row(5, 7, 0, score=0.5) | {"uid": "row1"}, row(5, 8, 0, score=0.5) | {"uid": "other"}])
    second = Run(tmp_path)
    second.refresh()
    found = compare_runs([run, second], {}, 0, 10)
    assert found["total"] == 1 and found["prompts"] == [2, 2]
    ((first, other),) = found["pairs"]
    assert (first["step"], first["group"], other["step"], other["group"]) == (1, 1, 5, 7)
    assert compare_runs([run, second], {"right": "yes"}, 0, 10)["total"] == 0  # row1 is wrong in the first run
    assert compare_runs([run, second], {"to": "1"}, 0, 10)["total"] == 0  # the second begins later


def test_an_empty_run_has_nothing_to_filter(tmp_path: Path):
    (tmp_path / "rollouts").mkdir()
    run = Run(tmp_path)
    run.refresh()
    assert find_groups(run, {"text": "x", "odd": "no_score"}, "newest", 0, 10)["total"] == 0

"""Figures of a run by hand-worked numbers."""

import math

import pytest

from evaluation.journal import Record
from evaluation.reports.intervals import wilson_interval
from evaluation.reports.summary import (
    clustered_standard_error,
    format_markdown,
    format_table,
    summarize,
    summarize_groups,
)


def record(index, correct, **more):
    texts = {"prompt": "", "correct_answer": "A", "reasoning": "", "pred_answer": "A", "kind": "letter"}
    return Record(**texts, correct=correct, task=more.pop("task", None), id=f"{index:06d}", **more)


def test_wilson():
    low, high = wilson_interval(8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    assert wilson_interval(0, 0) == (0, 1)
    assert wilson_interval(10, 10)[1] == pytest.approx(1)


def test_clustered_standard_error_by_hand():
    # p = 0.5; deviations of the clusters: a: 0.5 + 0.5, b: -0.5 - 0.5; sqrt(2 / 1 * (1 + 1)) / 4
    pairs = [
        record(0, 1, cluster="a"),
        record(1, 1, cluster="a"),
        record(2, 0, cluster="b"),
        record(3, 0, cluster="b"),
    ]
    assert clustered_standard_error(pairs) == pytest.approx(0.5)
    # Items on their own: sqrt(4 / 3 * 4 * 0.25) / 4, which is the usual s / sqrt(n).
    single = [record(i, i % 2) for i in range(4)]
    assert clustered_standard_error(single) == pytest.approx(math.sqrt(1 / 3) / 2)
    assert clustered_standard_error(pairs[:2]) is None and clustered_standard_error([]) is None


def test_groups_are_right_when_all_items_are_and_count_when_complete():
    records = [
        record(0, 1, groups={"view": "a"}),
        record(1, 1, groups={"view": "a"}),
        record(2, 1, groups={"view": "b"}),
        record(3, 0, groups={"view": "b"}),
        record(4, 1, groups={"view": "c"}),
    ]
    result = summarize_groups(records, {"view": {"a": 2, "b": 2, "c": 2}})["view"]
    assert (result["n"], result["correct"], result["accuracy"], result["incomplete"]) == (2, 1, 0.5, 1)
    assert summarize_groups(records[::-1], {"view": {"a": 2, "b": 2, "c": 2}})["view"] == result


def test_a_summary_counts_what_was_seen_and_sets_both_rules_side_by_side():
    records = [record(i, 1, task="Count", correct_strict=1, correct_paper=0, cluster="x") for i in range(3)]
    records += [record(9, 0, task="Depth", correct_strict=0, correct_paper=0, cluster="y")]
    summary = summarize(records, {"dataset": "cv-bench", "model_path": "m"})
    assert (summary["accuracy"], summary["macro_accuracy"]) == (0.75, 0.5)
    assert {name: task["n"] for name, task in summary["tasks"].items()} == {"Count": 3, "Depth": 1}
    assert (summary["scorings"]["strict"]["accuracy"], summary["scorings"]["paper"]["accuracy"]) == (0.75, 0)
    for text in (format_table(summary), format_markdown(summary)):
        assert "scoring paper" in text and "parse failures 0.0%" in text and "mean over the 2 tasks: 0.500" in text
        assert "2 clusters" in text


def test_a_summary_of_nothing_is_no_error():
    summary = summarize([], {"dataset": "mmvp", "model_path": "m"})
    assert summary["accuracy"] == 0 and format_table(summary) and format_markdown(summary)

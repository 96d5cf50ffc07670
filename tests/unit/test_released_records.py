"""The released figures in the list of records, by hand."""

import math

import pytest

from evaluation.journal import Record
from evaluation.reports.released_records import with_released_figures
from evaluation.reports.summary import format_markdown, format_table, summarize


def make_records(marks):
    return [Record("p", "A", "r", "A", int(mark), task, str(i)) for i, (task, mark) in enumerate(marks)]


def test_the_last_record_has_the_final_figures():
    marks = [("Count", 1), ("Depth", 0), ("Count", 0), ("Count", 1)]
    *earlier, last = with_released_figures(make_records(marks))
    assert [record["Count_correct"] for record in (*earlier, last)] == [1, 1, 1, 2]
    assert [record["Depth_correct"] for record in (*earlier, last)] == [0, 0, 0, 0]
    assert last["final_accuracy"] == 0.5 and last["final_std_err"] == math.sqrt(0.25 / 4)
    assert last["Count_final_acc"] == pytest.approx(2 / 3) and last["Depth_final_acc"] == 0
    assert last["Count_final_std_err"] == pytest.approx(math.sqrt(2 / 9 / 3))
    assert not any("final" in key for record in earlier for key in record)


def test_every_tenth_record_has_running_figures():
    records = with_released_figures(make_records([("Count", i < 5) for i in range(21)]))
    assert [i for i, record in enumerate(records) if "cur_acc" in record] == [9, 19]
    assert records[9]["cur_acc"] == 0.5 and records[19]["Count_acc"] == 0.25
    assert records[9]["cur_std_err"] == math.sqrt(0.25 / 10)


def test_pairs_of_views_and_records_without_a_task():
    assert with_released_figures([]) == []
    views = {"correct": 1, "n": 2}
    (record,) = with_released_figures(make_records([(None, 1)]), views)
    assert record["final_view_consistency_acc"] == 0.5 and record["final_accuracy"] == 1
    assert not any(key.startswith("None") for key in record)


def test_names_of_tasks_cannot_command_a_terminal_or_break_a_table():
    summary = summarize(make_records([("a\x1b[2J|b\nc\u202e", 1), ("\x9b31m", 0)]), {"model_path": "m"})
    table, page = format_table(summary), format_markdown(summary)
    assert not set("\x1b\u202e\x9b") & set(table + page)
    assert "| a\\|b c | 1 |" in page and "a|b c" in table

"""The benchmarks' own figures, by numbers worked by hand."""

import pytest

from evaluation.benchmarks.rows import BENCHMARKS, SUITES
from evaluation.journal import Record
from evaluation.reports.official import RULES, measure
from evaluation.scoring.strict import Reference, grade_response


def record(correct, task=None, **more):
    return Record("", "", "", "", correct, task, **more)


def values(rule, records):
    return {name: round(figure.value, 4) for name, figure in measure(RULES[rule], records).items()}


def test_every_row_s_rule_and_every_leaderboard_s_line_exists():
    assert {row.rule for row in BENCHMARKS.values()} - {None} <= RULES.keys()
    for lines in SUITES.values():
        for members in lines.values():
            assert len({BENCHMARKS[name].rule for name in members}) == 1
    assert len(SUITES["easi8"]) == 8 and len(SUITES["easi8"]["BLINK"]) == 14


def test_guessing_scores_nothing_by_chance_adjusted_accuracy():
    guesses = [record(int(i == 0), facts={"choices": 4}) for i in range(4)]
    guesses += [record(int(i == 0), facts={"choices": 2}) for i in range(2)]
    assert values("chance-adjusted", guesses) == {"chance-adjusted accuracy": 0}
    right = [record(1, facts={"choices": 4}), record(0, facts={"choices": 2})]
    assert values("chance-adjusted", right) == {"chance-adjusted accuracy": 0.2}  # (3/4 - 1/2) / (3/4 + 1/2)


def test_relative_direction_is_one_task_of_three_levels():
    records = [record(1, "object_rel_direction_easy"), record(0, "object_rel_direction_hard")]
    records += [record(0, "object_counting", score=0.5), record(1, "route_planning"), record(1, "route_planning")]
    assert values("vsi-bench", records) == {"mean over tasks": 0.6667}  # (1/2 + 1/2 + 1) / 3


def test_cv_bench_weighs_sources_and_not_items():
    sources = [("ADE20K", 1), ("ADE20K", 1), ("ADE20K", 0), ("COCO", 0), ("Omni3D", 1)]
    records = [record(correct, facts={"source": source}) for source, correct in sources]
    assert values("cv-bench", records) == {
        "mean of 2D and 3D by source": 0.6667,
        "2D by source": 0.3333,
        "3D by source": 1,
    }
    assert values("cv-bench", records[:4]) == {"2D by source": 0.3333}


def test_a_pair_of_mmvp_is_right_as_a_whole_and_wrong_labels_are_named():
    marks = {"0": (1, 1), "1": (1, 0), "49": (0, 0), "139": (1, 0)}
    records = [record(m, groups={"pair": f"{name}/None"}) for name, pair in marks.items() for m in pair]
    assert values("mmvp", records) == {"pairs": 0.25, "pairs with sound labels": 0.5}
    assert measure(RULES["mmvp"], records)["pairs"].n == 4
    assert values("mmvp", records[:1]) == {}  # half a pair is none


def test_spatialbench_goes_by_pairs_and_counts_by_relative_error():
    records = [record(1, "reach", groups={"pair": "0/reach"}), record(0, "reach", groups={"pair": "0/reach"})]
    records += [record(1, "size", groups={"pair": "1/size"})] * 2
    records += [record(0, "counting", groups={"pair": "2/counting"}, score=0.75)]
    found = values("spatialbench", records)
    assert found == {
        "reach by pairs": 0,
        "size by pairs": 1,
        "reach by items": 0.5,
        "size by items": 1,
        "counting by relative error": 0.75,
    }


def test_mindcube_s_settings_come_from_the_ids():
    ids = {"among_1": 1, "aroundnew_2": 1, "around_3": 0, "rotation_4": 0, "translation_5": 1}
    found = values("mindcube", [record(mark, "x", facts={"id": name}) for name, mark in ids.items()])
    assert found == {"all but translation": 0.5, "among": 1, "around": 0.5, "rotation": 0}


def test_a_group_counts_when_all_of_its_items_are_right():
    facts = {"sizes": {"flip_circular": 2}}
    marks = (("a", 1), ("a", 1), ("b", 1), ("b", 0), ("cut off", 1))
    records = [record(mark, groups={"flip_circular": name}, facts=facts) for name, mark in marks]
    assert values("flip_circular", records) == {"groups right: flip_circular": 0.5}


def test_intervals_shrink_with_the_number_of_items_and_hold_the_figure():
    few = measure(RULES["accuracy"], [record(i % 2) for i in range(10)])["accuracy"]
    many = measure(RULES["accuracy"], [record(i % 2) for i in range(1000)])["accuracy"]
    assert few.low < many.low < 0.5 < many.high < few.high
    assert many.high - many.low == pytest.approx(2 * 1.96 * 0.5 / 1000**0.5, rel=1e-2)


@pytest.mark.parametrize(
    ("form", "reference", "answer", "score"),
    [
        ("relative", "2", "It is about 2 meters.", 1.0),
        ("relative", "2", "<answer>1.5</answer>", 0.5),  # an error of 0.25 is below 0.5, 0.45, ... 0.3
        ("relative", "2", "5", 0.0),
        ("relative", "2", "somewhere", 0.0),
        ("count", "4", "three", 0.75),
        ("count", "4", "20", 0.0),
        ("count", "0", "0", 1.0),
        ("moves", "move_right:0.2,rotate_up:3", "move_right:0.2,rotate_up:3", 1.0),
        ("moves", "move_right:0.2,rotate_up:3", "move_left:0.2,rotate_down:-3", 0.8),
        ("moves", "move_right:0.2", "no idea", 0.0),
    ],
)
def test_forms_with_degrees(form, reference, answer, score):
    grade = grade_response(answer, (), Reference(None, reference, form))
    assert grade.score == pytest.approx(score) and grade.is_correct == (score == 1)


def test_a_choice_and_its_box_count_together_and_apart():
    records = [record(1, score=0.8, facts={"choice": 1}), record(0, score=0.4, facts={"choice": 1})]
    records += [record(0, facts={"choice": 1}), record(0, score=0.9, facts={"choice": 0})]
    assert values("multihop", records) == {
        "choice and IoU 0.5": 0.25,
        "choice": 0.75,
        "mean IoU of right choices": 0.6,  # of the two boxes beside right choices
    }

"""Checks of a step: each fires beyond its threshold, with values worked by hand, and says so once."""

import json

import pytest
import torch

from verl.trainer.checks import CHECKS, MIN_TOLD, Checks, Facts, Seen, evaluate, find_fired, share_signs

FLAT = torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
STEP = {"response_length/mean": 100.0, "response_length/clip_ratio": 0.0, "actor/entropy_loss": 1.0}


def facts(length: float = 100.0, entropy: float | None = 1.0, **parts: list[float]) -> Facts:
    return Facts(length, entropy, parts)


@pytest.mark.parametrize(
    ("name", "good", "bad", "value"),
    [
        ("groups_without_variance", Seen(FLAT[2:]), Seen(FLAT), 0.75),
        ("truncation", Seen(truncated=0.1), Seen(truncated=0.11), 0.11),
        ("length_growth", Seen(history=[facts()] * 4), Seen(history=[*[facts()] * 3, facts(210.0)]), 2.1),
        ("entropy_left", Seen(history=[facts()] * 4), Seen(history=[*[facts()] * 3, facts(entropy=0.1)]), 0.1),
        ("still_parts", Seen(history=[facts(a=[0.0, 0.5])] * 3), Seen(history=[facts(a=[0.0, 0.0])] * 3), 1.0),
        ("boxes_in_another_frame", Seen(signs={"another_frame": 0.05}), Seen(signs={"another_frame": 0.2}), 0.2),
        ("same_box", Seen(signs={"same_box": 0.1}), Seen(signs={"same_box": 0.3}), 0.3),
        ("scene_ignored", Seen(signs={"scene_ignored": 0.5}), Seen(signs={"scene_ignored": 0.6}), 0.6),
    ],
)
def test_a_check_fires_beyond_its_threshold(name, good, bad, value):
    assert name in evaluate(good) and not find_fired(evaluate(good))
    assert evaluate(bad)[name] == pytest.approx(value) and find_fired(evaluate(bad)) == [name]


def test_every_check_is_tried():
    tried = test_a_check_fires_beyond_its_threshold.pytestmark[0].args[1]
    assert {row[0] for row in tried} == set(CHECKS)


def test_a_part_that_all_have_earned_in_full_is_no_fault():
    assert not find_fired(evaluate(Seen(history=[facts(format=[1.0, 1.0])] * 3)))
    moved = [facts(a=[0.0, 0.0]), facts(a=[0.25, 0.25]), facts(a=[0.0, 0.0])]
    assert not find_fired(evaluate(Seen(history=moved)))
    assert not find_fired(evaluate(Seen(history=[facts(**{"format_failure/bad_box": [0.0, 0.0]})] * 3)))


def test_signs_are_shares_of_those_that_can_be_told():
    signs = [{"signs": {"same_box": number < 4}} for number in range(MIN_TOLD)] + [{"signs": {"other": True}}, {}]
    assert share_signs(signs) == {"same_box": 4 / MIN_TOLD}


def test_what_fires_is_written_each_time_and_said_once(tmp_path, capsys):
    lines: list[tuple[str, dict]] = []
    checks = Checks(tmp_path, lambda path, line: lines.append((path.name, json.loads(line))))
    for step in (1, 2):
        logged = checks.run(step, {"overall": FLAT, "format": FLAT}, STEP, {"same_box": 0.5})
    assert logged["checks/groups_without_variance"] == 0.75 and logged["checks/same_box"] == 0.5
    fired = [line for name, line in lines if name == "checks.jsonl"]
    assert [(line["step"], line["check"]) for line in fired] == [
        (step, name) for step in (1, 2) for name in ("groups_without_variance", "same_box")
    ]
    assert fired[0]["threshold"] == 0.5 and "too easy or too hard" in fired[0]["message"]
    assert capsys.readouterr().out.count("Worth a look at step") == 2


def test_a_resumed_run_is_measured_by_its_first_steps(tmp_path):
    def append(path, line):
        with path.open("a") as file:
            file.write(line)

    checks = Checks(tmp_path, append)
    for step in range(1, 6):
        checks.run(step, {"overall": FLAT}, STEP | {"response_length/mean": 100.0 * step}, {})
    resumed = Checks(tmp_path, append)
    resumed.begin(3)
    logged = resumed.run(4, {"overall": FLAT}, STEP | {"response_length/mean": 500.0}, {})
    assert logged["checks/length_growth"] == 2.5  # of the mean of 100, 200 and 300

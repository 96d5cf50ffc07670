"""Weighted sums and gates of rewards: numbers by hand, through the trainer's pool, and mixtures that are none."""

import pickle

import pytest

from verl.config.loading import load_config
from verl.config.mixtures import find_mixture_faults, split_gate
from verl.config.records import ConfigError
from verl.reward import MixedReward, RewardError
from verl.trainer.rewards import build_function

KNOWN = ("math", "numbers", "r1v")
GOOD = {"sum": {"math": 0.8, "numbers": 0.2}}


class Fixed:
    """A reward of the same parts for every response."""

    reads_row = False

    def __init__(self, **parts: float):
        self.parts = parts

    def __call__(self, items):
        return [self.parts for _ in items]


def mixed(gates):
    functions = {"a": Fixed(overall=0.5, format=1.0), "b": Fixed(overall=1.0), "c": Fixed(overall=0.0)}
    return MixedReward("mixed", functions, {"a": 0.8, "b": 0.25}, gates)


def test_a_sum_weighs_and_names_its_parts():
    (score,) = mixed({})([{"response": "x", "uid": "1"}])
    assert score["overall"] == pytest.approx(0.8 * 0.5 + 0.25 * 1.0)
    assert score["a/format"] == 1.0 and score["c/overall"] == 0.0  # of weight 0 too


@pytest.mark.parametrize(
    ("gates", "is_open"),
    [
        ({("a", "format"): 1.0}, True),
        ({("a", "overall"): 0.6}, False),
        ({("a", "format"): 1.0, ("c", "overall"): 0.1}, False),
    ],
)
def test_every_gate_has_to_be_passed(gates, is_open):
    (score,) = mixed(gates)([{"response": "x", "uid": "1"}])
    assert score["gate"] == is_open and score["overall"] == pytest.approx(0.65 * is_open)


def test_a_gate_on_a_part_that_is_not_there_is_named():
    with pytest.raises(RewardError, match="the part 'style' of a, which has overall, format"):
        mixed({("a", "style"): 1.0})([{"response": "x", "uid": "1"}])


@pytest.mark.parametrize(
    ("gate", "found"),
    [
        ("math", ("math", "overall")),
        ("math.format", ("math", "format")),
        ("rewards/my.py:brevity", ("rewards/my.py:brevity", "overall")),
        ("rewards/my.py:brevity.share", ("rewards/my.py:brevity", "share")),
        ("my.py", ("my.py", "overall")),
    ],
)
def test_a_gate_names_a_reward_and_a_part(gate, found):
    assert split_gate(gate) == found


def test_a_configured_mixture_scores_with_files_and_mixtures_in_it(tmp_path):
    file = tmp_path / "brevity.py"
    file.write_text("def short(items):\n    return [{'overall': 0.5, 'share': 1.0} for _ in items]\n")
    mixtures = {"inner": {"sum": {"math": 1.0}}, "outer": {"sum": {"inner": 0.5, f"{file}:short": 0.5}}}
    mixtures["outer"]["gate"] = {f"{file}:short.share": 1.0}
    config = load_config(["worker.reward.score_function=outer", f"worker.reward.mixtures={mixtures}"], ("math",))
    reward = pickle.loads(pickle.dumps(build_function(config, None, {})))
    item = {"response": "<think>t</think>\\boxed{4}", "ground_truth": "4", "problem": "2 + 2", "uid": "1"}
    (score,) = reward([item | {"response_length": 5}])
    assert score["overall"] == pytest.approx(0.5 * 1.0 + 0.5 * 0.5) and score["gate"] == 1.0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "must hold sum"),
        ("math", "must hold sum"),
        ({"sum": {}}, "must hold sum"),
        ({"sum": ["math"]}, "sum = ['math']: must be a dictionary of numbers"),
        ({"sum": {"math": 1}, "then": "numbers"}, "must hold sum"),
        ({"sum": {"math": "0.5"}}, "sum.math = '0.5': must be a finite number"),
        ({"sum": {"math": True}}, "sum.math = True: must be a finite number"),
        ({"sum": {"math": float("nan")}}, "sum.math = nan: must be a finite number"),
        ({"sum": {"math": 1}, "gate": "math.format"}, "gate = 'math.format': must be a dictionary"),
        ({"sum": {"maths": 1}}, "no reward is called 'maths'; did you mean math?"),
        ({"sum": {"math": 1}, "gate": {"nubmers": 1}}, "no reward is called 'nubmers'; did you mean numbers?"),
        ({"sum": {"nowhere/my.py:brevity": 1}}, "there is no file nowhere/my.py"),
        ({"sum": {"math": 1}, "kwargs": {"r1v": {}}}, "kwargs.r1v: its sum and gates name no such reward"),
        ({"sum": {"math": 1}, "kwargs": {"math": 3}}, "must hold a dictionary of arguments by reward"),
        ({"sum": {"mine": 1}}, "leads back to itself (mine -> mine)"),
    ],
)
def test_a_mixture_that_is_none_is_named_before_anything_starts(content, words):
    (fault,) = find_mixture_faults({"mine": content}, KNOWN)
    assert fault.startswith("worker.reward.mixtures.mine") and words in fault


def test_circles_over_other_mixtures_and_borrowed_names_are_named():
    faults = list(
        find_mixture_faults({"a": {"sum": {"b": 1}}, "b": {"sum": {"a": 1}}, "math": GOOD, "x.y": GOOD}, KNOWN)
    )
    assert any("a: leads back to itself (a -> b -> a)" in fault for fault in faults)
    assert sum("give it a name of its own" in fault for fault in faults) == 2
    assert list(find_mixture_faults({"mine": GOOD}, KNOWN)) == []


def test_the_command_line_refuses_a_mixture_with_an_unknown_reward():
    with pytest.raises(ConfigError, match="did you mean math"):
        load_config(["worker.reward.mixtures={mine: {sum: {maht: 1}}}"], KNOWN + ("spatial_sgg",))

"""The rewards of the release: their scores, the terms by hand, and every deviation from the released code."""

import json
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest

from spatialthinker.rewards import REWARDS, TEXT_REWARDS, RewardInput, check_ground_truth, format_failure
from spatialthinker.rewards.bench import random_input
from spatialthinker.rewards.equality import is_equal_answer

GOLDEN_FILE = Path(__file__).parents[1] / "support" / "golden_rewards.jsonl"
GOLDEN = [json.loads(line) for line in GOLDEN_FILE.open()]
TRUTH_KEYS = {"spatial_sgg": "ground_truth", "r1v": "answer", "r1v_scene": "ground_truth", "math": "answer"}
PROBLEM = "<image> Look.\nImage size: (100 x 100)\nQ. Where?"
CAT, DOG = {"id": "cat.1", "bbox": [10, 10, 50, 50]}, {"id": "dog.2", "bbox": [60, 10, 90, 90]}
ON = {"subject": "cat.1", "predicate": "on", "object": "dog.2"}


def golden_inputs(name):
    return [RewardInput(row["response"], row[TRUTH_KEYS[name]], row["problem"]) for row in GOLDEN]


def response(objects=(CAT, DOG), relations=(ON,), answer="(B) left", scene=None):
    scene = scene or json.dumps({"objects": objects, "relationships": relations})
    return f"<observe>o</observe>\n<scene>{scene}</scene>\n<think>t</think>\n<answer>{answer}</answer>"


TRUTH = response().split("</observe>\n")[1].replace("<think>t</think>\n", "")


def score(text, truth=TRUTH, problem=PROBLEM, **kwargs):
    return REWARDS["spatial_sgg"]([RewardInput(text, truth, problem)], **kwargs)[0]


@pytest.mark.parametrize("name", TEXT_REWARDS)
def test_released_scores(name):
    for row, result in zip(GOLDEN, REWARDS[name](golden_inputs(name)), strict=True):
        assert result == pytest.approx(row["scores"][name], abs=1e-6)


def test_the_true_scene_and_answer_score_one():
    result = score(response())
    assert result == pytest.approx(dict.fromkeys(("overall", "format", "count", "accuracy", "spatial_score"), 1.0))
    assert list(result) == ["overall", "format", "count", "accuracy", "spatial_score"]


def test_gates():
    wrong = score(response(answer="(A) right"))
    assert (wrong["accuracy"], wrong["spatial_score"]) == (0.0, 0.0)
    assert wrong["overall"] == pytest.approx(0.1 + 0.2)
    assert score(response(answer="(A) right"), accuracy_gate=False)["spatial_score"] == pytest.approx(1.0, abs=1e-5)
    broken = response(scene='{"objects": [')
    assert set(score(broken).values()) == {0.0}
    assert score(broken, format_gate=False) == dict(
        overall=0.5, format=0.0, count=0.0, accuracy=1.0, spatial_score=0.0
    )


def test_count_term():
    third = CAT | {"id": "cat.7"}
    assert score(response((CAT, DOG, third)))["count"] == pytest.approx(0.7 * 0.5 + 0.3)
    assert score(response((CAT,)))["count"] == pytest.approx(0.7 * 0.5 + 0.3)
    assert score(response((CAT, DOG), (ON,) * 3))["count"] == pytest.approx(0.7)
    assert score(response((CAT,)), object_count_weight=1.0, relation_count_weight=0.0)["count"] == pytest.approx(0.5)
    no_relations = TRUTH.replace(json.dumps([ON]), "[]")
    assert score(response((CAT,), (ON,) * 9), no_relations)["count"] == pytest.approx(0.5)
    assert score(response(scene=json.dumps({"relationships": [ON]})))["count"] == 0.0
    assert score(response(scene=json.dumps({"objects": [], "relationships": [ON]})))["count"] == pytest.approx(0.3)


def test_spatial_term():
    assert score(response((CAT,)))["spatial_score"] == pytest.approx(0.5, abs=1e-5)
    moved = DOG | {"bbox": [0, 0, 5, 5]}
    far = score(response((CAT, moved)))["spatial_score"]
    assert 0.5 < far < 0.75
    assert score(response((CAT, moved)), overlap="iou")["spatial_score"] == pytest.approx(0.5, abs=1e-5)
    assert score(response((CAT, moved)), overlap="giou")["spatial_score"] < 0.75
    extra = [CAT | {"id": f"cat.{i}", "bbox": [i, i, i + 9, i + 9]} for i in range(3, 9)]
    assert score(response((CAT, DOG, *extra)))["spatial_score"] == pytest.approx(1.0, abs=1e-5)


def test_spatial_term_without_true_objects():
    empty = TRUTH.replace(json.dumps([CAT, DOG]), "[]")
    assert score(response(), empty)["spatial_score"] == 1.0
    nothing = empty.replace(json.dumps([ON]), "[]")
    assert score(response(), nothing)["spatial_score"] == 0.0
    assert score(response(()), nothing)["spatial_score"] == 1.0


def test_relation_term():
    assert score(response(), relation_weight=1.0)["spatial_score"] == pytest.approx(1.0)
    assert score(response(relations=()), relation_weight=0.5)["spatial_score"] == pytest.approx(0.5, abs=1e-5)
    other = score(response(relations=(ON | {"predicate": "beneath"},)), relation_weight=1.0)["spatial_score"]
    assert 0.6 < other < 1.0


def test_weights_are_keywords():
    kwargs = dict(format_weight=0.0, count_weight=1.0, accuracy_weight=0.0, spatial_weight=0.0)
    assert score(response((CAT,)), **kwargs)["overall"] == pytest.approx(0.65)


def test_a_wrong_answer_never_beats_a_right_one_with_the_same_scene():
    rng = random.Random(5)
    right = [random_input(rng, (0, 0) if i % 9 == 0 else (1, 8), 0 if i % 9 == 0 else 6) for i in range(300)]
    wrong = [RewardInput(item.response.replace("(B)", "(C)"), item.ground_truth, item.problem) for item in right]
    scores = zip(REWARDS["spatial_sgg"](right), REWARDS["spatial_sgg"](wrong), strict=True)
    assert all(a["overall"] >= b["overall"] + 0.5 - 1e-9 for a, b in scores)


def deviates(text, strict=0.0, **loose):
    assert score(text)["overall"] == pytest.approx(strict)
    return score(text, **loose)["overall"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 400, "1e7", "true"])
def test_deviation_numbers(number):
    text = response(scene='{"objects": [{"id": "cat.1", "bbox": [1, 2, 3, %s]}]}' % number)  # noqa: UP031
    assert format_failure(text) in ("scene_not_json", "bad_number", "bad_box")
    assert score(text)["overall"] == 0.0


@pytest.mark.parametrize("bbox", [[50, 50, 10, 10], [50, 10, 10, 50], [10, 10, 10, 50], [10, 10, 10, 10]])
def test_deviation_strict_boxes(bbox):
    text = response((CAT | {"bbox": bbox}, DOG))
    assert format_failure(text) is None
    assert score(text)["spatial_score"] == pytest.approx(0.5, abs=1e-5)
    assert score(text, strict_boxes=False)["spatial_score"] > 0.55


@pytest.mark.parametrize(("num_characters", "reason"), [(32_768, None), (32_769, "scene_too_long")])
def test_deviation_scene_length(num_characters, reason):
    scene = {"objects": [CAT, DOG], "relationships": [ON], "note": ""}
    scene["note"] = "x" * (num_characters - len(json.dumps(scene)))
    text = response(scene=json.dumps(scene))
    assert (format_failure(text), score(text)["overall"] > 0) == (reason, reason is None)


def test_deviation_strings_that_are_no_text_or_no_id():
    assert format_failure(response(scene='{"relationships": [], "note": "\\u0041"}')) is None
    assert format_failure(response(scene='{"relationships": [], "note": "\\ud800"}')) == "scene_not_json"
    assert format_failure(response((CAT | {"id": "cat.1\n"},))) == "bad_id"


@pytest.mark.parametrize("name", TEXT_REWARDS)
def test_deviation_empty_answers(name):
    for truth in (TRUTH, "(B) left", "", "<answer></answer>"):
        if name == "spatial_sgg" and truth != TRUTH:
            with pytest.raises(ValueError, match="scene of the ground truth"):
                REWARDS[name]([RewardInput(response(answer=""), truth, PROBLEM)])
            continue
        for text in (response(answer=""), response(answer=" \n"), "<think>t</think><answer></answer>", ""):
            assert REWARDS[name]([RewardInput(text, truth, PROBLEM)])[0]["accuracy"] == 0.0


def test_deviation_a_missing_box_is_not_none():
    assert REWARDS["math"]([RewardInput("<think>t</think> so", "None")])[0]["accuracy"] == 0.0
    assert REWARDS["math"]([RewardInput("<think>t</think>\\boxed{None}", "None")])[0]["overall"] == 1.0


def test_deviation_negative_overlaps():
    thin, flat = {"id": "cat.1", "bbox": [0, 0, 1, 100]}, {"id": "cat.1", "bbox": [0, 0, 100, 1]}
    truth = TRUTH.replace(json.dumps([CAT, DOG]), json.dumps([thin | {"bbox": [99, 0, 99.001, 40]}]))
    assert score(response((flat | {"bbox": [0, 99, 40, 99.001]},)), truth)["spatial_score"] == 0.0


@pytest.mark.parametrize(
    ("truth", "problem"),
    [
        ("", PROBLEM),
        (TRUTH.replace("{", "", 1), PROBLEM),
        (TRUTH.replace("10", "true", 1), PROBLEM),
        (TRUTH.replace("<answer>(B) left</answer>", ""), PROBLEM),
        (TRUTH.replace("(B) left", " "), PROBLEM),
        (TRUTH, "no size"),
        (TRUTH, "Image size: 100 x 100"),
        (TRUTH, "Image size: (0 x 100)"),
        (TRUTH, f"Image size: (100 x {10**400})"),
    ],
)
def test_a_bad_row_is_refused(truth, problem):
    with pytest.raises(ValueError):
        check_ground_truth(truth, problem)
    check_ground_truth(TRUTH, PROBLEM)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (response(), None),
        ("", "missing_observe"),
        (response().replace("</think>", ""), "missing_think"),
        (response().replace("<answer>", ""), "missing_answer"),
        (response() + "<think>", "repeated_think"),
        (response() + "<answer>(B) left</answer>", "repeated_answer"),
        (response() + "</answer></think>", None),
        (response(scene="[]"), "scene_not_object"),
        (response((CAT, CAT)), "duplicate_id"),
    ],
)
def test_format_failures(text, reason):
    assert format_failure(text) == reason
    assert score(text)["format"] == (reason is None)


@pytest.mark.parametrize(
    ("answer", "truth", "is_equal"),
    [
        ("(A)", "A", True), ("a", "(A)", True), ("(A) On it", "(a) on it", True), ("A", "B", False),
        ("(A) on", "(A)", False), ("5 meters", "5", True), ("5", "5 m", True), ("5 meters", "5 feet", False),
        ("5 meter", "5 meters", True), ("1/2", "0.5", True), ("\\frac{1}{2}", "0.5", True), ("\\frac12", "1/2", True),
        ("$\\frac{3}{4}$", ".75", True), ("-1/2", "-0.5", True), ("1 1/2", "1.5", True), ("1/0", "1/0", True),
        ("1/0", "2/0", False), ("1,000", "1000", True), ("50%", "50", True), ("3.0", "3", True), ("3.", "3", True),
        ("0.333", "1/3", False), ("\\text{left of}", "left of", True), ("\\boxed{\\text{B}}", "b", True),
        ("(1/2, 3)", "(0.5, 3)", True), ("(1, 2)", "[1, 2]", False), ("(1, 2)", "(2, 1)", False), ("", "", False),
        ("()", "", False), ("$$", "", False), ("the second image", "the image", False), ("3 cats", "3", False),
        ("9" * 2000, "9" * 2000, True), ("9" * 2000, "9" * 1999, False), ("x + 1", "x+1", True),
        ("x=5", "5", True), ("x = 5", "5", True), ("k = 1/2", "0.5", True), ("n=(A)", "a", True), ("x=5", "6", False),
        ("area=5", "5", False), ("x=y=5", "5", False), ("5=5", "5", False), ("x=", "5", False), ("y=5 m", "x=5", True),
        ("1e3", "1000", True), ("1E3", "1,000", True), ("1.5e-2", "0.015", True), ("-2e+1", "-20", True),
        ("1e3", "100", False), ("1e3 m", "1000", True), ("1e99", "1e98", False), ("1e999999", "1", False),
        ("2 \\times 10^{3}", "2000", True), ("10^3", "1000", True), ("1.5 × 10^-2", "0.015", True),
        ("3*10^2", "300", True), ("10^2", "100", True), ("10^2", "1000", False), ("2^10^2", "1024", False),
        ("e3", "1000", False), ("2x", "x + x", False),
        ("1" * 64, f"{'1' * 62}11 m", True), ("1" * 62, f"{'1' * 62}.0", True), ("1" * 65, f"{'1' * 65}.0", False),
        ("a" * 256, f"({'a' * 253})", False),
        ("a" * 254, f"({'a' * 254})", True), ("a" * 255, f"({'a' * 255})", False),
        ("__import__('os').getcwd()", "1", False), ("9**9**9**9", "9", False),
    ],
)  # fmt: skip
def test_equal_answers(answer, truth, is_equal):
    assert is_equal_answer(answer, truth) == is_equal
    assert is_equal_answer(truth, answer) == is_equal


def one(name, text, truth, **kwargs):
    return REWARDS[name]([RewardInput(text, truth)], **kwargs)[0]


def test_r1v():
    assert one("r1v", "<think>t</think>\n<answer>(B) left</answer>", "(B) left")["overall"] == 1.0
    assert one("r1v", "<think>t</think>\n<answer>b</answer>", "<answer>(B)</answer>")["overall"] == 1.0
    assert one("r1v", "(B) left", "(B) left") == {"overall": 0.5, "format": 0.0, "accuracy": 1.0}
    assert one("r1v", "(B) left", "(B) left", format_weight=0.1)["overall"] == pytest.approx(0.9)
    assert one("r1v", "<think>t</think><answer>\n(B)\n</answer>", "(B)")["accuracy"] == 0.0
    assert one("r1v", "<think>\n</think><answer>x\n</answer><answer>(B)</answer>", "(B)")["accuracy"] == 1.0


def test_r1v_scene():
    assert one("r1v_scene", response(), TRUTH)["overall"] == 1.0
    assert one("r1v_scene", response(answer="(B) LEFT"), TRUTH)["overall"] == 1.0
    assert one("r1v_scene", response(scene="no JSON at all"), TRUTH)["overall"] == 1.0
    assert one("r1v_scene", response(answer="(C)"), TRUTH) == {"overall": 0.5, "format": 1.0, "accuracy": 0.0}
    assert one("r1v_scene", "Sure! " + response(), TRUTH)["overall"] == 0.0


def test_math():
    assert one("math", "<think>t</think> so \\boxed{\\frac{1}{2}}", "0.5")["overall"] == 1.0
    assert one("math", "< think >t< / think >\\boxed{{a}}", "{a}")["format"] == 1.0
    assert one("math", "<think>t</think> \\boxed{1} and \\boxed{2}", "2")["overall"] == 1.0
    assert one("math", "\\boxed{2}", "2")["overall"] == pytest.approx(0.9)
    assert one("math", "<think>t</think> \\boxed{3}", "2")["overall"] == pytest.approx(0.1)
    assert one("math", "<think>t</think> \\boxed{2", "2")["overall"] == 0.0


@pytest.mark.parametrize("name", REWARDS)
def test_rewards_travel_to_other_processes(name):
    assert pickle.loads(pickle.dumps(REWARDS[name])) is REWARDS[name]
    assert REWARDS[name]([]) == []


CHILD = """
import json, sys
sys.path.insert(0, {folder!r})
from test_rewards import REWARDS, TEXT_REWARDS, golden_inputs
print(json.dumps([REWARDS[name](golden_inputs(name)[::-1])[::-1] for name in TEXT_REWARDS]))
"""


def test_scores_are_the_same_in_another_process_and_order():
    code = CHILD.format(folder=str(Path(__file__).parent))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == [REWARDS[name](golden_inputs(name)) for name in TEXT_REWARDS]


def test_gold_responses_of_synthetic_rows_score_one():
    synthetic = pytest.importorskip("spatialthinker.synthetic")
    rows = [row for _, row in synthetic.generate(number=40, seed=3)]
    inputs = [
        RewardInput(
            f"<observe>o</observe><think>t</think>{row.answer_option_text}", row.answer_option_text, row.problem
        )
        for row in rows
    ]
    for result in REWARDS["spatial_sgg"](inputs):
        assert result["overall"] == pytest.approx(1.0, abs=2e-4)

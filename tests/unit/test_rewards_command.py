import json
from pathlib import Path

import pytest

from spatialthinker.rewards import REWARDS, RewardInput
from spatialthinker.rewards.__main__ import main

GOLDEN_FILE = Path(__file__).parents[1] / "support" / "golden_rewards.jsonl"


@pytest.fixture
def rollouts(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    path.write_text("".join(GOLDEN_FILE.open().readlines()[:20]))
    return path


def test_score_writes_what_the_reward_returns(rollouts, tmp_path, capsys):
    out = tmp_path / "scores.jsonl"
    assert main(["score", str(rollouts), "--out", str(out)]) == 0
    rows = [json.loads(line) for line in rollouts.open()]
    inputs = [RewardInput(row["response"], row["ground_truth"], row["problem"]) for row in rows]
    assert [json.loads(line) for line in out.open()] == REWARDS["spatial_sgg"](inputs)
    assert main(["score", str(rollouts), "--reward", "r1v", "--truth", "answer"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 20


def test_kwargs_reach_the_reward(rollouts, capsys):
    assert main(["score", str(rollouts), "--kwargs", '{"format_weight": 0, "overlap": "iou"}']) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[2])["overall"] == 0.0
    assert main(["score", str(rollouts), "--kwargs", '{"overlap": "dice"}']) == 2


def test_explain_names_pairs_and_failures(rollouts, capsys):
    assert main(["score", str(rollouts), "--explain"]) == 0
    text = capsys.readouterr().out
    assert "lamp.3 [832, 510, 1018, 621] <- window.1 [888, 421, 922, 623]: overlap 0.535, IoU 0.159" in text
    assert "ball.5 [720, 338, 990, 362] <- hat.2" in text
    assert "building.1 [908, 740, 1024, 768] <- nothing" in text
    assert "format:   fails, repeated_answer" in text
    assert main(["score", str(rollouts), "--explain", "--reward", "r1v"]) == 2


def test_summary(capsys):
    assert main(["summary", str(GOLDEN_FILE)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "400 responses, spatial_sgg"
    means = {line.split()[0]: float(line.split()[1]) for line in lines[2:7]}
    rows = [json.loads(line)["scores"]["spatial_sgg"] for line in GOLDEN_FILE.open()]
    assert means == {name: pytest.approx(sum(row[name] for row in rows) / 400, abs=1e-4) for name in rows[0]}
    shares = [float(line.split()[1].rstrip("%")) for line in lines[8:]]
    assert sum(shares) == pytest.approx(100 * (1 - means["format"]), abs=0.05)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "rollouts.jsonl:21: "),
        ("[]", "rollouts.jsonl:21: not a JSON object"),
        ('{"response": "x"}', "rollouts.jsonl:21: no key 'ground_truth'"),
        ('{"response": 1, "ground_truth": "x"}', "rollouts.jsonl:21: response and ground_truth must be strings"),
        ('{"response": "x", "ground_truth": "x"}', "rollouts.jsonl:21: the scene of the ground truth cannot be read"),
    ],
)
def test_bad_lines_are_named(rollouts, capsys, line, message):
    with rollouts.open("a") as file:
        file.write(line + "\n")
    assert main(["score", str(rollouts)]) == 2
    assert message in capsys.readouterr().err


def test_bad_files(tmp_path, capsys):
    assert main(["summary", str(tmp_path / "none.jsonl")]) == 2
    (tmp_path / "empty.jsonl").touch()
    assert main(["summary", str(tmp_path / "empty.jsonl")]) == 2
    assert "no rollouts" in capsys.readouterr().err


def test_list_names_every_reward(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(REWARDS)
    assert all(len(line.split()) > 3 for line in lines)


def test_usage_is_the_same_however_the_program_was_started(capsys, monkeypatch):
    texts = set()
    for started_as in ("spatialthinker-rewards", "__main__.py"):
        monkeypatch.setattr("sys.argv", [started_as, "--help"])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0
        texts.add(capsys.readouterr().out)
    assert len(texts) == 1


def test_bench_prints_speeds(capsys):
    assert main(["bench", "--size", "16", "--seconds", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    assert "1 to 8" in lines[2]
    assert lines[-1].startswith("an object among 100 takes ")

"""The report is one file that shows the run's own figures; what is missing is named."""

import json
import math
import random
import re
from pathlib import Path

import pytest
import report
from PIL import Image
from toy import charts

from spatialthinker.rewards import REWARDS, RewardInput
from spatialthinker.schema import VqaRow, parquet_path, write_parquet
from spatialthinker.storage.images import encode
from spatialthinker.synthetic import generate, gold_response
from spatialthinker.visualize import lay_out

STEPS, ROWS = 30, 12


def answer_with_error(row: VqaRow, error_px: float, is_right: bool, rng: random.Random) -> str:
    """A reply whose boxes are off by some pixels."""
    text = gold_response(row)

    def shift(match: re.Match[str]) -> str:
        numbers = [max(0, round(float(n) + rng.uniform(-error_px, error_px))) for n in match[1].split(",")]
        return f'"bbox": [{", ".join(map(str, numbers))}]'

    text = re.sub(r'"bbox": \[([^\]]*)\]', shift, text)
    wrong = "(B) something else" if row.answer_only != "B" else "(A) something else"
    return text if is_right else text.replace(row.answer_option_text_only, wrong)


def write_run(run_dir: Path) -> Path:
    """A run folder as the quickstart leaves it."""
    rng = random.Random(0)
    rows = [row for _, row in generate(ROWS, seed=4, split="val")]
    write_parquet(rows, parquet_path(run_dir / "data", "val"))
    folder = run_dir / "checkpoints"
    folder.mkdir()
    (folder / "experiment_config.json").write_text(json.dumps({"data": {"val_files": f"{run_dir / 'data'}@val"}}))

    def records(error_px: float, share_right: float) -> list[dict]:
        texts = [answer_with_error(row, error_px, rng.random() < share_right, rng) for row in rows]
        if error_px > 10:
            texts[0] = "<observe>\nI see a <b>shape</b> and then nothing"
        inputs = [RewardInput(t, r.answer_option_text, r.problem) for t, r in zip(texts, rows, strict=True)]
        scores = REWARDS["spatial_sgg"](inputs)
        return [
            {"problem": r.problem, "ground_truth": r.answer_option_text, "response": t, "score": s, "sample": 0}
            for r, t, s in zip(rows, texts, scores, strict=True)
        ]

    with (folder / "generations.jsonl").open("w") as generations:
        for step, result in ((0, records(14, 0.4)), (STEPS, records(3, 0.9))):
            lines = [json.dumps(record) + "\n" for record in result]
            (folder / f"validation_step_{step}.jsonl").write_text("".join(lines))
            generations.writelines(json.dumps({"step": step} | record) + "\n" for record in result[:9])
    log = [{"step": 0, "val/reward_score": 0.35}]
    for step in range(1, STEPS + 1):
        rise = 1 - math.exp(-step / 12)
        noisy = {
            f"reward/{part}": top * rise + rng.uniform(0, 0.06)
            for part, top in (
                ("overall", 0.7),
                ("format", 0.95),
                ("count", 0.8),
                ("accuracy", 0.75),
                ("spatial_score", 0.5),
            )
        }
        mean = 150 - 20 * rise + rng.uniform(-3, 3)
        length = {"response_length/mean": mean, "response_length/min": mean - 40, "response_length/max": mean + 60}
        log.append({"step": step} | noisy | length | {"actor/kl_loss": 0.002 * step + rng.uniform(0, 0.004)})
        if step % 10 == 0:
            log[-1]["val/reward_score"] = 0.35 + 0.4 * rise
    (folder / "experiment_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return run_dir


def write_evaluation(run_dir: Path) -> None:
    interval = {"accuracy_low": 0.5, "accuracy_high": 0.9}
    tasks = {"relation": {"n": 6, "accuracy": 0.75} | interval, "depth": {"n": 6, "accuracy": 0.7} | interval}
    settings = {"dataset": "stvqa", "template": "spatial_thinker_full", "provider": "vllm"}
    summary = {"settings": settings, "n": 12, "items": 12, "answered": 12, "accuracy": 0.725, "tasks": tasks}
    (run_dir / "evaluation").mkdir()
    text = json.dumps(summary | interval | {"parse_failure_rate": 0.0, "kinds": {"letter": 9, "conflict": 3}})
    (run_dir / "evaluation" / "stvqa.summary.json").write_text(text)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "quickstart")


def test_the_page_stands_alone_and_shows_the_run(run_dir, tmp_path):
    write_evaluation(run_dir)
    assert report.main(["--run_dir", str(run_dir), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "index.html").read_text()
    assert not re.search(r'(src|href|srcset)="(?!data:)', page) and "http" not in re.sub(r"data:[^\"]*", "", page)
    comparison = report.summarize_validation(run_dir / "checkpoints")
    assert f"{comparison['reward_after']:.3f}" in page and f"{comparison['accuracy_before']:.3f}" in page
    assert page.count("<article") == report.NUM_ROLLOUTS
    assert page.count("boxes predicted and true") == 2 * report.NUM_ROLLOUTS  # before and after
    assert "a &lt;b&gt;shape&lt;/b&gt;" in page and "<b>shape" not in page
    assert "Its scene graph cannot be read" in page and "In 3 answers letter and text disagree" in page
    names = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert names == {"reward", "reward_parts", "response_length", "kl", "before_after", "rollouts"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "out").glob("*.png"))


def test_a_run_without_kl_has_no_kl_chart(run_dir, tmp_path):
    log = [json.loads(line) for line in (run_dir / "checkpoints" / "experiment_log.jsonl").read_text().splitlines()]
    bare = [{key: value for key, value in line.items() if key != "actor/kl_loss"} for line in log]
    names = [name for name, _, _ in report.draw_charts(report.read_run(run_dir), report.LIGHT)]
    assert "kl" in names
    assert not report.series(bare, "actor/kl_loss").values


@pytest.mark.parametrize(
    "name", ["experiment_log.jsonl", "generations.jsonl", "experiment_config.json", "validation_step_0.jsonl"]
)
def test_a_missing_file_is_named(tmp_path, capsys, name):
    run_dir = write_run(tmp_path / "run")
    (run_dir / "checkpoints" / name).unlink()
    assert report.main(["--run_dir", str(run_dir)]) == 2
    message = capsys.readouterr().err
    assert name in message or "before and after need step 0" in message
    assert not (run_dir / "report").exists()


def test_broken_and_empty_files_are_named(tmp_path, capsys):
    run_dir = write_run(tmp_path / "run")
    log = run_dir / "checkpoints" / "experiment_log.jsonl"
    log.write_text(log.read_text() + '{"step": 3')
    assert report.main(["--run_dir", str(run_dir)]) == 2
    assert f"experiment_log.jsonl, line {STEPS + 2}" in capsys.readouterr().err
    log.write_text("")
    assert report.main(["--run_dir", str(run_dir)]) == 2
    assert "is empty" in capsys.readouterr().err
    assert report.main(["--run_dir", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "$x_",
        "costs $5 or $6^",
        r"\\frac{$",
        "[a] $\\q$",
        "a\x00b\x1b[31m",
        "\ud800",
    ],
)
def test_no_answer_is_a_formula_or_a_control_sign_of_the_sheet(text):
    picture = encode(Image.new("RGB", (20, 20)), "PNG")
    assert charts.draw_pictures([(picture, lay_out((20, 20)))], [f"question\n{text}"]).startswith(b"\x89PNG")

"""A dry run says what a run would do and starts none of it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from spatialthinker.rewards import REWARDS, RewardInput
from spatialthinker.rewards.gold import gold_response
from spatialthinker.synthetic import generate
from verl.config.loading import load_config
from verl.config.records import RewardConfig
from verl.trainer import main as program
from verl.trainer.dry_run import check_data, describe_batch, describe_steps

ROOT = Path(__file__).parents[2]


@pytest.mark.integration
def test_a_dry_run_prints_everything_and_exits_with_0(tmp_path, capsys, monkeypatch):
    def no_ray(*_):
        raise AssertionError("a dry run starts nothing")

    monkeypatch.setattr(program, "start_ray", no_ray)
    monkeypatch.chdir(ROOT)
    rows = [vars(row) | {"images": {"bytes": row.images, "path": None}} for _, row in generate(40, seed=1)]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    arguments = ["config=configs/toy_cpu.yaml", "trainer.dry_run=true", f"data.train_files={tmp_path}/rows.parquet"]
    arguments += [f"data.val_files={tmp_path}/rows.parquet", f"trainer.save_checkpoint_path={tmp_path}/run"]
    assert program.main(arguments) == 0
    printed = capsys.readouterr().out
    for words in (
        '"rollout_batch_size": 32',
        "36 of 32 prompts each; 40 prompts make 1 steps an epoch, so these are 36.0 epochs",
        "32 prompts x 8 responses = 256 responses a step",
        "16 prompts for each of 2 ranks",
        "Memory, estimated",
        "log-probs",
        "This machine has",
        "Checks over the ground truths of 40 rows: ",
    ):
        assert words in printed
    assert printed.count("Reward of the ground truth: overall 1.000") == 3
    assert printed.count("16 of them for 1 images") == 3
    assert printed.count("Image of 112 x 112 pixels, which the model sees as 112 x 112") == 3
    assert rows[0]["question_only"] in printed and "<|im_start|>" in printed
    assert not (tmp_path / "run").exists()


def test_steps_and_passes_by_hand():
    config = load_config(["trainer.val_freq=10", "trainer.save_freq=-1"])
    steps = describe_steps(config, 6895, 75)
    assert "6895 prompts make 13 steps an epoch, so these are 5.8 epochs" in steps[0]
    assert steps[1] == "Validations: 9; checkpoints: 1"  # 10, 20, ..., 70, 75 and before the first
    # A full group has 6144 + 8 x 2048 = 22528 tokens: one fits into 4 x 8192 and five into 16 x 8192.
    lines = describe_batch(config)
    assert "4 a step, each of 128 prompts = 1024 responses; 32 prompts for each of 4 ranks" in lines[1]
    assert "at full length 32 passes" in lines[2] and "at full length 26 passes" in lines[3]


TYPED = {"numbers": "3.5 m", "points": [2, 2, 8, 8], "boxes": [[0, 0, 5, 5]], "ordering": ["cat", "dog"]}
TYPED["relations"] = [["cat", "on", "mat"]]


@pytest.mark.parametrize("name", TYPED)
def test_the_gold_response_of_a_typed_ground_truth_earns_all(name):
    (score,) = REWARDS[name]([RewardInput(gold_response(name, TYPED[name]), TYPED[name], "Image size: (10 x 10)")])
    assert score["overall"] == pytest.approx(1.0)


@pytest.mark.parametrize("name", [name for name in REWARDS if name not in (*TYPED, "length")])
def test_the_gold_response_of_every_reward_earns_all(name):
    truth = '<scene>{"objects": [{"id": "a.1", "bbox": [0, 0, 5, 5]}], "relationships": []}</scene>\n'
    truth += "<answer>(B) left</answer>"
    problem = "<image>Image size: (10 x 10)"
    for ground_truth in (truth, "(B) left") if name in ("r1v", "math") else (truth,):
        expected = "(B) left" if name == "math" else ground_truth
        (score,) = REWARDS[name]([RewardInput(gold_response(name, ground_truth), expected, problem)])
        assert score["overall"] == pytest.approx(1.0)


def test_gpus_that_are_not_there_are_named(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = load_config(["trainer.device=cuda", "trainer.n_gpus_per_node=64", "worker.actor.global_batch_size=128"])
    with pytest.raises(program.ConfigError, match=r"trainer.n_gpus_per_node = 64: this machine has \d GPUs"):
        program.choose_device(config)


@pytest.mark.integration
def test_a_run_shows_a_prompt_and_its_gold_reward_before_anything_starts(tmp_path, capsys, monkeypatch):
    def stop(*_):
        raise program.ConfigError(["stopped before Ray"])

    monkeypatch.setattr(program, "start_ray", stop)
    monkeypatch.chdir(ROOT)
    rows = [vars(row) | {"images": {"bytes": row.images, "path": None}} for _, row in generate(32, seed=1)]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    arguments = ["config=configs/toy_cpu.yaml", f"data.train_files={tmp_path}/rows.parquet"]
    arguments += [f"data.val_files={tmp_path}/rows.parquet", f"trainer.save_checkpoint_path={tmp_path}/run"]
    assert program.main(arguments) == program.USER_ERROR
    shown = capsys.readouterr()
    assert "stopped before Ray" in shown.err
    assert "Reward of the ground truth: overall 1.000, format 1.000" in shown.out
    assert rows[0]["question_only"] in shown.out


def test_ground_truths_that_are_off_are_shown_before_a_run(tmp_path):
    """Boxes that leave the image, and answers longer than a response may be."""
    rows = [row for _, row in generate(40, seed=1)]
    prompts = [
        SimpleNamespace(problem=row.problem, ground_truth=gold.replace('"bbox": [', '"bbox": [1'), images=[row.images])
        for row in rows
        if (gold := row.answer_option_text)
    ]
    data: Any = SimpleNamespace(
        read=lambda index, is_resized: prompts[index],
        processor=SimpleNamespace(tokenizer=lambda texts: {"input_ids": [text.split() for text in texts]}),
    )
    shown: Any = type("Rows", (SimpleNamespace,), {"__len__": lambda self: len(prompts)})(**vars(data))
    lines = check_data(shown, 3, program.GoldReader(RewardConfig(score_function="spatial_sgg")))
    text = "\n".join(lines)
    assert "Worth a look: boxes_in_another_frame" in text and "Worth a look: truncation 1 (above 0.1)" in text
    assert "same_box 0" not in text

"""A user's mistake ends the program with code 2 and one message, before Ray or an engine starts."""

from pathlib import Path

import pytest
from datasets import Dataset

from spatialthinker.synthetic import generate
from verl.config.loading import load_config
from verl.config.records import ConfigError
from verl.trainer import main as program

ROOT = Path(__file__).parents[2]
EXISTING = [
    f"worker.actor.model.model_path={ROOT / 'configs' / 'toy_model'}",
    "data.train_files=owner/name",
    "data.val_files=owner/name",
]


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    def no_ray(*_):
        raise AssertionError("Ray was started although the fault could be known before")

    monkeypatch.setattr(program, "start_ray", no_ray)
    rows = [vars(row) | {"images": {"bytes": row.images, "path": None}} for _, row in generate(8, seed=1)]

    def start(*overrides: str, change: dict | None = None) -> str:
        for split in ("train", "val"):
            changed = [*rows[:3], rows[3] | (change or {}), *rows[4:]]
            Dataset.from_list(changed).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
        arguments = [
            f"config={ROOT / 'configs' / 'toy_cpu.yaml'}",
            f"worker.actor.model.model_path={ROOT / 'configs' / 'toy_model'}",
            f"data.train_files={tmp_path}@train",
            f"data.val_files={tmp_path}@val",
            f"trainer.save_checkpoint_path={tmp_path / 'run'}",
            "data.rollout_batch_size=4",
            "worker.actor.global_batch_size=4",
        ]
        assert program.main([*arguments, *overrides]) == program.USER_ERROR
        assert not (tmp_path / "run" / "global_step_1").exists()
        return capsys.readouterr().err

    return start


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("worker.rollout.n=1", ["got a group of 1", "worker.rollout.n"]),
        ("worker.actor.model.model_path=/nothing/here", ["/nothing/here", "model_path"]),
        ("data.rollout_batch_size=6", ["data.rollout_batch_size", "6", "4"]),
        ("worker.actor.global_batch_size=3", ["worker.actor.global_batch_size", "3"]),
        ("data.max_respons_length=5", ["max_respons_length", "max_response_length"]),
    ],
)
def test_a_bad_key_is_named(run, override, words):
    message = run(override)
    assert all(word in message for word in words)


def test_all_faults_of_a_configuration_come_together(run):
    message = run("worker.rollout.n=1", "worker.actor.optim.lr=-1", "trainer.logger=[console,nothing]")
    assert "3 faults in the configuration" in message


def test_all_faults_of_machine_model_and_checkpoint_come_together(run, tmp_path):
    (tmp_path / "global_step_3").mkdir()
    message = run(
        "trainer.logger=[swanlab]",
        "worker.actor.model.lora.rank=4",
        "worker.actor.model.lora.target_modules=q_prox",
        f"trainer.load_checkpoint_path={tmp_path / 'global_step_3'}",
    )
    assert "3 faults in the configuration" in message
    assert all(word in message for word in ("pip install swanlab", "q_prox", "has no manifest.json"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": None}, "0 images"),
        ({"problem": "<image> Where is it?"}, "Image size"),
        ({"answer_option_text": "<scene>{</scene><answer>(A) on</answer>"}, "scene"),
    ],
)
def test_a_bad_row_is_named(run, change, words):
    message = run(change=change)
    assert message.count("Error: ") == 1
    assert "row 3" in message and words in message


def test_a_prompt_that_is_too_long_is_named_when_it_may_not_be_left_out(run):
    assert "data.max_prompt_length=20" in run("data.max_prompt_length=20", "data.filter_overlong_prompts=false")


def test_a_reward_that_raises_is_found_before_training(run, tmp_path):
    (tmp_path / "reward.py").write_text("def main(items): raise ZeroDivisionError('no score today')\n")
    message = run(f"worker.reward.reward_function={tmp_path / 'reward.py'}:main")
    assert "Error: the reward function raised ZeroDivisionError: no score today" in message


def test_a_model_folder_without_a_processor_is_named(run, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    message = run(f"worker.actor.model.model_path={folder}")
    assert "worker.actor.model.model_path" in message and str(folder) in message


def test_a_damaged_checkpoint_to_go_on_from_is_named(run, tmp_path):
    folder = tmp_path / "old" / "global_step_3"
    folder.mkdir(parents=True)
    assert f"{folder} has no manifest.json" in run(f"trainer.load_checkpoint_path={folder}")
    (folder / "manifest.json").write_text('{"actor/__0_0.distcp": {"bytes": 1000, "sha256": "0"}}')
    message = run(f"trainer.load_checkpoint_path={folder}")
    assert "trainer.load_checkpoint_path" in message and "should have 1000 bytes and has None" in message
    assert "there is no such folder" in run(f"trainer.load_checkpoint_path={tmp_path / 'new' / 'global_step_3'}")


def test_a_logger_that_is_not_installed_is_named_with_its_cure(run):
    assert "pip install swanlab" in run("trainer.logger=[console,swanlab]")


def test_more_machines_than_there_are_is_a_fault_of_the_configuration(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = load_config([f"config={ROOT / 'configs' / 'toy_cpu.yaml'}", "trainer.nnodes=2", *EXISTING])
    with pytest.raises(ConfigError, match=r"trainer.nnodes = 2: several machines need a running Ray cluster"):
        program.check_this_machine(config, "cpu")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"trainer.n_gpus_per_node = 2: this machine has 1 GPUs"):
        program.check_this_machine(config, "cuda")

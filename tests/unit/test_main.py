"""A user's mistake ends the program with code 2 and one message, before Ray or an engine starts."""

import os
import signal
import socketserver
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from datasets import Dataset

from spatialthinker.synthetic import generate
from tests.support.training import HOLDER
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


@pytest.mark.parametrize("dry_run", ["true", "false"])
@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("save_checkpoint_path", "/proc/no/run"),
        ("save_checkpoint_path", "FILE/run"),
        ("save_checkpoint_path", "x" * 300),
        ("ray_timeline", "/proc/no/timeline.json"),
        ("ray_timeline", "FILE/timeline.json"),
    ],
)
def test_a_folder_that_cannot_be_made_is_named(run, tmp_path, key, place, dry_run):
    (tmp_path / "file").write_text("")
    place = place.replace("FILE", str(tmp_path / "file"))
    message = run(f"trainer.{key}={place}", f"trainer.dry_run={dry_run}")
    assert message.count("Error: ") == 1 and "1 fault" in message
    assert f"trainer.{key} = " in message and place in message and "cannot be written to" in message


def test_folders_that_can_be_made_are_left_unmade(tmp_path):
    trainer = load_config(
        [f"trainer.save_checkpoint_path={tmp_path}/a/b", f"trainer.ray_timeline={tmp_path}/c/d.json"]
    )
    program.check_folders(trainer.trainer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_output_that_cannot_show_every_sign_ends_no_run(tmp_path, monkeypatch, encoding):
    with (tmp_path / "out").open("w", encoding=encoding) as stream:
        monkeypatch.setattr("sys.stdout", stream)
        assert program.main(["--help", "trainer.seed"]) == 0
        print("\u7d05 \u2713")
    assert "\\u7d05" in (tmp_path / "out").read_text(encoding=encoding)


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


def test_a_folder_in_which_another_trainer_works_is_named(run, tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as holder:
        assert holder.stdout.readline() == "locked\n"
        assert f"process {holder.pid} of " in run()
        holder.kill()


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


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return [{'overall': None}]", "the reward function returned None as 'overall'"),
        ("return [{'overall': 1.0, 'style': 'good'}]", "the reward function returned 'good' as 'style'"),
        ("return [{'overall': float('nan')}]", "the reward function returned nan as 'overall'"),
        ("import sys; sys.exit('no key')", "the reward function raised SystemExit: no key"),
        ("while True: pass", "did not return within 20 s (trainer.watchdog_timeout_s=20, "),
    ],
)
def test_a_reward_that_cannot_be_trained_on_is_named_in_a_dry_run_too(run, tmp_path, monkeypatch, body, words):
    (tmp_path / "reward.py").write_text(f"def main(items):\n    {body}\n")
    function = f"worker.reward.reward_function={tmp_path / 'reward.py'}:main"
    monkeypatch.setattr("verl.reward.pool.START_S", 0.0 if "True" in body else 60.0)
    message = run(function, "trainer.dry_run=true", "trainer.watchdog_timeout_s=20").rpartition("Error: ")[2]
    assert words in message and "reward.py" in message and ("True" in body or "row " in message)


def test_a_part_that_filtering_looks_at_and_no_reward_has_is_named(run):
    message = run("algorithm.online_filtering=true", "algorithm.filter_key=style", "trainer.dry_run=true")
    assert "algorithm.filter_key = 'style': the reward returns only overall, format" in message


@pytest.mark.parametrize("address", ["127.0.0.1:1", "not an address", "auto", "ray://127.0.0.1:1"])
def test_an_address_without_a_ray_cluster_is_named(run, monkeypatch, address):
    monkeypatch.setattr(program, "RAY_TIMEOUT_S", 6)
    monkeypatch.setenv("RAY_ADDRESS", address)
    message = run("trainer.dry_run=true")
    assert f"RAY_ADDRESS = {address!r}: no Ray cluster can be joined there (" in message


class Stranger(socketserver.BaseRequestHandler):
    """Server of something else: takes a connection, says what it says, and leaves it open."""

    words = b""

    def handle(self) -> None:
        self.request.sendall(self.words)
        while self.request.recv(65536):
            pass


@pytest.mark.parametrize("scheme", ["", "ray://"])
@pytest.mark.parametrize("words", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_an_address_at_which_something_else_listens_is_named(run, monkeypatch, words, scheme):
    monkeypatch.setattr(program, "RAY_TIMEOUT_S", 6)
    handler = type("Handler", (Stranger,), {"words": words})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"{scheme}127.0.0.1:{server.server_address[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        message = run("trainer.dry_run=true")
        server.shutdown()
    assert message.count(f"RAY_ADDRESS = {address!r}: no Ray cluster can be joined there (") == 1


@pytest.mark.parametrize("address", ["", " ", "local"])
def test_an_address_that_names_no_cluster_asks_for_none(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert program.cluster_address() is None
    program.check_ray_address()


def test_ray_is_started_anew_with_signals_waiting_and_its_faults_are_told(monkeypatch):
    calls: list[tuple[str, bool]] = []
    waiting = {signal.SIGTERM, signal.SIGHUP}

    def init(address, **_):
        calls.append((address, waiting <= signal.pthread_sigmask(signal.SIG_BLOCK, [])))
        raise ConnectionError("no room")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.init", init)
    config = load_config([f"config={ROOT / 'configs' / 'toy_cpu.yaml'}", *EXISTING])
    with pytest.raises(ConfigError, match=r"Ray could not be started \(on this machine\): no room"):
        program.start_ray(config, "cpu")
    assert calls == [("local", True)]  # never somebody else's cluster
    assert not waiting & signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252"])
def test_a_terminal_that_cannot_show_a_text_ends_nothing(encoding):
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    command = "from verl.trainer.main import main; main(['--list']); print('→ ＡＢ ü', flush=True)"
    ended = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, cwd=ROOT)
    assert ended.returncode == 0 and b"\\u2192 \\uff21" in ended.stdout

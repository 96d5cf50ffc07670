"""Loggers: what they write, and what is left after a run was killed and started again."""

import io
import json
import sys
import threading
import types
import typing

import numpy as np
import pytest
import torch
from PIL import Image

from spatialthinker.storage.images import encode
from verl.config.records import ConfigError, TrainerConfig
from verl.trainer import services, tracking
from verl.trainer.tracking import LOGGERS, Tracker

SAMPLES = [
    {"problem": f"question {i}", "response": "<answer>\nA</answer>", "score": {"overall": np.float32(0.5)}}
    for i in range(6)
]


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 2)).save(file, "PNG")
    return file.getvalue()


PNG = png()


def make(folder, *loggers: str) -> Tracker:
    return Tracker(loggers, "project", "experiment", folder, {"data": {"seed": 1}})


def lines(folder, name: str = "experiment_log") -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def scalars(folder) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("reward/overall")]


def test_the_names_are_those_of_the_configuration():
    element, _ = typing.get_args(typing.get_type_hints(TrainerConfig)["logger"])
    assert typing.get_args(element) == tuple(LOGGERS)


def test_unknown_and_uninstalled_loggers_are_named_with_their_cure(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="'wandbb': must be one of console, file, tensorboard, wandb"):
        make(tmp_path, "console", "wandbb")
    monkeypatch.setitem(tracking.PACKAGES, "tensorboard", "no_such_package")
    with pytest.raises(ConfigError, match="pip install no_such_package"):
        make(tmp_path, "tensorboard")


def test_numbers_of_any_kind_become_json(tmp_path):
    tracker = make(tmp_path, "file")
    tracker.log({"a": 1, "b": np.float32(0.5), "c": torch.tensor(2), "d": float("nan"), "e": np.int64(3)}, 1)
    tracker.log({"a/b": torch.tensor([0.25]), "a": 2}, 2)
    assert lines(tmp_path) == [
        {"step": 1, "a": 1, "b": 0.5, "c": 2, "d": None, "e": 3},
        {"step": 2, "a/b": 0.25, "a": 2},
    ]
    assert json.loads((tmp_path / "experiment_config.json").read_text()) == {"data": {"seed": 1}}


def test_a_resumed_run_drops_the_steps_it_repeats_and_a_half_written_line(tmp_path):
    first = make(tmp_path, "file")
    for step in range(4):
        first.log({"loss": step}, step)
        first.log_generations(SAMPLES, step, 1)
    with (tmp_path / "experiment_log.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    second = make(tmp_path, "file")
    second.resume(2)
    second.log({"loss": 30}, 3)
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(0, 0), (1, 1), (2, 2), (3, 30)]
    assert [line["step"] for line in lines(tmp_path, "generations")] == [0, 1, 2]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_run_that_starts_over_replaces_what_an_aborted_one_left(tmp_path):
    make(tmp_path, "file").log({"loss": 1}, 0)
    make(tmp_path, "file").log({"loss": 2}, 1)
    make(tmp_path, "file").log({"loss": 3}, 0)
    assert lines(tmp_path) == [{"step": 0, "loss": 3}]


def test_generations_are_those_of_the_same_rows_each_time(tmp_path):
    tracker = make(tmp_path, "file")
    tracker.log_generations(SAMPLES, 0, 3)
    tracker.log_generations(SAMPLES[::-1], 5, 3)
    tracker.log_generations(SAMPLES, 6, 0)
    rows = lines(tmp_path, "generations")
    assert [row["problem"] for row in rows[:3]] == [row["problem"] for row in rows[3:]] and len(rows) == 6
    assert len({row["problem"] for row in rows}) == 3 and rows[0]["score"] == {"overall": 0.5}


def test_the_console_groups_metrics_and_shortens_samples(tmp_path, capsys):
    tracker = make(tmp_path, "console")
    tracker.log({"actor/lr": 1e-6, "actor/kl_loss": 0.12345678, "actor": 1, "reward/overall": np.float32(0.5)}, 7)
    tracker.log_generations([{"problem": "q", "response": "a\n" * 2000}], 7)
    tracker.close()
    output = capsys.readouterr().out
    assert "step 7\n  actor: lr 1e-06, kl_loss 0.1235, actor 1\n  reward: overall 0.5\n" in output
    assert f"project / experiment: checkpoints and logs in {tmp_path}" in output
    assert "validation sample 1 of 1" in output and output.endswith("...\n") and len(output) < 2000


def test_tensorboard_hides_the_steps_a_resumed_run_repeats(tmp_path):
    first = make(tmp_path, "tensorboard")
    for step in (1, 2, 3):
        first.log({"reward/overall": step, "note": "text"}, step)
    first.log_generations(SAMPLES, 3, 1)
    first.close()
    second = make(tmp_path, "tensorboard")
    second.resume(1)
    second.log({"reward/overall": 20}, 2)
    second.close()
    assert scalars(tmp_path) == [(1, 1.0), (2, 20.0)]


def test_an_unused_tracker_closes(tmp_path):
    make(tmp_path, "console", "file", "tensorboard").close()
    assert not (tmp_path / "tensorboard").exists()


class FakeWandb(types.ModuleType):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.logged = [], []
        self.Image = lambda picture: picture.size
        self.Table = FakeTable

    def init(self, **arguments):
        self.started.append(arguments)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.logged.append("finished")


class FakeTable:
    def __init__(self, columns):
        self.columns, self.rows = columns, []

    def add_data(self, *row):
        self.rows.append(row)


def test_a_server_gets_tables_with_images_and_the_same_run_again(tmp_path, monkeypatch):
    server = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", server)
    monkeypatch.setattr(tracking, "find_spec", lambda name: True)
    for step in (1, 2):
        tracker = make(tmp_path, "wandb", "file")
        tracker.log({"loss": step}, step)
        tracker.log_generations([{"problem": "q", "response": "r", "images": [PNG]}], step)
        tracker.close()
    assert server.started[0]["id"] == server.started[1]["id"] and server.started[1]["resume"] == "allow"
    assert server.started[0]["project"] == "project" and server.started[0]["config"] == {"data": {"seed": 1}}
    assert server.logged[0] == (1, {"loss": 1}) and server.logged[2] == "finished"
    table = server.logged[1][1]["val/generations"]
    assert table.columns == ["step", "problem", "response", "images"] and table.rows == [(1, "q", "r", [(4, 2)])]
    assert lines(tmp_path, "generations") == [
        {"step": 1, "problem": "q", "response": "r"},
        {"step": 2, "problem": "q", "response": "r"},
    ]


def test_tensorboard_shows_the_images_of_samples(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = make(tmp_path, "tensorboard")
    tracker.log_generations([{"problem": "q", "images": [PNG]}], 1)
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert (
        events.Images("val/generation_1/image_1")[0].width,
        events.Images("val/generation_1/image_1")[0].height,
    ) == (4, 2)


def test_a_logger_that_cannot_write_is_told_and_the_run_goes_on(tmp_path, capsys):
    tracker = make(tmp_path, "file", "console")
    tracker.log({"loss": 0}, 6)
    log = tmp_path / "experiment_log.jsonl"
    log.unlink()
    log.symlink_to("/dev/full")  # only now: whoever reads it never comes to its end
    capsys.readouterr()
    tracker.log({"loss": 1}, 7)
    output = capsys.readouterr().out
    assert "Warning: FileLogger could not write 7: [Errno 28] No space left on device" in output
    assert "step 7\n  loss: loss 1" in output


class FakeMlflow(types.ModuleType):
    """An MLflow whose calls can be made to fail or to hang."""

    def __init__(self):
        super().__init__("mlflow")
        self.fault: BaseException | None = None
        self.gate, self.logged, self.threads = threading.Event(), [], set()
        self.gate.set()

    def _answer(self):
        self.threads.add(threading.get_ident())
        self.gate.wait()
        if self.fault is not None:
            raise self.fault

    def set_experiment(self, name):
        self._answer()

    def start_run(self, **names):
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="1"))

    def log_params(self, params):
        self._answer()

    def log_metrics(self, metrics, step):
        self._answer()
        self.logged.append(step)

    def end_run(self):
        self._answer()


@pytest.fixture
def mlflow(monkeypatch):
    server = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", server)
    monkeypatch.setattr(tracking, "find_spec", lambda name: True)
    yield server
    server.gate.set()


class MlflowException(Exception):
    """As MLflow's own: no OSError."""


@pytest.mark.parametrize("fault", [MlflowException("API request failed"), SystemExit(1), TimeoutError("slow")])
def test_an_outage_of_a_service_is_told_and_the_run_goes_on(tmp_path, mlflow, capsys, fault):
    tracker = make(tmp_path, "mlflow", "file")
    mlflow.fault = fault
    tracker.log({"loss": 1}, 1)
    tracker.resume(1)
    tracker.close()
    output = capsys.readouterr().out
    assert f"Warning: MlflowLogger could not write 1: {type(fault).__name__}: {fault}" in output
    assert "could not write its last entries" in output
    mlflow.fault = None
    tracker.log({"loss": 2}, 2)
    assert mlflow.logged == [2] and [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert len(mlflow.threads) == 1  # its active run belongs to a thread


def test_a_service_that_does_not_answer_holds_nothing_up_and_gets_all_entries_later(
    tmp_path, mlflow, capsys, monkeypatch
):
    tracker = make(tmp_path, "mlflow")
    monkeypatch.setattr(services, "TIMEOUT_S", 0.05)
    mlflow.gate.clear()
    for step in (1, 2, 3):
        tracker.log({"loss": step}, step)
    output = capsys.readouterr().out
    assert "could not write 1: no answer within 0.05 s" in output
    assert "could not write 3: it still waits for an answer to an earlier entry; this one is queued" in output
    mlflow.gate.set()
    monkeypatch.setattr(services, "TIMEOUT_S", 20.0)
    tracker.close()
    assert mlflow.logged == [1, 2, 3]


@pytest.mark.parametrize("is_hanging", [False, True])
def test_a_service_that_cannot_be_started_is_a_fault_of_the_configuration(tmp_path, mlflow, monkeypatch, is_hanging):
    monkeypatch.setattr(services, "START_TIMEOUT_S", 0.05 if is_hanging else 20.0)
    mlflow.fault = MlflowException("API request failed")
    if is_hanging:
        mlflow.gate.clear()
    with pytest.raises(ConfigError) as caught:
        make(tmp_path, "mlflow")
    reason = "no answer within 0.05 s" if is_hanging else "MlflowException: API request failed"
    assert f"trainer.logger holds 'mlflow', which could not be started ({reason})" in str(caught.value)


def test_a_closed_pipe_does_not_end_the_run(tmp_path, monkeypatch):
    tracker = make(tmp_path, "console", "file")

    def fail(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr(tracking.tqdm, "write", fail)
    monkeypatch.setattr("builtins.print", fail)
    tracker.log({"loss": 1}, 1)
    assert lines(tmp_path) == [{"step": 1, "loss": 1}]


def test_loggers_show_pictures_upright_and_on_white():
    exif = Image.Exif()
    exif[0x0112] = 6
    sample = {
        "images": [encode(Image.new("RGBA", (4, 4)), "PNG"), encode(Image.new("RGB", (30, 20)), "JPEG", exif=exif)]
    }
    clear, turned = services._pictures(sample)
    assert clear.getpixel((0, 0)) == (255, 255, 255) and turned.size == (20, 30)

"""Saves: state, best checkpoint, failures, waits, and the folder's lock; real checkpoints of ranks without weights."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.saving import Ranks, kept, save, settings, start
from tests.support.training import HOLDER
from verl.config.records import ConfigError
from verl.distributed import checkpoint
from verl.distributed.single_controller import WorkerError
from verl.trainer.batches import Position
from verl.trainer.saver import (
    LOCK_FILE,
    CheckpointError,
    CheckpointSaver,
    TrainState,
    _locks,
    lock_folder,
    restore,
)

ROOT = Path(__file__).parents[2]
NAN, INFINITY = float("nan"), float("inf")


def test_the_best_checkpoint_is_known_again_after_a_restart(tmp_path):
    save(start(tmp_path, save_limit=1), 1, score=0.9)
    saver = start(tmp_path, save_limit=1)
    assert saver.best == {"step": 1, "score": 0.9}
    save(saver, 2, score=0.5)
    save(saver, 3)
    assert kept(tmp_path) == {1, 3} and saver.best == {"step": 1, "score": 0.9}
    save(start(tmp_path, save_limit=1), 4, score=0.95)
    assert kept(tmp_path) == {4}


def test_a_best_checkpoint_that_is_gone_or_of_other_rows_counts_no_more(tmp_path):
    save(start(tmp_path, save_limit=-1), 1, score=0.9)
    saver = start(tmp_path, save_limit=-1)
    save(saver, 2)
    saver.identity = {"val_data": "old"}
    save(saver, 3)
    assert start(tmp_path, load_checkpoint_path=str(tmp_path / "global_step_2")).best is not None
    batches: Any = SimpleNamespace(restore=lambda *_: None, position=Position())
    for rows, best in (("old", {"step": 1, "score": 0.9}), ("new", None)):
        other = CheckpointSaver(tmp_path, [Ranks()], settings(tmp_path), {"val_data": rows})  # type: ignore[list-item]
        restore(tmp_path / "abandoned_1" / "global_step_3", other, batches, other.groups[0])
        assert other.best is None  # it lies in another folder
        (tmp_path / "abandoned_1" / "global_step_1").mkdir(exist_ok=True)
        restore(tmp_path / "abandoned_1" / "global_step_3", other, batches, other.groups[0])
        assert other.best == best
        (tmp_path / "abandoned_1" / "global_step_1").rmdir()


@pytest.mark.parametrize("broken", [NAN, INFINITY, -INFINITY])
def test_a_score_that_is_no_number_is_never_the_best(tmp_path, broken):
    saver = start(tmp_path, save_limit=1)
    save(saver, 1, score=broken)
    assert saver.best is None
    save(saver, 2, score=0.1)
    save(saver, 3, score=broken)
    save(saver, 4)
    assert saver.best == {"step": 2, "score": 0.1} and kept(tmp_path) == {2, 4}


@pytest.mark.parametrize("broken", [NAN, INFINITY])
def test_a_stored_best_that_is_no_number_gives_way(tmp_path, broken):
    saver = start(tmp_path, save_limit=1)
    saver.best = {"step": 1, "score": broken}  # as older versions noted it
    save(saver, 1)
    saver = start(tmp_path, save_limit=1)
    save(saver, 2, score=0.1)
    assert saver.best == {"step": 2, "score": 0.1} and kept(tmp_path) == {2}


@pytest.mark.parametrize(
    "error", [KeyError("shape"), MemoryError(), RuntimeError("a file is gone"), OSError(28, "full")]
)
def test_any_exception_of_the_saving_thread_is_a_failed_save(tmp_path, error, capsys):
    saver = start(tmp_path, on_save_error="stop")
    save(saver, 1)
    saver.groups[0].fault = error  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match=f"step 2 could not be written.*{type(error).__name__}"):
        save(saver, 2)
    assert saver.num_failed == 1 and saver.saved_step == 1 and kept(tmp_path) == {1}
    assert not list(tmp_path.glob("*.tmp"))
    saver.settings = settings(tmp_path, on_save_error="continue")
    save(saver, 3)
    assert saver.num_failed == 2 and "going on" in capsys.readouterr().out


def test_a_rank_that_dies_while_it_saves_is_named_as_dead(tmp_path):
    saver = start(tmp_path, on_save_error="continue")
    saver.groups[0].fault = WorkerError("actor rank 1 of 2 in save_fault: its process died", "actor")  # type: ignore
    with pytest.raises(WorkerError, match="actor rank 1 of 2"):
        save(saver, 1)
    assert saver.num_failed == 1 and not list(tmp_path.iterdir())


def test_a_last_step_that_is_not_saved_is_an_error_whatever_is_asked(tmp_path):
    saver = start(tmp_path, on_save_error="continue")
    save(saver, 1)
    saver.check_saved(1)
    with pytest.raises(CheckpointError, match="step 2, the run's last, could not be saved.*since step 1"):
        saver.check_saved(2)


def test_a_second_trainer_in_a_folder_is_told_who_is_there_and_who_was_killed(tmp_path, capsys):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as holder:
        assert holder.stdout.readline() == "locked\n"  # type: ignore[union-attr]
        with pytest.raises(ConfigError, match=f"process {holder.pid} of .*trains there") as caught:
            lock_folder(tmp_path)
        assert "trainer.save_checkpoint_path" in str(caught.value)
        holder.kill()
        holder.wait()
    lock_folder(tmp_path)  # gone with its process
    lock_folder(tmp_path)
    words = f"trainer process {holder.pid} of {socket.gethostname()}, since .*, was killed: it left {tmp_path}"
    said = capsys.readouterr().out
    assert re.search(words, said) and said.count("was killed") == 1


def test_a_trainer_that_ended_by_itself_is_not_said_to_be_killed(tmp_path, capsys):
    subprocess.run([sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.DEVNULL, cwd=ROOT, check=True)
    assert (tmp_path / LOCK_FILE).read_text() == ""
    lock_folder(tmp_path)
    assert capsys.readouterr().out == ""


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="trainer.save_checkpoint_path = .*cannot be written"):
        lock_folder(tmp_path / "file" / "run")


@pytest.mark.parametrize("on_save_error", ["stop", "continue"])
def test_a_disk_that_never_answers_ends_the_run_at_the_limit(tmp_path, on_save_error):
    saver = start(tmp_path, on_save_error=on_save_error, watchdog_timeout_s=0.2)
    save(saver, 1)
    ranks: Any = saver.groups[0]
    ranks.fault = None  # still writing
    saver.save(TrainState(2, Position(), 0.0), {})
    saver.finish_pending(blocking=False)
    for _ in range(2):
        with pytest.raises(CheckpointError) as caught:
            saver.finish_pending()
        message = f"{tmp_path} has not taken a checkpoint within 0.2 s (trainer.watchdog_timeout_s)"
        assert message in str(caught.value) and "the same command goes on after step 1" in str(caught.value)
    with pytest.raises(CheckpointError):
        saver.save(TrainState(3, Position(), 0.0), {})
    assert saver.num_failed == 1 and saver.saved_step == 1
    ranks.fault = ""


class Batches:
    """Takes the place in the data that a checkpoint gives it."""

    position = Position(99)

    def restore(self, folder: Path, num_drawn: int) -> None:
        self.folder, self.position = folder, Position(num_drawn)


@pytest.mark.parametrize("model_only", [False, True])
def test_a_checkpoint_holds_the_state_that_a_restart_goes_on_with(tmp_path, model_only):
    chosen = settings(tmp_path, save_model_only=model_only, load_checkpoint_path="/elsewhere/global_step_1")
    saver = CheckpointSaver(tmp_path, [Ranks()], chosen, {"val_data": "rows"})  # type: ignore[list-item]
    asked: list[bool] = []
    saver.groups[0].save = lambda folder, only: asked.append(only)  # type: ignore[method-assign]
    saver.save(TrainState(7, Position(21), 0.125), {"a": 1}, score=0.5)
    saver.finish_pending()
    folder = tmp_path / "global_step_7"
    assert checkpoint.read_trainer_state(folder) == {
        "config": {"a": 1},
        "kl_coef": 0.125,
        "num_drawn": 21,
        "global_step": 7,
        "best": {"step": 7, "score": 0.5},
        "model_only": model_only,
        "origin": "/elsewhere/global_step_1",
        "identity": {"val_data": "rows"},
    }
    other = CheckpointSaver(tmp_path, [Ranks()], settings(tmp_path), {"val_data": "rows"})  # type: ignore[list-item]
    batches: Any = Batches()
    other.groups[0].restore = lambda *given: asked.append(given)  # type: ignore[method-assign]
    state, note = restore(folder, other, batches, other.groups[0])
    assert state == TrainState(7, Position(21), 0.125) and batches.folder == folder
    assert note == ("; it holds no optimizer, which starts anew" if model_only else "")
    assert asked == [model_only, (str(folder), model_only)]
    assert (other.saved_step, other.best, other.origin) == (7, {"step": 7, "score": 0.5}, "/elsewhere/global_step_1")


def test_an_equal_score_leaves_the_first_the_best(tmp_path):
    saver = start(tmp_path, save_limit=1)
    save(saver, 1, 2, score=0.5)
    assert saver.best == {"step": 1, "score": 0.5} and kept(tmp_path) == {1, 2}
    save(saver, 3, score=0.25)
    assert kept(tmp_path) == {1, 3}


def test_surplus_groups_go_into_the_checkpoint(tmp_path):
    places: list[Path] = []
    position: Any = SimpleNamespace(num_drawn=3, write_surplus=places.append)
    saver = start(tmp_path)
    saver.save(TrainState(1, position, 0.0), {})
    saver.finish_pending()
    assert places == [tmp_path / "global_step_1.tmp"] and kept(tmp_path) == {1}


def test_older_checkpoints_know_no_divergence_weight(tmp_path):
    save(start(tmp_path), 1)
    folder = tmp_path / "global_step_1"
    state = checkpoint.read_trainer_state(folder)
    for key in ("kl_coef", "model_only"):
        del state[key]
    (folder / checkpoint.TRAINER_STATE).write_text(json.dumps(state))
    saver, batches = CheckpointSaver(tmp_path, [Ranks()], settings(tmp_path)), Batches()  # type: ignore[list-item]
    restored, note = restore(folder, saver, batches, saver.groups[0])  # type: ignore[arg-type]
    assert restored == TrainState(1, Position(0), 0.0) and note == ""


def test_a_failed_save_says_the_room_the_fault_and_what_is_left(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=3 * 2**30 + 2**28))
    saver = start(tmp_path, on_save_error="continue")
    saver.groups[0].fault = "rank 0: full"  # type: ignore[attr-defined]
    save(saver, 1)
    begun = "Warning: the checkpoint of step {} could not be written (3.25 GiB free): rank 0: full; {}; "
    end = "going on, as trainer.on_save_error=continue asks\n"
    assert capsys.readouterr().out == begun.format(1, "there is no whole checkpoint yet") + end
    saver.groups[0].fault = ""  # type: ignore[attr-defined]
    save(saver, 2)
    saver.groups[0].fault = "rank 0: full"  # type: ignore[attr-defined]
    save(saver, 3)
    newest = f"the newest whole checkpoint is {tmp_path / 'global_step_2'}"
    assert capsys.readouterr().out == begun.format(3, newest) + end
    saver.settings = settings(tmp_path, on_save_error="stop")
    with pytest.raises(CheckpointError, match=r"step_2; trainer\.on_save_error=continue would go on$"):
        save(saver, 4)
    assert saver.num_failed == 3 and saver.fault == "" and saver.thread is None


@pytest.mark.parametrize("place", ["begin", "write_surplus"])
def test_a_folder_that_cannot_be_filled_is_a_failed_save_and_leaves_none(tmp_path, place, monkeypatch, capsys):
    saver = start(tmp_path, on_save_error="continue")
    save(saver, 1)

    def refuse(*_: Any) -> None:
        (tmp_path / "global_step_2.tmp").mkdir(exist_ok=True)
        raise OSError(28, "No space left")

    owner = {"begin": "verl.distributed.checkpoint", "write_surplus": "verl.trainer.batches.Position"}[place]
    monkeypatch.setattr(f"{owner}.{place}", refuse)
    save(saver, 2)
    assert "the checkpoint of step 2 could not be written" in (out := capsys.readouterr().out) and "No space" in out
    assert saver.num_failed == 1 and saver.thread is None
    assert {path.name for path in tmp_path.iterdir()} == {"global_step_1"}


def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_waits_for_it(tmp_path):
    saver = start(tmp_path, save_in_background=True, save_limit=-1)
    ranks: Any = saver.groups[0]
    ranks.fault = None  # still writing
    saver.save(TrainState(1, Position(), 0.0), {})
    saver.finish_pending(blocking=False)
    assert saver.thread is not None and saver.saved_step == 0 and kept(tmp_path) == set()
    ranks.fault = ""
    saver.save(TrainState(2, Position(), 0.0), {})
    assert saver.saved_step >= 1
    saver.finish_pending()
    assert saver.thread is None and saver.saved_step == 2 and kept(tmp_path) == {1, 2}
    saver.settings = settings(tmp_path, save_in_background=False)
    saver.save(TrainState(3, Position(), 0.0), {})
    assert saver.thread is None and saver.saved_step == 3


def test_ranks_are_asked_ever_less_often_and_each_group_in_turn(tmp_path, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    answers = [[None, None]] * 6 + [[None, ""], ["", ""], ["", ""]]
    groups: Any = [SimpleNamespace(save_fault=lambda: answers.pop(0))] * 2
    assert CheckpointSaver(tmp_path, groups, settings(tmp_path))._wait_for_shards() == ""
    assert waits == pytest.approx([0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0, 1.0, 1.0]) and not answers
    answers += [["", "rank 1: full"]]
    assert CheckpointSaver(tmp_path, groups, settings(tmp_path))._wait_for_shards() == "rank 1: full"
    assert not answers  # the second group is not asked


def test_a_folder_is_locked_with_a_name_and_a_time(tmp_path):
    lock_folder(tmp_path / "new" / "run")
    text = (tmp_path / "new" / "run" / LOCK_FILE).read_text()
    assert re.fullmatch(rf"trainer process {os.getpid()} of .+, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d,\n", text)
    assert tmp_path / "new" / "run" in _locks

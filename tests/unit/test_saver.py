"""Retention, going back, failures of a save, and the folder's lock; real checkpoints of ranks without weights."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.training import HOLDER
from verl.config.records import ConfigError, TrainerConfig
from verl.distributed import checkpoint
from verl.distributed.single_controller import WorkerError
from verl.trainer.batches import Position
from verl.trainer.saver import (
    LOCK_FILE,
    CheckpointError,
    CheckpointSaver,
    TrainState,
    _locks,
    find_start,
    lock_folder,
    origin_of,
    restore,
)

ROOT = Path(__file__).parents[2]
NAN, INFINITY = float("nan"), float("inf")


class Ranks:
    """Training ranks that write one small file; `fault` is what the writing comes to, or what it raises."""

    def __init__(self):
        self.fault: Any = ""
        self.restored: list[str] = []

    def save(self, folder: str, model_only: bool) -> None:
        (Path(folder) / "actor").mkdir()
        (Path(folder) / "actor" / "weights").write_text(folder)

    def save_fault(self) -> list[str | None]:
        if isinstance(self.fault, BaseException):
            raise self.fault
        return [self.fault]

    def restore(self, folder: str, model_only: bool) -> None:
        self.restored.append(folder)


def settings(root: Path, **changes: Any) -> TrainerConfig:
    return dataclasses.replace(TrainerConfig(), save_checkpoint_path=str(root), **changes)


def start(root: Path, **changes: Any) -> CheckpointSaver:
    """The saver of a run that has found its start."""
    chosen = settings(root, **changes)
    saver = CheckpointSaver(root, [Ranks()], chosen)  # type: ignore[list-item]
    folder = find_start(chosen)
    batches: Any = SimpleNamespace(restore=lambda *_: None, position=Position())
    if folder is not None:
        restore(folder, saver, batches, saver.groups[0])
    saver.begin(folder)
    return saver


def save(saver: CheckpointSaver, *steps: int, score: float | None = None) -> None:
    for step in steps:
        saver.save(TrainState(step, Position(), 0.0), {}, score)
        saver.finish_pending()


def kept(root: Path) -> set[int]:
    return {step for step, _ in checkpoint.step_folders(root)}


def write_foreign(folder: Path) -> dict[str, str]:
    """As EasyR1 and the release write one."""
    (folder / "actor" / "huggingface").mkdir(parents=True)
    for name in ("actor/model_world_size_1_rank_0.pt", "actor/huggingface/config.json", "dataloader.pt"):
        (folder / name).write_text(name)
    return content(folder)


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_going_back_keeps_the_start_the_new_steps_and_sets_the_others_aside(tmp_path, limit, capsys):
    save(start(tmp_path, save_limit=-1), 1, 2, 3, 4, 5)
    before = {step: content(tmp_path / f"global_step_{step}") for step in range(1, 6)}
    (tmp_path / "experiment_log.jsonl").write_text("of the first branch\n")
    back = {"save_limit": limit, "load_checkpoint_path": str(tmp_path / "global_step_2")}
    saver = start(tmp_path, **back)
    assert saver.saved_step == 2 and kept(tmp_path) == {1, 2}
    aside = tmp_path / "abandoned_1"
    assert {step: content(aside / f"global_step_{step}") for step in (3, 4, 5)} == {s: before[s] for s in (3, 4, 5)}
    assert (aside / "experiment_log.jsonl").read_text() == "of the first branch\n"
    assert f"global_step_3, global_step_4, global_step_5 were moved to {aside}" in capsys.readouterr().out
    for step in (3, 4, 5):
        save(saver, step)
        newest = {number for number in range(step - limit + 1, step + 1) if number >= 1}
        assert kept(tmp_path) == newest | {2}
    assert content(tmp_path / "global_step_2") == before[2]


def test_a_killed_run_that_went_back_goes_on_from_its_own_newest(tmp_path, capsys):
    save(start(tmp_path, save_limit=-1), 1, 2, 3, 4, 5)
    back = {"save_limit": 2, "load_checkpoint_path": str(tmp_path / "global_step_2")}
    save(start(tmp_path, **back), 3, 4)
    assert find_start(settings(tmp_path, **back)) == tmp_path / "global_step_4"
    assert "goes on from" in capsys.readouterr().out
    save(start(tmp_path, **back), 5)
    assert kept(tmp_path) == {2, 4, 5} and not (tmp_path / "abandoned_2").exists()
    assert find_start(settings(tmp_path)) == tmp_path / "global_step_5"  # without the key too
    save(start(tmp_path, save_limit=1), 6)
    assert kept(tmp_path) == {2, 6}  # what the branch began with stays
    again = start(tmp_path, find_last_checkpoint=False, **back)
    assert again.saved_step == 2 and kept(tmp_path) == {2}
    assert kept(tmp_path / "abandoned_2") == {6}


def test_going_back_while_the_moving_was_cut_off_starts_there_all_the_same(tmp_path):
    save(start(tmp_path, save_limit=-1), 1, 2, 3, 4)
    checkpoint.set_aside(tmp_path, [tmp_path / "global_step_4"])  # killed before global_step_3 was moved
    saver = start(tmp_path, load_checkpoint_path=str(tmp_path / "global_step_2"))
    assert saver.saved_step == 2 and kept(tmp_path) == {1, 2}


def test_a_start_in_another_folder_is_left_alone_and_nothing_is_mixed_with_it(tmp_path):
    save(start(tmp_path / "old", save_limit=-1), 60, 61)
    before = content(tmp_path / "old" / "global_step_60")
    save(start(tmp_path / "new", save_limit=-1), 1, 59, 70)
    chosen = {"load_checkpoint_path": str(tmp_path / "old" / "global_step_60"), "save_limit": 1}
    saver = start(tmp_path / "new", **chosen)
    save(saver, 61)
    assert kept(tmp_path / "new") == {61} and kept(tmp_path / "new" / "abandoned_1") == {1, 59, 70}
    assert kept(tmp_path / "old") == {60, 61} and content(tmp_path / "old" / "global_step_60") == before
    assert find_start(settings(tmp_path / "new", **chosen)) == tmp_path / "new" / "global_step_61"


def test_a_run_from_the_start_in_a_used_folder_loses_nothing(tmp_path):
    save(start(tmp_path, save_limit=2), 58, 59, 60)
    saver = start(tmp_path, save_limit=2, find_last_checkpoint=False)
    assert saver.saved_step == 0
    save(saver, 1)
    assert kept(tmp_path) == {1} and kept(tmp_path / "abandoned_1") == {59, 60}
    save(saver, 2, 3)
    assert kept(tmp_path) == {2, 3}
    assert start(tmp_path, save_limit=2).saved_step == 3


@pytest.mark.parametrize("choice", [{}, {"find_last_checkpoint": False}])
def test_a_checkpoint_of_another_program_in_the_way_is_refused_and_left_alone(tmp_path, choice):
    before = write_foreign(tmp_path / "global_step_60")
    with pytest.raises(ConfigError) as caught:
        find_start(settings(tmp_path, **choice))
    for words in (str(tmp_path / "global_step_60"), "model_merger.py", "name another folder", "save_checkpoint_path"):
        assert words in str(caught.value)
    assert content(tmp_path / "global_step_60") == before


def test_a_checkpoint_of_another_program_behind_the_run_neither_counts_nor_goes(tmp_path):
    save(start(tmp_path, save_limit=-1), 70, 71)
    before = write_foreign(tmp_path / "global_step_60")
    save(start(tmp_path, save_limit=2), 72, 73)
    assert kept(tmp_path) == {60, 72, 73} and content(tmp_path / "global_step_60") == before


def test_one_that_came_meanwhile_is_neither_overwritten_nor_makes_new_ones_vanish(tmp_path):
    saver = start(tmp_path, save_limit=1)
    save(saver, 1)
    before = write_foreign(tmp_path / "global_step_3")
    save(saver, 2)
    assert kept(tmp_path) == {2, 3}
    save(saver, 3, 4)
    assert kept(tmp_path) == {4} and content(tmp_path / "abandoned_1" / "global_step_3") == before


def test_a_released_checkpoint_to_go_on_from_says_what_to_do(tmp_path):
    folder = tmp_path / "release" / "global_step_75"
    write_foreign(folder)
    with pytest.raises(ConfigError) as caught:
        find_start(settings(tmp_path / "run", load_checkpoint_path=str(folder)))
    message = str(caught.value)
    assert "trainer.load_checkpoint_path" in message and f"model_merger.py --local_dir {folder / 'actor'}" in message
    assert f"worker.actor.model.model_path={folder / 'actor' / 'huggingface'}" in message


def test_damaged_ones_do_not_count_as_kept(tmp_path):
    save(start(tmp_path, save_limit=2), 3, 4, 5)
    (tmp_path / "global_step_5" / "actor" / "weights").write_text("cut")
    saver = start(tmp_path, save_limit=2)
    assert saver.saved_step == 4 and kept(tmp_path / "abandoned_1") == {5}
    save(saver, 6)
    assert kept(tmp_path) == {4, 6}
    (tmp_path / "global_step_4" / "actor" / "weights").unlink()
    save(saver, 7)
    assert kept(tmp_path) == {4, 6, 7}  # the damaged one beside two whole ones


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


def test_old_checkpoints_that_cannot_be_removed_are_no_failed_save(tmp_path, capsys, monkeypatch):
    saver = start(tmp_path, save_limit=1)
    save(saver, 1)

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("verl.distributed.checkpoint.prune", refuse)
    save(saver, 2)
    assert saver.num_failed == 0 and saver.saved_step == 2 and checkpoint.find_latest(tmp_path).name == "global_step_2"
    assert "Warning: old checkpoints could not be removed after step 2" in capsys.readouterr().out


def test_a_last_step_that_is_not_saved_is_an_error_whatever_is_asked(tmp_path):
    saver = start(tmp_path, on_save_error="continue")
    save(saver, 1)
    saver.check_saved(1)
    with pytest.raises(CheckpointError, match="step 2, the run's last, could not be saved.*since step 1"):
        saver.check_saved(2)


def test_a_second_trainer_in_a_folder_is_told_who_is_there(tmp_path):
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


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="trainer.save_checkpoint_path = .*cannot be written"):
        lock_folder(tmp_path / "file" / "run")


def test_older_checkpoints_know_neither_branch_nor_fingerprints(tmp_path):
    saver = start(tmp_path)
    save(saver, 1)
    folder = tmp_path / "global_step_1"
    state = checkpoint.read_trainer_state(folder)
    for key in ("origin", "identity"):
        del state[key]
    (folder / checkpoint.TRAINER_STATE).write_text(json.dumps(state))
    described = checkpoint.describe_files(folder, [folder / checkpoint.TRAINER_STATE])
    checkpoint.write_json(folder / checkpoint.MANIFEST, described)
    assert start(tmp_path).saved_step == 1


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


def test_another_programs_first_step_is_in_the_way_of_a_new_run(tmp_path):
    write_foreign(tmp_path / "global_step_1")
    with pytest.raises(ConfigError, match="global_step_1 was not written by this trainer"):
        find_start(settings(tmp_path))


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


def test_a_start_beside_the_new_steps_is_known_by_its_name_alone(tmp_path):
    assert origin_of(settings(tmp_path)) is None
    assert origin_of(settings(tmp_path, load_checkpoint_path=str(tmp_path / "global_step_2"))) == "global_step_2"
    other = tmp_path / "other" / "global_step_2"
    assert origin_of(settings(tmp_path, load_checkpoint_path=str(other))) == str(other)


def test_a_folder_is_locked_with_a_name_and_a_time(tmp_path):
    lock_folder(tmp_path / "new" / "run")
    text = (tmp_path / "new" / "run" / LOCK_FILE).read_text()
    assert re.fullmatch(rf"process {os.getpid()} of .+, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d,\n", text)
    assert tmp_path / "new" / "run" in _locks


def test_messages_on_a_start(tmp_path, capsys):
    save(start(tmp_path, save_limit=-1), 1, 2)
    back = settings(tmp_path, load_checkpoint_path=str(tmp_path / "global_step_1"))
    save(start(tmp_path, load_checkpoint_path=back.load_checkpoint_path), 2)
    capsys.readouterr()
    assert find_start(back) == tmp_path / "global_step_2"
    assert capsys.readouterr().out == (
        f"This run began at {tmp_path / 'global_step_1'} and goes on from {tmp_path / 'global_step_2'}; "
        "trainer.find_last_checkpoint=false begins there again\n"
    )
    (tmp_path / "global_step_1" / "actor" / "weights").unlink()
    with pytest.raises(ConfigError, match="trainer.load_checkpoint_path: .*global_step_1"):
        find_start(dataclasses.replace(back, find_last_checkpoint=False))
    folder = tmp_path / "global_step_9"
    write_foreign(folder)
    with pytest.raises(ConfigError) as caught:
        find_start(settings(tmp_path))
    assert (
        f"trainer.save_checkpoint_path = {str(tmp_path)!r}: {folder} was not written by this trainer, and a run "
        "cannot go on from it; to start from its weights, run python scripts/model_merger.py --local_dir "
        f"{folder / 'actor'} "
        f"and set worker.actor.model.model_path={folder / 'actor' / 'huggingface'}; else name another folder, or move "
        "it away"
    ) in str(caught.value)

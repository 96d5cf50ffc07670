"""Retention of checkpoints: pruning, going back, and those of other programs, which are left alone."""

import dataclasses
import json
import shutil
from typing import Any

import pytest

from tests.support.saving import content, kept, save, settings, start, write_foreign
from verl.config.records import ConfigError
from verl.distributed import checkpoint
from verl.trainer.saver import CheckpointError, find_start, origin_of


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


@pytest.mark.parametrize("fails", ["shutil.copy2", "pathlib.Path.rename", "pathlib.Path.mkdir"])
def test_what_cannot_be_moved_is_said_and_nothing_is_lost(tmp_path, monkeypatch, fails):
    save(start(tmp_path, save_limit=-1), 1, 2, 3)
    (tmp_path / "experiment_log.jsonl").write_text("of the first branch\n")
    back = {"save_limit": -1, "load_checkpoint_path": str(tmp_path / "global_step_1")}

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError) as caught:
        patch.setattr(fails, refuse)
        start(tmp_path, **back)
    for words in (str(tmp_path), "global_step_2, global_step_3 could not be moved", "No space left", "same command"):
        assert words in str(caught.value)
    assert kept(tmp_path) == {1, 2, 3}
    assert start(tmp_path, **back).saved_step == 1 and kept(tmp_path) == {1}
    (place,) = [folder for folder in tmp_path.glob("abandoned_*") if kept(folder)]
    assert kept(place) == {2, 3} and (place / "experiment_log.jsonl").read_text() == "of the first branch\n"


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


def test_old_checkpoints_that_cannot_be_removed_are_no_failed_save(tmp_path, capsys, monkeypatch):
    saver = start(tmp_path, save_limit=1)
    save(saver, 1)

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("verl.distributed.checkpoint.prune", refuse)
    save(saver, 2)
    assert saver.num_failed == 0 and saver.saved_step == 2 and checkpoint.find_latest(tmp_path).name == "global_step_2"
    assert "Warning: old checkpoints could not be removed after step 2" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["best", "global_step_2_backup", "elsewhere/best", "elsewhere/global_step_9"])
def test_a_start_may_have_any_name(tmp_path, name):
    root = tmp_path / "run"
    save(start(root, save_limit=-1), 1, 2, 3)
    given = root / name
    shutil.copytree(root / "global_step_2", given)
    before = content(given)
    saver = start(root, save_limit=1, load_checkpoint_path=str(given))
    assert saver.saved_step == 2
    save(saver, 3, 4)
    assert kept(root) == {4} and content(given) == before and saver.num_failed == 0
    assert find_start(settings(root, load_checkpoint_path=str(given))) == root / "global_step_4"


def test_older_checkpoints_know_neither_branch_nor_fingerprints(tmp_path):
    saver = start(tmp_path)
    save(saver, 1)
    folder = tmp_path / "global_step_1"
    state = checkpoint.read_trainer_state(folder)
    for key in ("origin", "identity", "num_ranks"):
        del state[key]
    (folder / checkpoint.TRAINER_STATE).write_text(json.dumps(state))
    entries = checkpoint.read_manifest(folder)
    entries |= checkpoint.describe_files(folder, [folder / checkpoint.TRAINER_STATE])
    checkpoint.write_json(folder / checkpoint.MANIFEST, entries)
    assert start(tmp_path).saved_step == 1


def test_another_programs_first_step_is_in_the_way_of_a_new_run(tmp_path):
    write_foreign(tmp_path / "global_step_1")
    with pytest.raises(ConfigError, match="global_step_1 was not written by this trainer"):
        find_start(settings(tmp_path))


def test_a_start_beside_the_new_steps_is_known_by_its_name_alone(tmp_path):
    assert origin_of(settings(tmp_path)) is None
    assert origin_of(settings(tmp_path, load_checkpoint_path=str(tmp_path / "global_step_2"))) == "global_step_2"
    other = tmp_path / "other" / "global_step_2"
    assert origin_of(settings(tmp_path, load_checkpoint_path=str(other))) == str(other)


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


@pytest.mark.parametrize(
    ("absent", "who"), [((".metadata",), ""), (("rng_rank_1.pt",), "actor rank 1 on right wrote elsewhere: ")]
)
def test_a_folder_that_is_not_shared_costs_no_earlier_checkpoint(tmp_path, absent, who):
    saver = start(tmp_path, save_limit=1)
    save(saver, 1)
    saver.groups[0].absent = absent  # type: ignore[attr-defined]
    words = f"step 2 could not be written.*{who}.*{absent[0]} is not there; all machines must share the folder"
    with pytest.raises(CheckpointError, match=words):
        save(saver, 2)
    assert kept(tmp_path) == {1} and checkpoint.find_latest(tmp_path) == tmp_path / "global_step_1"

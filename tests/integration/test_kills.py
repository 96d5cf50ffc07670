"""Runs killed at random moments, again and again: no checkpoint that was promised is lost, and no number changes.

`KILLS=200 pytest -m nightly tests/integration/test_kills.py` sets how many there are over all kinds of whole runs; the
saver alone, with ranks that write a word, takes ten times as many.
"""

import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_training_choices import FILTERED
from tests.support.forked_run import FORK, fork, kill, make_config, make_inputs, run
from tests.support.training import learned, metrics
from tests.unit.test_saver import save, start
from verl.distributed import checkpoint

pytestmark = [pytest.mark.integration, pytest.mark.nightly]

NUM_KILLS = int(os.environ.get("KILLS", "200"))
SAVE_LIMIT = 2
COMMON = [f"trainer.save_limit={SAVE_LIMIT}", "trainer.val_freq=2", "trainer.save_freq=1"]
KINDS = {
    "plain": [],
    "in the foreground": ["trainer.save_in_background=false"],
    "filtered": [choice for choice in FILTERED if "remax" not in choice],
    "adapters": ["worker.actor.model.lora.rank=4", "worker.actor.model.lora.alpha=8"],
    "going back": ["worker.actor.optim.lr=5e-4"],
}
CASES = [(ranks, kind) for kind in KINDS for ranks in (1, 2)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


def begin(inputs: Path, folder: Path, ranks: int, kind: str) -> list[str]:
    """The overrides of a run; for one that goes back, after another has left checkpoints in the folder."""
    chosen = [*COMMON, f"trainer.n_gpus_per_node={ranks}"]
    if kind == "filtered" and ranks == 2:
        chosen.append("data.mini_rollout_batch_size=4")
    if kind == "going back":
        start = folder / "global_step_2"
        if not start.exists():
            assert run(make_config(inputs, folder, *chosen, "trainer.save_limit=-1")) == 0
        chosen.append(f"trainer.load_checkpoint_path={start}")
    return [*chosen, *(override for override in KINDS[kind] if "mini_rollout" not in override or ranks == 1)]


def whole_steps(folder: Path) -> set[int]:
    whole = set()
    for step, path in checkpoint.step_folders(folder):
        try:
            checkpoint.check(path)
        except ValueError:
            continue
        whole.add(step)
    return whole


def steps(folder: Path) -> dict[int, dict[str, float]]:
    return {step: learned(row) for step, row in metrics(folder).items()}


@pytest.mark.parametrize(("ranks", "kind"), CASES)
def test_no_kill_costs_a_checkpoint_or_changes_a_number(inputs, tmp_path, ranks, kind):
    expected_folder, folder = tmp_path / "unbroken", tmp_path / "run"
    expected_chosen = begin(inputs, expected_folder, ranks, kind)
    started = time.monotonic()
    assert run(make_config(inputs, expected_folder, *expected_chosen)) == 0
    longest_s = time.monotonic() - started
    expected = steps(expected_folder)
    moments = random.Random(f"{ranks} {kind}")
    num_kills = num_ends = 0
    newest: set[int] = set()
    most, before = 0, set()
    config = make_config(inputs, folder, *begin(inputs, folder, ranks, kind))
    while num_kills < -(-NUM_KILLS // len(CASES)):
        process = fork(config)
        time.sleep(moments.uniform(0.1, 0.6 * longest_s))  # it comes to its end by and by
        code = kill(process)
        whole = whole_steps(folder)
        if kind == "going back" and not (folder / "abandoned_1").exists():
            assert whole == {1, 2, 3, 4, 5}
        else:
            assert len(whole) >= min(SAVE_LIMIT, most), (whole, before)
            assert max(whole, default=0) >= max(before, default=0)
            most, before = max(most, len(whole)), whole
        if kind == "going back":
            assert 2 in whole
            aside = set().union(*(whole_steps(place) for place in folder.glob("abandoned_*")))
            assert {3, 4, 5} <= whole | aside
        num_kills += code == -signal.SIGKILL
        newest.add(max(whole, default=0))
        if code == 0:
            num_ends += 1
            assert steps(folder) == expected
            shutil.rmtree(folder)
            most, before = 0, set()
            config = make_config(inputs, folder, *begin(inputs, folder, ranks, kind))
    assert run(config) == 0
    assert steps(folder) == expected
    print(f"{kind}, {ranks} ranks: {num_kills} kills, newest steps {sorted(newest)}, {num_ends} ends on the way")


def save_steps(root: Path, changes: dict[str, Any]) -> None:
    """A run whose ranks write a word: 30 steps, every third with a score."""
    saver = start(root, **changes)
    for step in range(saver.saved_step + 1, 31):
        save(saver, step, score=(step * 7 % 10) / 10 if step % 3 == 0 else None)


def test_no_kill_of_the_saver_alone_costs_a_checkpoint(tmp_path):
    """Ten kills for each of whole runs, in all stages of writing, publishing, pruning and moving aside."""
    moments = random.Random(7)
    num_kills = num_back = 0
    changes: dict[str, Any] = {"save_limit": SAVE_LIMIT}
    steps_seen = set()
    while num_kills < 10 * NUM_KILLS:
        before = whole_steps(tmp_path)
        if len(before) > 1 and moments.random() < 0.1:  # goes back, or no longer
            going = {"load_checkpoint_path": str(tmp_path / f"global_step_{min(before)}")}
            changes = {"save_limit": SAVE_LIMIT} | (going if moments.random() < 0.7 else {})
            num_back += "load_checkpoint_path" in changes
        if max(before, default=0) == 30:
            shutil.rmtree(tmp_path)
            tmp_path.mkdir()
            before, changes = set(), {"save_limit": SAVE_LIMIT}
        all_before = before.union(*(whole_steps(place) for place in tmp_path.glob("abandoned_*")))
        process = FORK.Process(target=save_steps, args=(tmp_path, changes))
        process.start()
        time.sleep(moments.uniform(0, 0.15))
        process.kill()
        process.join()
        num_kills += 1
        whole = whole_steps(tmp_path)
        aside = set().union(*(whole_steps(place) for place in tmp_path.glob("abandoned_*")))
        steps_seen.add(max(whole, default=0))
        assert len(whole | aside) >= min(SAVE_LIMIT, len(all_before)), (before, whole, aside)
        if "load_checkpoint_path" in changes:
            assert checkpoint.read_step(Path(changes["load_checkpoint_path"])) in whole
        else:
            assert max(whole, default=0) >= max(before, default=0)
            assert len(whole) >= min(SAVE_LIMIT, len(before)), (before, whole)
    print(f"the saver alone: {num_kills} kills, {num_back} times back, newest steps {sorted(steps_seen)}")

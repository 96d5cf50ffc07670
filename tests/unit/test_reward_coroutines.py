"""Coroutine rewards: many calls at a time, failures, time-outs and what is not back."""

import asyncio
import threading
import time
from pathlib import Path

import pytest
import torch

from verl.reward import CallLimits, FileReward, RewardError, RewardManager
from verl.reward.coroutines import CallLoop
from verl.reward.items import ScoringGroup

TOY_MODEL = Path(__file__).parents[2] / "configs" / "toy_model"


class Judge:
    """A coroutine reward with a behaviour by item: its number of failing tries, or a way to misbehave."""

    def __init__(self):
        self.running = self.most = 0
        self.tries: dict[str, int] = {}

    async def score(self, item):
        uid, kind = item["uid"], item["kind"]
        self.tries[uid] = self.tries.get(uid, 0) + 1
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(0.01)
            if kind == "hangs":
                await asyncio.sleep(1000)
            if kind == "blocks":
                threading.Event().wait(30)
            if kind == "leaves":
                raise SystemExit(3)
            if isinstance(kind, int) and self.tries[uid] <= kind:
                raise ConnectionError("no answer")
            return [{"overall": kind if kind == "text" else 1.0, "price": 0.5}]
        finally:
            self.running -= 1


def run(kinds, wait_s=20.0, **limits):
    judge, items = Judge(), [{"uid": str(number), "kind": kind, "response": ""} for number, kind in enumerate(kinds)]
    loop = CallLoop(CallLimits(**{"call_timeout_s": 15.0} | limits))
    loop.start(1, items, [judge] * len(items))
    started = time.monotonic()
    found = loop.collect(1, wait_s)
    return found, judge, time.monotonic() - started


def test_as_many_calls_run_at_a_time_as_the_limit_allows():
    found, judge, _ = run([0] * 20, concurrency=4)
    assert judge.most == 4 and found.scores == [{"overall": 1.0}] * 20
    assert found.counts["calls"] == 20 and found.counts["missing"] == 0


def test_a_failed_call_is_tried_again_and_every_call_has_its_price():
    found, judge, _ = run([0, 1, 2, 0], retries=2, price_per_call=0.25)
    assert found.scores == [{"overall": 1.0}] * 4 and [judge.tries[str(i)] for i in range(4)] == [1, 2, 3, 1]
    assert found.counts == {
        "calls": 7, "retries": 3, "timeouts": 0, "failures": 3, "missing": 0, "price": 7 * 0.25 + 4 * 0.5
    }  # fmt: skip


def test_what_fails_every_time_is_missing_and_its_reason_is_told():
    found, _, _ = run([0, 9], retries=1)
    assert found.scores == [{"overall": 1.0}, None] and found.counts["missing"] == 1
    assert found.reason.startswith("row 1: ConnectionError: no answer")


def test_a_call_that_hangs_is_cut_by_its_own_limit_and_by_the_steps():
    found, _, _ = run([0, "hangs"], call_timeout_s=0.2, retries=1)
    assert found.scores == [{"overall": 1.0}, None] and found.counts["timeouts"] == 2
    assert found.reason == "row 1: no result within 0.2 s"
    found, _, seconds = run([0, "hangs"], wait_s=0.5)
    assert found.scores == [{"overall": 1.0}, None] and not found.is_blocked
    assert "was not back within worker.reward.wait_s" in found.reason and seconds < 15


def test_a_call_that_blocks_all_others_is_noticed():
    found, _, _ = run(["blocks", 0], wait_s=0.5)
    assert found.is_blocked and found.scores.count(None) >= 1


@pytest.mark.parametrize(("kind", "words"), [("text", "returned 'text' as 'overall'"), ("leaves", "SystemExit: 3")])
def test_a_fault_of_the_function_itself_ends_the_run(kind, words):
    with pytest.raises(RewardError, match=words):
        run([kind])


SLOW = """
import asyncio, os
async def batch(items):
    await asyncio.sleep(0.01)
    if items[0]["response"] == "hang": await asyncio.sleep(1000)
    if items[0]["response"] == "die": os._exit(1)
    return [{"overall": float(len(items[0]["group"]))}]
"""


def test_a_coroutine_of_a_file_runs_in_a_process_that_is_replaced_when_it_dies(tmp_path):
    path = tmp_path / "slow_reward.py"
    path.write_text(SLOW)
    limits = CallLimits(wait_s=1.0, retries=0)
    manager = RewardManager(FileReward(str(path), "batch", {}), str(TOY_MODEL), 1, limits=limits)
    try:
        assert manager.probe("a", "p", "g") == {"overall": 1.0}
        for bad in ("hang", "die"):
            groups = [manager_group("a", bad), manager_group("b", "c")]
            pending = manager.submit_groups(groups)
            scores = pending.result()["overall"]
            assert scores[0, 1].isnan() and pending.counts["missing"] >= 1
            assert bad == "die" or torch.equal(scores.nan_to_num(-1), torch.tensor([[2.0, -1.0], [2.0, 2.0]]))
        assert manager.probe("a", "p", "g") == {"overall": 1.0}
        manager.missing = -3.0
        assert manager.submit_groups([manager_group("hang")]).result()["overall"].tolist() == [[-3.0]]
    finally:
        manager.close()


def manager_group(*responses):
    return ScoringGroup(responses, "p", "g", "7")


@pytest.mark.parametrize("form", ["async def main(item): return {'overall': 1.0}\nREWARD_TYPE = 'sequential'",
                                  "async def main(completions, **kwargs): return [1.0]",
                                  "async def main(items): return [{'overall': 1.0}]"])  # fmt: skip
def test_each_form_may_be_a_coroutine(tmp_path, form):
    path = tmp_path / "form.py"
    path.write_text(form)
    reward = FileReward(str(path), "main", {})
    (item,) = manager_group("a").make_items(["a"], ())
    assert reward.is_coroutine() and asyncio.run(reward.score(item)) == [{"overall": 1.0}]

"""The driver's side of coroutine rewards: a process that makes the calls, replaced when it does not answer."""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any

import psutil

from verl.reward.coroutines import CallLimits, CallResults
from verl.reward.items import ScoringGroup
from verl.reward.scoring import collect_calls, start_calls

ANSWER_S = 10.0
"""Added to the limit of a wait: the process counts the time itself and answers a little later."""
END_S = 5.0
"""Limit of the wait for a pool's own thread once its processes are killed."""


class CallProcess:
    """A process in which coroutine rewards run.

    Args:
        start: initializer of the process.
        arguments: of `start`.
        limits: of the calls.
    """

    def __init__(self, start: Callable[..., None], arguments: tuple[Any, ...], limits: CallLimits):
        self.start, self.arguments, self.limits = start, arguments, limits
        self.number = 0
        self.pool = self._open()

    def _open(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(1, mp_context=context, initializer=self.start, initargs=self.arguments)

    def submit(self, groups: Sequence[ScoringGroup]) -> "PendingCalls":
        """Starts the calls for all responses of the groups."""
        self.number += 1
        try:
            return PendingCalls(self, self.number, groups, self.pool.submit(start_calls, self.number, groups))
        except BrokenProcessPool:
            self.restart()
            return PendingCalls(self, self.number, groups, self.pool.submit(start_calls, self.number, groups))

    def restart(self) -> None:
        """Ends the process with all its calls and starts another."""
        end_pool(self.pool)
        self.pool = self._open()

    def close(self) -> None:
        """Ends the process."""
        end_pool(self.pool)


class PendingCalls:
    """Calls of one batch of groups."""

    def __init__(self, process: CallProcess, number: int, groups: Sequence[ScoringGroup], texts: Future):
        self.num_responses = sum(len(group.responses) for group in groups)
        self.process, self.pool, self.number, self.texts = process, process.pool, number, texts
        self.begun = 0.0
        texts.add_done_callback(self._note_begin)

    def _note_begin(self, _: Future) -> None:
        self.begun = time.monotonic()

    def result(self, since: float, start_s: float | None) -> tuple[list[str], CallResults]:
        """Texts, and what is back `wait_s` after `since`, on the clock of time.monotonic, or after the calls began.

        A process that is new has to load the function before its first calls.

        Raises:
            RewardError: a call returned what is no score.
        """
        texts = [""] * self.num_responses
        limit_s = self.process.limits.wait_s
        try:
            texts = self.texts.result(start_s)
            limit_s = max(0.0, max(since, self.begun) + limit_s - time.monotonic())
            found = self.pool.submit(collect_calls, self.number, limit_s).result(limit_s + ANSWER_S)
        except (TimeoutError, BrokenProcessPool, RuntimeError) as error:
            if type(error) not in (TimeoutError, BrokenProcessPool, RuntimeError):
                raise  # a RewardError of the function's own
            counts = {"calls": 0.0, "missing": float(len(texts))}
            words = "the process of the calls did not answer, and was replaced"
            found = CallResults([None] * len(texts), counts, words, is_blocked=True)
        if found.is_blocked and self.pool is self.process.pool:
            self.process.restart()
        return texts, found


def end_pool(pool: ProcessPoolExecutor) -> None:
    """Ends a pool, also processes whose function never returns, and what these have started."""
    processes = [process.pid for process in (pool._processes or {}).values()]
    thread: Any = pool._executor_manager_thread
    pool.shutdown(wait=False, cancel_futures=True)
    for pid in processes:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            for each in (*process.children(recursive=True), process):
                each.kill()
    if thread is not None:  # a process forked meanwhile would wait for ever for the locks that it holds
        thread.join(END_S)

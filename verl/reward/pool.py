"""Reward manager: scores responses in a process pool, in parallel with the training workers.

The pool also detokenises, so the driver only sends token ids. Letters: G groups, n samples.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any

import psutil
import torch
from torch import Tensor

from verl.protocol import DataProto
from verl.reward.faults import RewardError
from verl.reward.items import ScoringGroup
from verl.reward.scoring import RewardFunction, decode, score_groups, start_child

START_S = 60.0
"""Added to the limit of a wait: a scoring process may have to start and load the function first."""
END_S = 5.0
"""Limit of the wait for the pool's own thread once its processes are killed."""


class PendingRewards:
    """Future of scores; `timeout_s` limits the wait for them, None waits for ever."""

    def __init__(self, futures: list[Future], shape: tuple[int, int], timeout_s: float | None = None, name: str = ""):
        self.futures, self.shape, self.timeout_s, self.name = futures, shape, timeout_s, name
        self.texts: list[str] = []

    def result(self) -> dict[str, Tensor]:
        """Waits for scores [G, n] by reward key, 0 where a response lacks a key.

        Raises:
            RewardError: the function raised or took too long, or a process died.
        """
        scores: list[dict[str, float]] = []
        limit_s = None if self.timeout_s is None else self.timeout_s + START_S
        deadline = None if limit_s is None else time.monotonic() + limit_s
        try:
            for future in self.futures:
                texts, part = future.result(None if deadline is None else max(0.0, deadline - time.monotonic()))
                self.texts.extend(texts)
                scores.extend(part)
        except TimeoutError as error:
            raise RewardError(
                f"the reward function {self.name} did not return within {limit_s:g} s (trainer."
                f"watchdog_timeout_s={self.timeout_s:g}, and {START_S:g} s to start; null waits for ever)"
            ) from error
        except BrokenProcessPool as error:
            raise RewardError(
                f"a scoring process died in {self.name}: killed (out of memory? lower worker.reward.num_processes), "
                "or the function left it by os._exit or a fault of native code"
            ) from error
        keys = dict.fromkeys(key for score in scores for key in score)
        return {key: torch.tensor([float(score.get(key, 0)) for score in scores]).reshape(self.shape) for key in keys}


class RewardManager:
    """A process pool that scores responses.

    Args:
        function: items -> scores; picklable. For what an item has see ScoringGroup.make_items; a function with
            `reads_row = False` reads neither columns nor images, which are then not sent.
        tokenizer_path: of the tokenizer that decodes responses.
        num_processes: of the pool.
        skip_special_tokens: True drops special tokens from the decoded text.
        timeout_s: limit of a wait for scores; None waits for ever.
    """

    def __init__(
        self,
        function: RewardFunction,
        tokenizer_path: str,
        num_processes: int,
        skip_special_tokens: bool = True,
        timeout_s: float | None = None,
    ):
        self.num_processes, self.timeout_s, self.name = num_processes, timeout_s, str(function)
        self.reads_row = getattr(function, "reads_row", True)
        # numpy reads it at process start; on arrays this small its threads double the time.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self.pool = ProcessPoolExecutor(
            num_processes,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=start_child,
            initargs=(tokenizer_path, function, skip_special_tokens),
        )

    def submit(self, groups: DataProto, step: int = 0) -> PendingRewards:
        """Starts scoring a batch with `responses`, `response_mask` [G, n, R], `ground_truth`, `problem`, `uid`.

        A reward of your own also reads `columns` and `images`, where the batch has them.
        """
        shape = tuple(groups.batch["responses"].shape[:2])
        return self._submit(read_groups(groups, step, self.reads_row), shape)

    def probe(
        self, response: str, problem: str, ground_truth: Any, row: str = "probe", **more: Any
    ) -> dict[str, float]:
        """Scores a row's gold response, so that a broken reward function fails before training.

        Args:
            more: other fields of ScoringGroup.
        """
        pending = self._submit([ScoringGroup([response], problem, ground_truth, row, **more)], (1, 1))
        return {key: float(value) for key, value in pending.result().items()}

    def _submit(self, groups: Sequence[ScoringGroup], shape: tuple[int, int]) -> PendingRewards:
        size = -(-len(groups) // self.num_processes)
        parts = [groups[start : start + size] for start in range(0, len(groups), size)]
        return PendingRewards([self._start(score_groups, part) for part in parts], shape, self.timeout_s, self.name)

    def decode(self, groups: DataProto) -> list[str]:
        """Texts [G * n] of a batch with `responses`, `response_mask` [G, n, R], as reward functions read them."""
        lengths = groups.batch["response_mask"].sum(-1).flatten().tolist()
        rows = groups.batch["responses"].flatten(0, 1).tolist()
        return self._start(decode, [row[:length] for row, length in zip(rows, lengths, strict=True)]).result()

    def _start(self, function: Callable, *args: Any) -> Future:
        try:
            return self.pool.submit(function, *args)
        except BrokenProcessPool as error:  # it died since the last call; told where scores are awaited
            future: Future = Future()
            future.set_exception(error)
            return future

    def close(self) -> None:
        """Ends the pool, also processes whose function never returns, and what these have started."""
        processes = [process.pid for process in (self.pool._processes or {}).values()]
        thread: Any = self.pool._executor_manager_thread
        self.pool.shutdown(wait=False, cancel_futures=True)
        for pid in processes:
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                for each in (*process.children(recursive=True), process):
                    each.kill()
        if thread is not None:  # a process forked meanwhile would wait for ever for the locks that it holds
            thread.join(END_S)


def read_groups(groups: DataProto, step: int, reads_row: bool) -> list[ScoringGroup]:
    """The groups of a batch as the scoring processes read them."""
    batch, rows = groups.batch, groups.non_tensor_batch
    lengths, width = batch["response_mask"].sum(-1).tolist(), batch["responses"].shape[-1]
    found = [key for key in ("columns", "images") if reads_row and key in rows]
    return [
        ScoringGroup(
            responses=[ids[:length] for ids, length in zip(responses, lengths[group], strict=True)],
            problem=str(rows["problem"][group]),
            ground_truth=rows["ground_truth"][group],
            uid=str(rows["uid"][group]),
            step=step,
            max_length=width,
            **{key: rows[key][group] for key in found},
        )
        for group, responses in enumerate(batch["responses"].tolist())
    ]

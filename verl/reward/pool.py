"""Reward manager: scores responses in a process pool, in parallel with the training workers.

The pool also detokenises, so the driver only sends token ids. Letters: G groups, n samples.
"""

import math
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from verl.protocol import DataProto
from verl.reward.coroutines import CallLimits
from verl.reward.faults import RewardError
from verl.reward.items import ScoringGroup
from verl.reward.scoring import RewardFunction, decode, find_coroutines, score_groups, start_child
from verl.reward.slow import CallProcess, PendingCalls, end_pool

START_S = 60.0
"""Added to the limit of a wait: a scoring process may have to start and load the function first."""

Score = dict[str, float] | None
"""Parts of a response's reward; None where a coroutine reward gave none."""


@dataclass
class Part:
    """Groups whose scores come together, by their places in the batch."""

    places: Sequence[int]
    pending: Future | PendingCalls


class PendingRewards:
    """Future of scores.

    Args:
        parts: the groups of the batch, each in one.
        shape: G and n.
        timeout_s: limit of the wait for the pool; None waits for ever.
        name: of the reward.
        missing: score of a response whose coroutine reward gave none; None drops it: its scores are NaN.

    Attributes:
        texts: of all responses, once there is a result.
        counts: of the calls of coroutine rewards, likewise.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        shape: tuple[int, int],
        timeout_s: float | None = None,
        name: str = "",
        missing: float | None = None,
    ):
        self.parts, self.shape, self.timeout_s, self.name, self.missing = parts, shape, timeout_s, name, missing
        self.texts: list[str] = []
        self.counts: dict[str, float] = {}

    def result(self, since: float | None = None) -> dict[str, Tensor]:
        """Waits for scores [G, n] by reward key, 0 where a response lacks a key, NaN where it is dropped.

        Args:
            since: when the wait for coroutine rewards began, on the clock of time.monotonic; None: now.

        Raises:
            RewardError: the function raised or took too long, or a process died.
        """
        since = time.monotonic() if since is None else since
        num_groups, num_samples = self.shape
        texts: list[list[str]] = [[]] * num_groups
        scores: list[Sequence[Score]] = [[]] * num_groups
        for part in self.parts:
            part_texts, part_scores = self.wait_for(part.pending, since)
            for index, place in enumerate(part.places):
                share = slice(index * num_samples, (index + 1) * num_samples)
                texts[place], scores[place] = part_texts[share], part_scores[share]
        self.texts = [text for group in texts for text in group]
        return self._to_tensors([score for group in scores for score in group])

    def wait_for(self, pending: Future | PendingCalls, since: float | None = None) -> Any:
        """The result of a part; RewardError when it does not come."""
        since = time.monotonic() if since is None else since
        limit_s = None if self.timeout_s is None else self.timeout_s + START_S
        try:
            if isinstance(pending, Future):
                return pending.result(None if limit_s is None else max(0.0, since + limit_s - time.monotonic()))
            return self._collect(pending, since, limit_s)
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

    def _collect(
        self, pending: PendingCalls, since: float, start_s: float | None
    ) -> tuple[list[str], Sequence[Score]]:
        """Texts and scores of calls; what is not back is said."""
        texts, found = pending.result(since, start_s)
        for name, number in found.counts.items():
            self.counts[name] = self.counts.get(name, 0.0) + number
        if found.reason:
            counted = "are left out of their groups" if self.missing is None else f"count as {self.missing:g}"
            print(  # noqa: T201
                f"Warning: {found.counts['missing']:g} of {len(texts)} responses have no score from {self.name} and "
                f"{counted} (worker.reward.missing_score); first {found.reason}",
                flush=True,
            )
        return texts, found.scores

    def _to_tensors(self, scores: Sequence[Score]) -> dict[str, Tensor]:
        if self.missing is not None:
            scores = [{"overall": self.missing} if score is None else score for score in scores]
        keys = dict.fromkeys(["overall", *(key for score in scores if score is not None for key in score)])
        return {
            key: torch.tensor([math.nan if score is None else float(score.get(key, 0)) for score in scores]).reshape(
                self.shape
            )
            for key in keys
        }


class RewardManager:
    """A process pool that scores responses, and one process more where a reward is a coroutine.

    Args:
        function: items -> scores, or several by name; picklable. For what an item has see ScoringGroup.make_items; a
            function with `reads_row = False` reads neither columns nor images, which are then not sent.
        tokenizer_path: of the tokenizer that decodes responses.
        num_processes: of the pool.
        skip_special_tokens: True drops special tokens from the decoded text.
        timeout_s: limit of a wait for scores; None waits for ever.
        limits: of the calls of coroutine rewards.
        missing: score of a response that a coroutine reward gave none; None drops the response.
    """

    def __init__(
        self,
        function: RewardFunction | Mapping[str, RewardFunction],
        tokenizer_path: str,
        num_processes: int,
        skip_special_tokens: bool = True,
        timeout_s: float | None = None,
        limits: CallLimits | None = None,
        missing: float | None = None,
    ):
        functions = function if isinstance(function, Mapping) else {"": function}
        self.functions, self.num_processes, self.timeout_s, self.missing = functions, num_processes, timeout_s, missing
        self.name = ", ".join(dict.fromkeys(map(str, functions.values())))
        self.reads_row = any(getattr(each, "reads_row", True) for each in functions.values())
        # numpy reads it at process start; on arrays this small its threads double the time.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self.limits = limits or CallLimits()
        self.arguments = (tokenizer_path, functions, skip_special_tokens, self.limits)
        self.pool = ProcessPoolExecutor(
            num_processes,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=start_child,
            initargs=self.arguments,
        )
        self.coroutines: frozenset[str] | None = None  # names, once they are known
        self.calls: CallProcess | None = None

    def start(self) -> None:
        """Starts the first process, whose imports take seconds, before there is something to score."""
        self._start(int)

    def submit(self, groups: DataProto, step: int = 0) -> PendingRewards:
        """Starts scoring a batch with `responses`, `response_mask` [G, n, R], `ground_truth`, `problem`, `uid`.

        Rewards of your own also read `columns` and `images`, where the batch has them; `reward` names the one of
        several that scores a group.
        """
        return self.submit_groups(read_groups(groups, step, self.reads_row))

    def probe(
        self, response: str, problem: str, ground_truth: Any, row: str = "probe", **more: Any
    ) -> dict[str, float]:
        """Scores a row's gold response, so that a broken reward function fails before training.

        Args:
            more: other fields of ScoringGroup.
        """
        pending = self.submit_groups([ScoringGroup([response], problem, ground_truth, row, **more)])
        return {key: float(value) for key, value in pending.result().items()}

    def submit_groups(self, groups: Sequence[ScoringGroup]) -> PendingRewards:
        """Starts scoring groups of equal size."""
        shape = len(groups), len(groups[0].responses)
        slow = [place for place, group in enumerate(groups) if group.reward in self._find_coroutines()]
        parts = []
        if slow:
            if self.calls is None:
                self.calls = CallProcess(start_child, self.arguments, self.limits)
            parts.append(Part(slow, self.calls.submit([groups[place] for place in slow])))
        quick = sorted({*range(len(groups))} - {*slow})
        size = -(-len(quick) // self.num_processes)
        for start in range(0, len(quick), size or 1):
            places = quick[start : start + size]
            parts.append(Part(places, self._start(score_groups, [groups[place] for place in places])))
        parts.reverse()  # the wait for the pool, which has no choice, comes before that for the calls
        return PendingRewards(parts, shape, self.timeout_s, self.name, self.missing)

    def _find_coroutines(self) -> frozenset[str]:
        """Names of the rewards that are to be awaited; a file is loaded in the pool to see it."""
        if not any(hasattr(function, "is_coroutine") for function in self.functions.values()):
            return frozenset()
        if self.coroutines is None:
            pending = PendingRewards([], (0, 0), self.timeout_s, self.name)
            self.coroutines = frozenset(pending.wait_for(self._start(find_coroutines)))
        return self.coroutines

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
        end_pool(self.pool)
        if self.calls is not None:
            self.calls.close()


def read_groups(groups: DataProto, step: int, reads_row: bool) -> list[ScoringGroup]:
    """The groups of a batch as the scoring processes read them."""
    batch, rows = groups.batch, groups.non_tensor_batch
    lengths, width = batch["response_mask"].sum(-1).tolist(), batch["responses"].shape[-1]
    found = ["reward"] if "reward" in rows else []
    found += [key for key in ("columns", "images") if reads_row and key in rows]
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

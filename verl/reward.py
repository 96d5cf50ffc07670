"""Reward manager: scores responses in a process pool, in parallel with the training workers.

The pool also detokenises, so the driver only sends token ids. Letters: G groups, n samples.
"""

import importlib.util
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from verl.protocol import DataProto

RewardFunction = Callable[[list[dict[str, Any]]], list[dict[str, float]]]

_child: dict[str, Any] = {}  # state of a scoring process: tokenizer, reward function


class RewardError(RuntimeError):
    """A reward function raised or returned invalid scores; the message names the row."""


@dataclass(frozen=True)
class FileReward:
    """A reward function from `FILE.py:NAME` in EasyR1's format; picklable, loaded in the scoring process.

    The file may set REWARD_TYPE = "sequential" (one item -> one dict) instead of "batch" (items -> dicts). An item
    has `response`, `response_length`, `ground_truth` and `problem`.
    """

    path: str
    name: str
    kwargs: dict[str, Any]

    def __call__(self, items: list[dict[str, Any]]) -> list[dict[str, float]]:
        function, is_sequential = self._load()
        if is_sequential:
            return [function(item, **self.kwargs) for item in items]
        return function(items, **self.kwargs)

    def _load(self) -> tuple[Callable, bool]:
        if "file_reward" not in _child:
            spec = importlib.util.spec_from_file_location(Path(self.path).stem, self.path)
            if spec is None or spec.loader is None:
                raise RewardError(f"worker.reward.reward_function: {self.path} is not a Python file")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            if not hasattr(module, self.name):
                raise RewardError(f"worker.reward.reward_function: {self.path} has no {self.name!r}")
            kind = getattr(module, "REWARD_TYPE", "batch")
            if kind not in ("batch", "sequential"):
                raise RewardError(f"{self.path}: REWARD_TYPE must be 'batch' or 'sequential', got {kind!r}")
            _child["file_reward"] = getattr(module, self.name), kind == "sequential"
        return _child["file_reward"]


def _start_child(tokenizer_path: str, function: RewardFunction, skip_special_tokens: bool) -> None:
    from transformers import AutoTokenizer

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the driver handles it
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)
    _child["tokenizer"] = AutoTokenizer.from_pretrained(tokenizer_path)
    _child["function"] = function
    _child["skip_special_tokens"] = skip_special_tokens


def _end_with_parent(parent: int) -> None:
    """Ends this process soon after its driver has ended, by whatever cause."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _score(token_ids: list[list[int]], items: list[dict[str, Any]]) -> tuple[list[str], list[dict[str, float]]]:
    """Decoded responses and their scores; runs in a scoring process."""
    texts = _child["tokenizer"].batch_decode(token_ids, skip_special_tokens=_child["skip_special_tokens"])
    full = [
        item | {"response": text, "response_length": len(ids)}
        for item, text, ids in zip(items, texts, token_ids, strict=True)
    ]
    return texts, _checked_scores(full)


def _score_text(item: dict[str, Any]) -> tuple[list[str], list[dict[str, float]]]:
    return [item["response"]], _checked_scores([item])


def _checked_scores(full: list[dict[str, Any]]) -> list[dict[str, float]]:
    scores = _child["function"](full)
    if len(scores) != len(full):
        raise RewardError(f"the reward function returned {len(scores)} scores for {len(full)} responses")
    for item, score in zip(full, scores, strict=True):
        if "overall" not in score:
            raise RewardError(f"row {item['uid']}: the reward function returned no 'overall', only {sorted(score)}")
    return scores


class PendingRewards:
    """Future of scores."""

    def __init__(self, futures: list[Future], shape: tuple[int, int]):
        self.futures = futures
        self.shape = shape
        self.texts: list[str] = []

    def result(self) -> dict[str, Tensor]:
        """Waits for scores [G, n] by reward key, 0 where a response lacks a key.

        Raises:
            RewardError: the function raised, or a process died.
        """
        scores: list[dict[str, float]] = []
        try:
            for future in self.futures:
                texts, part = future.result()
                self.texts.extend(texts)
                scores.extend(part)
        except BrokenProcessPool as error:
            raise RewardError("a scoring process died (out of memory?); lower worker.reward.num_processes") from error
        except RewardError:
            raise
        except Exception as error:  # noqa: BLE001  a user's function may raise anything
            raise RewardError(f"the reward function raised {type(error).__name__}: {error}") from error
        keys = dict.fromkeys(key for score in scores for key in score)
        return {key: torch.tensor([float(score.get(key, 0)) for score in scores]).reshape(self.shape) for key in keys}


class RewardManager:
    """A process pool that scores responses.

    Args:
        function: items -> scores; picklable. An item has response, response_length, ground_truth, problem, uid.
        tokenizer_path: of the tokenizer that decodes responses.
        num_processes: of the pool.
        skip_special_tokens: True drops special tokens from the decoded text.
    """

    def __init__(
        self, function: RewardFunction, tokenizer_path: str, num_processes: int, skip_special_tokens: bool = True
    ):
        self.num_processes = num_processes
        # numpy reads it at process start; on arrays this small its threads double the time.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self.pool = ProcessPoolExecutor(
            num_processes,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_child,
            initargs=(tokenizer_path, function, skip_special_tokens),
        )

    def submit(self, groups: DataProto) -> PendingRewards:
        """Starts scoring a batch with `responses`, `response_mask` [G, n, R], `ground_truth`, `problem`, `uid`."""
        batch, texts = groups.batch, groups.non_tensor_batch
        num_groups, num_samples, _ = batch["responses"].shape
        lengths = batch["response_mask"].sum(-1).flatten().tolist()
        rows = batch["responses"].flatten(0, 1).tolist()
        token_ids = [row[:length] for row, length in zip(rows, lengths, strict=True)]
        items = [
            {key: str(texts[key][group]) for key in ("ground_truth", "problem", "uid")}
            for group in range(num_groups)
            for _ in range(num_samples)
        ]
        return PendingRewards(self._submit(token_ids, items), (num_groups, num_samples))

    def probe(self, response: str, problem: str, ground_truth: str) -> dict[str, float]:
        """Scores one gold response, so that a broken reward function fails before training."""
        item = {
            "response": response,
            "response_length": 0,
            "ground_truth": ground_truth,
            "problem": problem,
            "uid": "probe",
        }
        pending = PendingRewards([self.pool.submit(_score_text, item)], (1, 1))
        return {key: float(value) for key, value in pending.result().items()}

    def _submit(self, token_ids: list[list[int]], items: Sequence[dict[str, Any]]) -> list[Future]:
        size = -(-len(items) // self.num_processes)
        return [
            self.pool.submit(_score, token_ids[start : start + size], list(items[start : start + size]))
            for start in range(0, len(items), size)
        ]

    def close(self) -> None:
        """Shuts the pool down."""
        self.pool.shutdown(wait=False, cancel_futures=True)

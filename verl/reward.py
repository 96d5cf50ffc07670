"""Reward manager: scores responses in a process pool, in parallel with the training workers.

The pool also detokenises, so the driver only sends token ids. Letters: G groups, n samples.
"""

import importlib.util
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from inspect import iscoroutine
from numbers import Real
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from spatialthinker.stop_signals import STOP_SIGNALS
from verl.protocol import DataProto

RewardFunction = Callable[[list[dict[str, Any]]], list[dict[str, float]]]

_child: dict[str, Any] = {}  # state of a scoring process: tokenizer, reward function


MAX_SCORE = torch.finfo(torch.float32).max
"""Scores become float32."""
START_S = 60.0
"""Added to the limit of a wait: a scoring process may have to start and load the function first."""
END_S = 5.0
"""Limit of the wait for the pool's own thread once its processes are killed."""


class RewardError(RuntimeError):
    """A reward function raised, did not return, or returned invalid scores; the message names function and row."""


@dataclass(frozen=True)
class FileReward:
    """A reward function from `FILE.py:NAME` in EasyR1's format; picklable, loaded in the scoring process.

    It can import the files beside it, if nothing that is installed has their name. The file may set
    REWARD_TYPE = "sequential" (one item -> one dict) instead of "batch" (items -> dicts). An item has `response`,
    `response_length`, `ground_truth` (of the type that the data set has) and `problem`.
    """

    path: str
    name: str
    kwargs: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.path}:{self.name}"

    def __call__(self, items: list[dict[str, Any]]) -> list[dict[str, float]]:
        function, is_sequential = self._load()
        if is_sequential:
            return [_called(lambda item=item: function(item, **self.kwargs), [item]) for item in items]
        return function(items, **self.kwargs)

    def _load(self) -> tuple[Callable, bool]:
        if "file_reward" not in _child:
            spec = importlib.util.spec_from_file_location("reward_file", self.path)
            if spec is None or spec.loader is None:
                raise RewardError(f"worker.reward.reward_function: {self.path} is not a Python file")
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # dataclasses look up deferred annotations there
            sys.path.append(str(Path(self.path).parent))  # last: a neighbour called math.py must not replace Python's
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

    for signum in STOP_SIGNALS:  # they reach all processes; the driver handles them
        signal.signal(signum, signal.SIG_IGN)
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
    texts = _decode(token_ids)
    full = [
        item | {"response": text, "response_length": len(ids)}
        for item, text, ids in zip(items, texts, token_ids, strict=True)
    ]
    return texts, _checked_scores(full)


def _decode(token_ids: list[list[int]]) -> list[str]:
    return _child["tokenizer"].batch_decode(token_ids, skip_special_tokens=_child["skip_special_tokens"])


def _score_text(item: dict[str, Any]) -> tuple[list[str], list[dict[str, float]]]:
    return [item["response"]], _checked_scores([item])


def _checked_scores(full: list[dict[str, Any]]) -> list[dict[str, float]]:
    function = _child["function"]
    scores = _called(lambda: function([dict(item) for item in full]), full)  # copies: it may change what it is given
    if not isinstance(scores, Sequence) or isinstance(scores, str):
        raise RewardError(f"{function} returned {_shown(scores)} instead of a list of dicts, one for each response")
    if len(scores) != len(full):
        raise RewardError(f"{function} returned {len(scores)} scores for {len(full)} responses")
    return [_checked_score(score, item, function) for item, score in zip(full, scores, strict=True)]


def _called(call: Callable[[], Any], items: Sequence[Mapping[str, Any]]) -> Any:
    """The result of a user's code, which may raise anything, leave the process or raise what cannot be pickled."""
    try:
        result = call()
    except RewardError:
        raise
    except BaseException as error:  # noqa: BLE001  SystemExit too, which would end the driver without a word
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise RewardError(
            f"the reward function raised {type(error).__name__}: {_text(error, str)} ({frame.filename}, "
            f"line {frame.lineno}) while it scored {_named_rows(items)}"
        ) from None
    if iscoroutine(result):
        result.close()  # or Python would warn that nobody awaited it
        raise RewardError(f"the reward function is async, and scores {_named_rows(items)} never; drop its async")
    return result


def _named_rows(items: Sequence[Mapping[str, Any]]) -> str:
    rows = list(dict.fromkeys(str(item.get("uid")) for item in items))
    more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(rows[:3])}{more}"


def _checked_score(score: Any, item: Mapping[str, Any], function: Any) -> dict[str, float]:
    """The parts as plain floats, which any process can read."""
    where = f"row {item['uid']}: the reward function"
    if not isinstance(score, Mapping):
        raise RewardError(f"{where} returned {_shown(score)} instead of a dict with 'overall' ({function})")
    if "overall" not in score:
        raise RewardError(
            f"{where} returned no 'overall', only {', '.join(map(repr, score)) or 'nothing'} ({function})"
        )
    parts = {}
    for key, value in score.items():
        number = _finite(value)
        if not isinstance(key, str) or number is None:
            raise RewardError(
                f"{where} returned {_shown(value)} as {key!r}, which must be a finite number ({function}); "
                f"the response begins with {item['response'][:80]!r}"
            )
        parts[key] = number
    return parts


def _finite(value: Any) -> float | None:
    """The value as float if it is a finite number, or an array or tensor of one."""
    with suppress(ValueError, TypeError, RuntimeError, OverflowError):
        value = value.item() if hasattr(value, "item") else value
        number = float(value) if isinstance(value, Real | Decimal) else float("nan")
        return number if abs(number) <= MAX_SCORE else None
    return None


def _shown(value: Any) -> str:
    text = _text(value, repr)
    return text if len(text) <= 80 else f"{text[:80]} ..."


def _text(value: Any, convert: Callable[[Any], str]) -> str:
    """The value as text; its own conversion is the user's code, which may fail."""
    try:
        return convert(value)
    except Exception as error:  # noqa: BLE001
        return f"a {type(value).__name__} whose text cannot be made ({type(error).__name__})"


class PendingRewards:
    """Future of scores; `timeout_s` limits the wait for them, None waits for ever."""

    def __init__(self, futures: list[Future], shape: tuple[int, int], timeout_s: float | None = None, name: str = ""):
        self.futures, self.shape, self.timeout_s, self.name = futures, shape, timeout_s, name
        self.texts: list[str] = []
        """Decoded responses [G * n], once there is a result."""

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
        function: items -> scores; picklable. An item has response, response_length, ground_truth, problem, uid.
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
            {key: str(texts[key][group]) for key in ("problem", "uid")}
            | {"ground_truth": texts["ground_truth"][group]}
            for group in range(num_groups)
            for _ in range(num_samples)
        ]
        return PendingRewards(self._submit(token_ids, items), (num_groups, num_samples), self.timeout_s, self.name)

    def probe(self, response: str, problem: str, ground_truth: Any, row: str = "probe") -> dict[str, float]:
        """Scores a row's gold response, so that a broken reward function fails before training."""
        item = {
            "response": response,
            "response_length": 0,
            "ground_truth": ground_truth,
            "problem": problem,
            "uid": row,
        }
        pending = PendingRewards([self._start(_score_text, item)], (1, 1), self.timeout_s, self.name)
        return {key: float(value) for key, value in pending.result().items()}

    def decode(self, groups: DataProto) -> list[str]:
        """Texts [G * n] of a batch with `responses`, `response_mask` [G, n, R], as the reward function reads them."""
        lengths = groups.batch["response_mask"].sum(-1).flatten().tolist()
        rows = groups.batch["responses"].flatten(0, 1).tolist()
        token_ids = [row[:length] for row, length in zip(rows, lengths, strict=True)]
        return self._start(_decode, token_ids).result()

    def _submit(self, token_ids: list[list[int]], items: Sequence[dict[str, Any]]) -> list[Future]:
        size = -(-len(items) // self.num_processes)
        return [
            self._start(_score, token_ids[start : start + size], list(items[start : start + size]))
            for start in range(0, len(items), size)
        ]

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

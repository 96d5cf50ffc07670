"""Calls of coroutine rewards in their process: many at a time, with time-outs, retries and a count of costs."""

import asyncio
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

from verl.reward.faults import RewardError, describe, name_rows
from verl.reward.scores import check_scores

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 8.0
"""Pauses before the second and the later tries of a call, each twice as long as the one before."""
PING_S = 2.0
"""An event loop that does not answer within it is blocked."""


@dataclass(frozen=True)
class CallLimits:
    """Limits of the calls of a coroutine reward; fields are named as their config keys."""

    concurrency: int = 64
    call_timeout_s: float = 60.0
    retries: int = 5
    wait_s: float = 300.0
    price_per_call: float = 0.0


@dataclass
class CallResults:
    """Results of a batch of calls.

    Attributes:
        scores: one for each item; None where none came back.
        counts: calls, retries, timeouts, failures, missing, price.
        reason: why the first missing one is.
        is_blocked: True when the event loop does not answer any more.
    """

    scores: list[dict[str, float] | None]
    counts: dict[str, float]
    reason: str = ""
    is_blocked: bool = False


@dataclass
class _Batch:
    items: Sequence[Mapping[str, Any]]
    futures: list[Future] = field(default_factory=list)
    counts: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("calls", "retries", "timeouts", "failures", "missing", "price"), 0.0)
    )
    reasons: dict[int, str] = field(default_factory=dict)


class CallLoop:
    """An event loop in a thread of its own that runs calls while the process waits for other work."""

    def __init__(self, limits: CallLimits):
        self.limits = limits
        self.loop = asyncio.new_event_loop()
        self.slots = asyncio.Semaphore(limits.concurrency)
        self.batches: dict[int, _Batch] = {}
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def start(self, number: int, items: Sequence[Mapping[str, Any]], functions: Sequence[Any]) -> None:
        """Starts the calls of a batch; function i scores item i."""
        batch = self.batches[number] = _Batch(items)
        for index, function in enumerate(functions):
            batch.futures.append(asyncio.run_coroutine_threadsafe(self._score(batch, index, function), self.loop))

    def collect(self, number: int, wait_s: float) -> CallResults:
        """Results that are back of a batch after at most `wait_s` seconds; the rest is cancelled.

        Raises:
            RewardError: a call returned what is no score.
        """
        batch = self.batches.pop(number)
        _, late = wait(batch.futures, wait_s)
        for index, future in enumerate(batch.futures):
            if future in late:
                future.cancel()
                last = f", last {batch.reasons[index]}" if index in batch.reasons else ""
                batch.reasons[index] = f"it was not back within worker.reward.wait_s={self.limits.wait_s:g} s{last}"
        scores = [None if future in late else future.result() for future in batch.futures]
        missing = [index for index, score in enumerate(scores) if score is None]
        batch.counts["missing"] = len(missing)
        batch.counts["price"] += batch.counts["calls"] * self.limits.price_per_call
        reason = f"{name_rows([batch.items[missing[0]]])}: {batch.reasons.get(missing[0])}" if missing else ""
        return CallResults(scores, batch.counts, reason, bool(late) and not self._answers())

    def _answers(self) -> bool:
        ping = asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self.loop)
        return not wait([ping], PING_S).not_done

    async def _score(self, batch: _Batch, index: int, function: Any) -> dict[str, float] | None:
        """The score of an item; None when every try failed."""
        item = batch.items[index]
        for attempt in range(self.limits.retries + 1):
            if attempt:
                batch.counts["retries"] += 1
                await asyncio.sleep(min(FIRST_PAUSE_S * 2 ** (attempt - 1), LONGEST_PAUSE_S))
            async with self.slots:
                batch.counts["calls"] += 1
                try:
                    result = await asyncio.wait_for(function.score(dict(item)), self.limits.call_timeout_s)
                    return self._take(batch, result, item, function)
                except (RewardError, asyncio.CancelledError):
                    raise
                except TimeoutError:
                    batch.counts["timeouts"] += 1
                    batch.reasons[index] = f"no result within {self.limits.call_timeout_s:g} s"
                except Exception as error:  # noqa: BLE001  of a service, of any type; counted and tried again
                    batch.counts["failures"] += 1
                    batch.reasons[index] = describe(error)
                except BaseException as error:  # noqa: BLE001  SystemExit would end the loop without a word
                    raise RewardError(
                        f"the reward function raised {describe(error)} for {name_rows([item])}"
                    ) from None
        return None

    @staticmethod
    def _take(batch: _Batch, result: Any, item: Mapping[str, Any], function: Any) -> dict[str, float]:
        (score,) = check_scores(result, [item], function)
        batch.counts["price"] += score.pop("price", 0.0)
        return score

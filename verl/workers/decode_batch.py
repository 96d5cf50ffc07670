"""Requests that decode together, with their counters in arrays; for decode_scheduler.py.

A thousand requests that decode for hundreds of steps have counters that grow by one in each. Here they are added up
for all of them at once, and the requests' own lag behind until somebody reads them (`settle`).

A slot is a request's place in the batch, which it keeps; `live` are those that go on, in the scheduler's order.
"""

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

WINDOW = 64
"""Tokens of a request that wait to be written to it."""


class DecodeBatch:
    """Requests that decode one token each from step to step.

    Args:
        requests: in the scheduler's order; their outputs are buffered and they have no images to free.
        plan: the schedule of the step that they were put together in.
        step: its number.
        step_gap: steps from one of a request to its next; 0 when it is not counted.
    """

    def __init__(self, requests: Sequence[Any], plan: Any, step: int, step_gap: int):
        self.requests = list(requests)
        self.ids = [request.request_id for request in requests]
        self.step, self.step_gap = step, step_gap
        size = len(self.requests)
        self.prompt = np.array([request.num_prompt_tokens for request in requests])
        self.most = np.array([request.max_tokens for request in requests])
        self.stops = np.array(sorted(set().union(*(r.stop_ids for r in requests)) - {None}), dtype=np.int64)
        self.computed, self.pending, self.written = (np.zeros(size, dtype=np.int64) for _ in range(3))
        self.tokens = np.zeros((size, WINDOW), dtype=np.int64)
        self.since = np.zeros(size, dtype=np.int64)  # column of the first token that a request lacks
        self.column = 0
        self.is_live = np.ones(size, dtype=bool)
        self._list_live()
        self.read(range(size))
        self.under_way = deque([(plan, self.live)])

    def _list_live(self) -> None:
        self.live = np.flatnonzero(self.is_live)
        self.live_ids = [self.ids[slot] for slot in self.live.tolist()]
        self.scheduled = dict.fromkeys(self.live_ids, 1)

    def drop(self, slots: np.ndarray) -> None:
        """Takes settled requests out of those that go on."""
        self.is_live[slots] = False
        self._list_live()

    def read(self, slots: Iterable[int]) -> None:
        """Takes the counters of settled requests."""
        for slot in slots:
            request = self.requests[slot]
            self.computed[slot] = request.num_computed_tokens
            self.pending[slot] = request.num_output_placeholders
            self.written[slot] = len(request._output_token_ids)
            self.since[slot] = self.column

    def settle(self, slot: int) -> Any:
        """The request with its tokens and counters up to date."""
        request = self.requests[slot]
        if tokens := self.tokens[slot, self.since[slot] : self.column].tolist():
            request._output_token_ids.extend(tokens)
            request._all_token_ids.extend(tokens)
            request.buffered_tokens.extend(tokens)
            self.since[slot] = self.column
        request.num_computed_tokens = int(self.computed[slot])
        request.num_output_placeholders = int(self.pending[slot])
        if self.step_gap:
            request.next_decode_eligible_step = self.step + self.step_gap
        return request

    def settle_all(self) -> None:
        """Settles all that go on."""
        for slot in self.live.tolist():
            self.settle(slot)

    def retire(self, slots: np.ndarray) -> None:
        """Settles requests and takes them out of those that go on."""
        for slot in slots.tolist():
            self.settle(slot)
        self.drop(slots)

    def scheduled_in(self, plan: Any) -> np.ndarray | None:
        """The slots of the plan if it is the next of this batch, which is then no longer under way; else None."""
        if not self.under_way or self.under_way[0][0] is not plan:
            return None
        return self.under_way.popleft()[1]

    def advance(self, plan: Any, step: int, is_async: bool) -> None:
        """Counts a step that was scheduled for all that go on."""
        self.computed[self.live] += 1
        self.pending[self.live] += is_async
        self.step = step
        self.under_way.append((plan, self.live))

    def append(self, slots: np.ndarray, tokens: np.ndarray) -> None:
        """Adds one token to each of the slots, which all that go on have to be, and takes it from those pending."""
        if self.column == WINDOW:
            self.settle_all()
            self.column = 0
            self.since[:] = 0
        self.tokens[slots, self.column] = tokens
        self.column += 1
        self.written[slots] += 1
        self.pending[slots] = np.maximum(self.pending[slots] - 1, 0)


def tokens_of(ids: Sequence[str], output: Any) -> np.ndarray | None:
    """The token that each request was given, in the order of `ids`; None unless each has exactly one."""
    tokens: Collection[Any] = output.sampled_token_ids
    if not tokens or output.kv_connector_output:
        return None
    if output.req_ids != ids:
        tokens = [output.sampled_token_ids[output.req_id_to_index[number]] for number in ids]
    try:
        return np.array([token for (token,) in tokens], dtype=np.int64)
    except ValueError:
        return None

"""Calls of vision models, whoever provides them: retried, throttled, priced. The providers are in `providers.py`.

    api = APIS[provider](model, base_url, most_at_once)
    reply = await api.ask(ApiRequest(...))

An answer is waited for as long as retrying can help. What is wrong with one request raises RequestFault, what is
wrong with the account ApiStop; an outage that outlasts all retries raises OutageFault, and the request may be asked
again by the next run.
"""

import asyncio
import base64
import math
import os
import random
import re
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from spatialthinker.clients.prices import Price, Usage, cost_usd, find_price
from spatialthinker.storage.images import BrokenImage, encode, has_transparency, open_image, orientation, upright

MAX_TRIES = 14
MAX_WAIT_S = 60.0
TIMEOUT_S = 120.0
_FIRST_WAIT_S = 0.5
_TELL_S = 30.0
_PLAIN_FORMATS = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
_PLAIN_MODES = ("RGB", "L")
_OUT_OF_MONEY = re.compile(r"credit balance|insufficient_quota|billing|exceeded your current quota", re.IGNORECASE)
"""Phrases in the providers' errors (status 400, 402 or 429) for an account without credit."""
_NO_KEY = "none"
"""The API key for a local server where none is set."""


class RequestFault(ValueError):
    """The provider refuses this one request for good."""


class ApiStop(ValueError):
    """The provider refuses every request: key, model or address are wrong."""


class OutageFault(Exception):
    """All retries of one request failed."""


@dataclass(frozen=True)
class ApiRequest:
    """One call."""

    text: str
    images: tuple[bytes, ...] = ()
    """Encoded; they come before the text."""
    system: str | None = None
    """The same in every call of a run, so that the provider's cache keeps it."""
    schema: Mapping[str, Any] | None = None
    """JSON schema that the reply must follow; without one it is free text."""
    max_tokens: int = 2048
    temperature: float = 0.0


@dataclass(frozen=True)
class Reply:
    """A model's reply; `stop` is "end", "length" or "refusal"."""

    text: str
    stop: str
    usage: Usage
    cost_usd: float


@dataclass(frozen=True)
class BatchInfo:
    """A batch that the provider has of this account."""

    id: str
    num_requests: int
    token: str | None
    """The submitter's mark; None where the provider does not return it before the batch has ended."""


class Throttle:
    """Limit on concurrent calls: lowered at a rate limit, raised slowly after answers."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.limit = float(most)
        self._active = 0
        self._free = asyncio.Condition()
        self._paused_until = 0.0
        self._shrunk = 0.0

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        async with self._free:
            await self._free.wait_for(lambda: self._active < max(1, int(self.limit)))
            self._active += 1
        try:
            if (wait := self._paused_until - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            yield
        finally:
            async with self._free:
                self._active -= 1
                self._free.notify()

    def slow_down(self, wait_s: float) -> None:
        """After a rate limit: pause, and three quarters of the calls, at most once a second."""
        now = time.monotonic()
        self._paused_until = max(self._paused_until, now + wait_s)
        if now - self._shrunk > 1:
            self.limit = max(1.0, self.limit * 0.75)
            self._shrunk = now

    def speed_up(self) -> None:
        """After an answer: one more call for every `limit` answers."""
        self.limit = min(float(self.most), self.limit + 1 / self.limit)


class Api(ABC):
    """One provider; the two children differ in how they word a request and read a reply."""

    KEYS: tuple[str, ...]
    MAX_IMAGE_BYTES: int
    MAX_IMAGE_PX: int

    def __init__(self, model: str, base_url: str | None = None, most_at_once: int = 32) -> None:
        self.model = model
        self.price: Price | None = find_price(model)
        self.throttle = Throttle(most_at_once)
        self.num_retries = 0
        self._told = -math.inf
        self.client = self._connect(base_url)

    def _encode(self, image: bytes) -> tuple[str, str]:
        return encode_image(image, self.MAX_IMAGE_BYTES, self.MAX_IMAGE_PX)

    @abstractmethod
    def _connect(self, base_url: str | None) -> Any: ...

    @abstractmethod
    def body(self, request: ApiRequest) -> dict[str, Any]:
        """The request as the provider's JSON."""

    @abstractmethod
    async def _send(self, body: dict[str, Any]) -> Any: ...

    @abstractmethod
    def read(self, message: Any, is_batch: bool = False) -> Reply:
        """The reply in a provider's message."""

    @abstractmethod
    async def _send_batch(self, bodies: Mapping[str, dict[str, Any]], token: str) -> str: ...

    @abstractmethod
    async def _collect_batch(self, batch_id: str) -> dict[str, Reply | str] | None: ...

    @abstractmethod
    async def _list_batches(self, since_s: float, known: Container[str]) -> list[BatchInfo]: ...

    @abstractmethod
    def _retryable(self) -> tuple[type[Exception], ...]: ...

    async def ask(self, request: ApiRequest) -> Reply:
        """The reply to one request."""
        body = await asyncio.to_thread(self.body, request)  # images are encoded: calls under way must not wait for it
        return self.read(await self._insist(lambda: self._send(body)))

    async def submit_batch(self, bodies: Mapping[str, dict[str, Any]], token: str = "") -> str:
        """Submit requests by name for an answer within a day; return the batch's id.

        Names that start with `token-` let `list_batches` tell the batch from others. Nothing is sent twice: after a
        failure only the list of batches says whether the batch arrived. Errors: ApiStop, RequestFault.
        """
        try:
            return await self._send_batch(bodies, token)
        except self._retryable() as error:
            self._judge(error, 0.0)
            raise ApiStop(f"the batch may not have arrived ({error}); the same command finds out later") from error

    async def collect_batch(self, batch_id: str) -> dict[str, Reply | str] | None:
        """The replies of a batch by name, a text where one failed; None while it runs."""
        return await self._insist(lambda: self._collect_batch(batch_id))

    async def list_batches(self, since_s: float, known: Container[str] = ()) -> list[BatchInfo]:
        """The batches submitted since a time in seconds since the epoch, without those whose ids are known."""
        return await self._insist(lambda: self._list_batches(since_s, known))

    async def _insist[T](self, call: Callable[[], Awaitable[T]]) -> T:
        """Return a call's result, with retries while they can help. Errors: RequestFault, ApiStop, OutageFault."""
        fault = ""
        for attempt in range(MAX_TRIES):
            wait_s = min(MAX_WAIT_S, _FIRST_WAIT_S * 2 ** min(attempt, 7)) * (0.5 + random.random() / 2)
            try:
                async with self.throttle.slot():
                    result = await call()
                self.throttle.speed_up()
                return result
            except self._retryable() as error:
                fault = f"{type(error).__name__}: {str(error)[:200]}"
                wait_s = self._judge(error, wait_s)
            self.num_retries += 1
            if attempt >= 2:
                self._tell(fault)
            await asyncio.sleep(wait_s)
        raise OutageFault(f"no answer after {MAX_TRIES} tries; last: {fault}")

    def _tell(self, fault: str) -> None:
        """Say why answers are waited for, now and then."""
        if time.monotonic() - self._told > _TELL_S:
            self._told = time.monotonic()
            print(f"{self.model}: no answer, trying on; last: {fault}", file=sys.stderr)  # noqa: T201

    def _judge(self, error: Exception, wait_s: float) -> float:
        """The seconds to wait before the next try. Raises RequestFault or ApiStop where none can help."""
        status = getattr(error, "status_code", None)
        if status in (401, 402, 403, 404) or (status in (400, 429) and _OUT_OF_MONEY.search(str(error))):
            raise ApiStop(f"{self.model}: {error}") from None
        if status is not None and status < 500 and status not in (408, 409, 429):
            raise RequestFault(f"status {status}: {str(error)[:300]}") from None
        if status in (429, 529):
            wait_s = _retry_after(error) or wait_s
            self.throttle.slow_down(wait_s)
        return wait_s

    def check_budget(self, max_cost_usd: float | None) -> None:
        """Raise ApiStop for a budget that cannot be kept, since no price of the model is known."""
        if max_cost_usd is not None and self.price is None:
            raise ApiStop(
                f"--max_cost_usd needs a price, and none is known of {self.model!r}; see PRICES in prices.py"
            )

    def _reply(self, text: str, stop: str, usage: Usage, is_batch: bool) -> Reply:
        return Reply(text, stop, usage, cost_usd(usage, self.price, is_batch) if self.price else 0.0)

    async def close(self) -> None:
        await self.client.close()


def _retry_after(error: Exception) -> float | None:
    headers = getattr(getattr(error, "response", None), "headers", {})
    try:
        return min(MAX_WAIT_S, float(headers.get("retry-after", "")))
    except ValueError:
        return None


def find_key(names: Sequence[str], base_url: str | None) -> str:
    """The first of these environment variables that is set; a server of one's own needs none.

    Errors: ApiStop that names the variables.
    """
    for name in names:
        if key := os.environ.get(name):
            return key
    if base_url is not None:
        return _NO_KEY
    raise ApiStop(f"no API key: set {names[0]} (or {', '.join(names[1:])}) in the environment")


def encode_image(data: bytes, max_bytes: int, max_px: int) -> tuple[str, str]:
    """Media type and base64 of an image: upright, RGB, its own bytes where they are that already.

    An image over a limit is made smaller, sides in proportion, and never larger.
    Errors: RequestFault for what cannot be decoded.
    """
    try:
        with open_image(data) as image:
            kind = _PLAIN_FORMATS.get(image.format or "")
            fits = len(data) <= max_bytes and max(image.size) <= max_px
            is_plain = image.mode in _PLAIN_MODES and not has_transparency(image) and orientation(image) == 1
            if kind is not None and is_plain and fits:
                image.load()
                return kind, base64.b64encode(data).decode()
            picture = upright(image)
    except BrokenImage as error:
        raise RequestFault(f"the image cannot be decoded: {error}") from None
    picture.thumbnail((max_px, max_px))
    for kind, options in (("PNG", {}), ("JPEG", {"quality": 95})):
        encoded = encode(picture, kind, **options)
        if len(encoded) <= max_bytes:
            return _PLAIN_FORMATS[kind], base64.b64encode(encoded).decode()
    return encode_image(data, max_bytes, max(picture.size) * 3 // 4)


def merge_usage(replies: Sequence[Reply]) -> dict[str, Any]:
    """The tokens and the price of several replies as JSON values."""
    total = sum((reply.usage for reply in replies), Usage())
    return {"usage": total.__dict__, "cost_usd": round(sum(reply.cost_usd for reply in replies), 8)}

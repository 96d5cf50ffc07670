"""Calls of vision models, whoever provides them: retried, throttled, priced. The providers are in `providers.py`.

    api = APIS[provider](model, base_url, most_at_once)
    reply = await api.ask(ApiRequest(...))

An answer is waited for as long as retrying can help. What is wrong with one request raises RequestFault, what is
wrong with the account ApiStop; an outage that outlasts all retries raises OutageFault, and the request may be asked
again by the next run. `stop` ends retrying: what is under way is waited for, and nothing more is sent.
"""

import asyncio
import base64
import math
import random
import re
import resource
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from spatialthinker.clients.keys import find_key
from spatialthinker.clients.prices import Price, Usage, cost_usd, find_price
from spatialthinker.clients.replies import Reply, ReplyError, batch_lines, check_payload, load_payload
from spatialthinker.plain_text import printable
from spatialthinker.storage.files import write_bytes
from spatialthinker.storage.images import BrokenImage, encode, has_transparency, open_image, orientation, upright

MAX_TRIES = 14
MAX_WAIT_S = 60.0
TIMEOUT_S = 120.0
"""Silence of a server while it is connected to and takes a request; for the answer it may be silent for REQUEST_S."""

REQUEST_S = 660.0
"""A whole request. The providers answer within 10 minutes, or not at all: what is given up before is paid twice."""

BATCH_S = 1800.0
"""A whole request that carries a batch."""

STOP_WAIT_S = 25.0
"""A run that is told to stop waits so long for the answers under way; job systems kill after 30 s."""

MAX_REFUSED_TRIES = 3
"""Tries with status 403, 404 or 405: an item's own fault where other requests are answered, else the account's."""

CLOCK_SKEW_S = 600.0
"""A batch that was sent at a time by this machine's clock may be older by that much for the provider."""

ARRIVAL_S = 60.0
"""A batch that is in no list so long after it was sent has not arrived."""

_FIRST_WAIT_S = 0.5
_TELL_S = 30.0
_NUM_WAITS = 20
_UNSENT = ("ConnectError", "ConnectTimeout", "PoolTimeout")
"""Causes of lost connections over which nothing was sent."""
_REFUSALS = (403, 404, 405)
_FREE_DESCRIPTORS = 40
_PLAIN_FORMATS = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
_PLAIN_MODES = ("RGB", "L")
_ACCOUNT_FAULT = re.compile(
    r"credit balance|no credit|out of credit|insufficient.(?:quota|credit|balance|funds)|billing|exceeded your current"
    r" quota|authentication.error|invalid.{0,3}(?:x-)?api.key|incorrect api key|model.not.found|model .{0,80}does not"
    r" exist|account .{0,40}(?:disabled|deactivated|suspended|on hold)",
    re.IGNORECASE,
)
"""Phrases in the providers' errors for a wrong key, an account without credit and an unknown model."""
_MIN_KEY_CHARS = 8


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
        self.stopped = asyncio.Event()

    async def pause(self, wait_s: float) -> None:
        """Wait, at most until the run is told to stop."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.stopped.wait(), wait_s)

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        async with self._free:
            await self._free.wait_for(lambda: self._active < max(1, int(self.limit)))
            self._active += 1
        try:
            if (wait := self._paused_until - time.monotonic()) > 0:
                await self.pause(wait)
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
        self.throttle = Throttle(min(most_at_once, _free_descriptors()))
        self.num_retries = self.num_answers = self.num_given_up = 0
        self._told = -math.inf
        key = find_key(self.KEYS, base_url)
        if key is None:
            others = ", ".join(self.KEYS[1:])
            raise ApiStop(f"no API key: set {self.KEYS[0]} (or {others}) in the environment, or in a file .env")
        self.key = key
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
    def read(self, message: dict[str, Any], is_batch: bool = False) -> Reply:
        """The reply in a provider's message; whatever the message lacks, it does not raise."""

    @abstractmethod
    async def _send_batch(self, bodies: Mapping[str, dict[str, Any]], token: str) -> str: ...

    @abstractmethod
    async def _find_results(self, batch_id: str) -> dict[str, Callable[[], Awaitable[bytes]]] | None:
        """The downloads of an ended batch by file name; None while it runs."""

    @abstractmethod
    def _read_result(self, item: dict[str, Any]) -> Reply | str:
        """The reply in one line of a batch's results, a text where there is none."""

    @abstractmethod
    async def _list_batches(self, since_s: float, known: Container[str]) -> list[BatchInfo]: ...

    @abstractmethod
    def _retryable(self) -> tuple[type[Exception], ...]: ...

    async def ask(self, request: ApiRequest) -> Reply:
        """The reply to one request."""
        body = await asyncio.to_thread(self.body, request)  # images are encoded: calls under way must not wait for it

        async def send() -> Reply:
            return self.read(await self._send(body))

        return await self._insist(send)

    async def submit_batch(self, bodies: Mapping[str, dict[str, Any]], token: str = "") -> str:
        """Submit requests by name for an answer within a day; return the batch's id.

        Names that start with `token-` let `list_batches` tell the batch from others. Nothing is sent twice: after a
        failure only the list of batches says whether the batch arrived. Errors: ApiStop, RequestFault.
        """
        try:
            return await within(BATCH_S, self._send_batch(bodies, token))
        except (*self._retryable(), ReplyError, TimeoutError) as error:
            self._judge(error, 0.0)
            message = f"the batch may not have arrived ({self._describe(error)}); the same command finds out later"
            raise ApiStop(message) from None

    async def collect_batch(self, batch_id: str, folder: Path | None = None) -> dict[str, Reply | str] | None:
        """The replies of a batch by name, a text where one failed; None while it runs.

        What is downloaded is kept in `folder`, and read from there the next time. Each line stands alone.
        """

        async def collect() -> dict[str, Reply | str] | None:
            files = await self._find_results(batch_id)
            if files is None:
                return None
            replies: dict[str, Reply | str] = {}
            for name, download in files.items():
                for item_id, item in batch_lines(await _download(folder, name, download)):
                    if not isinstance(replies.get(item_id), Reply):
                        replies[item_id] = "batch: an unreadable line" if item is None else self._read_result(item)
            return replies

        return await self._insist(collect, BATCH_S)

    def read_batched(self, body: Any) -> Reply | str:
        """The reply in a message of a batch, a text where it is an error."""
        try:
            return self.read(check_payload(body), is_batch=True)
        except ReplyError as error:
            return f"batch: {self._describe(error)}"

    def stop(self) -> None:
        """Send nothing more; requests that are not under way raise OutageFault."""
        self.throttle.stopped.set()

    @asynccontextmanager
    async def finishing(self, tasks: Callable[[], Iterable[asyncio.Task[Any]]]) -> AsyncIterator[None]:
        """A block whose tasks are waited for at its end; their first fault is raised.

        After an error in the block nothing more is sent; when the run is told to stop, the wait has a limit.
        """
        try:
            yield
        except BaseException as error:
            self.stop()
            is_told = isinstance(error, asyncio.CancelledError)
            under_way = [task for task in tasks() if not task.done()]
            if is_told and under_way:
                with suppress(OSError):
                    print(  # noqa: T201
                        f"stopping: {len(under_way)} answers are under way and waited for, {STOP_WAIT_S:.0f} s at "
                        "most; stop again to give them up",
                        file=sys.stderr,
                    )
            _, late = (
                await asyncio.wait(under_way, timeout=STOP_WAIT_S if is_told else None) if under_way else ((), ())
            )
            for task in late:
                task.cancel()
            await asyncio.gather(*tasks(), return_exceptions=True)
            raise
        for fault in await asyncio.gather(*tasks(), return_exceptions=True):
            if isinstance(fault, BaseException):
                raise fault

    async def list_batches(self, since_s: float, known: Container[str] = ()) -> list[BatchInfo]:
        """The batches submitted since a time in seconds since the epoch, without those whose ids are known."""

        async def read_list() -> list[BatchInfo]:
            try:
                return await self._list_batches(since_s, known)
            except (KeyError, TypeError, ValueError) as error:
                raise ReplyError(f"status 200 with an unreadable list of batches ({error})") from error

        return await self._insist(read_list, BATCH_S)

    async def find_batch(self, token: str, num_requests: int, sent_s: float, known: Container[str]) -> str | None:
        """The id of a batch whose submission was cut off; "" for one that never arrived, None while that is open."""
        found = await self.list_batches(sent_s - CLOCK_SKEW_S, known)
        if ours := [info.id for info in found if info.token == token]:
            return ours[0]
        is_open = any(info.token is None and info.num_requests == num_requests for info in found)
        return None if is_open or time.time() < sent_s + ARRIVAL_S else ""

    async def _insist[T](self, call: Callable[[], Coroutine[Any, Any, T]], limit_s: float | None = None) -> T:
        """Return a call's result, with retries while they can help. Errors: RequestFault, ApiStop, OutageFault."""
        fault = ""
        for attempt in range(MAX_TRIES):
            wait_s = min(MAX_WAIT_S, _FIRST_WAIT_S * 2 ** min(attempt, 7)) * (0.5 + random.random() / 2)
            try:
                async with self.throttle.slot():
                    if self.throttle.stopped.is_set():
                        break
                    result = await within(limit_s or REQUEST_S, call())
                self.throttle.speed_up()
                self.num_answers += 1
                return result
            except (*self._retryable(), ReplyError, TimeoutError) as error:
                fault = self._describe(error)
                self.num_given_up += limit_s is None and _may_be_paid(error)
                wait_s = self._judge(error, wait_s)
                if getattr(error, "status_code", None) in _REFUSALS and attempt + 1 >= MAX_REFUSED_TRIES:
                    is_own_fault = self.num_answers > 0 or limit_s is not None  # a batch that is not there
                    raise (RequestFault if is_own_fault else OutageFault)(fault) from None
            except asyncio.CancelledError:
                self.num_given_up += limit_s is None
                raise
            self.num_retries += 1
            if attempt >= 2:
                self._tell(fault)
            await self.throttle.pause(wait_s)
        if self.throttle.stopped.is_set():
            raise OutageFault(f"the run was stopped before an answer{fault and '; last: '}{fault}")
        raise OutageFault(f"no answer after {MAX_TRIES} tries; last: {fault}")

    def _tell(self, fault: str) -> None:
        """Say why answers are waited for, now and then."""
        if time.monotonic() - self._told > _TELL_S:
            self._told = time.monotonic()
            print(f"{self.model}: no answer, trying on; last: {self.clean(fault)}", file=sys.stderr)  # noqa: T201

    def clean(self, text: str) -> str:
        """A server's text in one short line, without what a terminal would obey and without a key that it echoes."""
        text = text.replace(self.key, "[key]") if len(self.key) >= _MIN_KEY_CHARS else text
        return printable(text[:4096])[:300]

    def _describe(self, error: Exception) -> str:
        if isinstance(error, TimeoutError):
            return "TimeoutError: no end of the answer in time"
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        return f"{type(error).__name__}: {self.clean(str(error) + cause)}"

    def _judge(self, error: Exception, wait_s: float) -> float:
        """The seconds to wait before the next try. Raises RequestFault or ApiStop where none can help."""
        status = getattr(error, "status_code", None)
        text = f"{error} {getattr(error, 'body', '')}"
        is_stop = status in (401, 402, 407) or (status == 404 and "model" in text.casefold())
        if is_stop or (status in (None, 400, 403, 404, 429) and is_account_fault(text)):
            raise ApiStop(f"{self.model}: {self.clean(str(error))}") from None
        if status is not None and 300 <= status < 500 and status not in (*_REFUSALS, 408, 409, 429):
            raise RequestFault(f"status {status}: {self.clean(str(error))}") from None
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

    def _reply(self, text: str, stop: str, usage: Usage, is_batch: bool, fault: str = "") -> Reply:
        return Reply(text, stop, usage, cost_usd(usage, self.price, is_batch) if self.price else 0.0, fault)

    async def close(self) -> None:
        """Close the connections, and say for how many requests the provider may bill an answer that never came."""
        await self.client.close()
        if self.num_given_up:
            with suppress(OSError):
                print(  # noqa: T201
                    f"{self.model}: {self.num_given_up} requests ended without an answer (connection lost, time limit "
                    "or stop); where the provider bills them, that is not in the cost",
                    file=sys.stderr,
                )


async def within[T](limit_s: float, call: Coroutine[Any, Any, T]) -> T:
    """The call's result. Raises TimeoutError after a limit.

    It is waited for in parts: of the time for which this process was stopped or had no turn, only the part under way
    counts, and an answer that came in meanwhile is read before the limit is looked at.
    """
    task = asyncio.ensure_future(call)
    try:
        for _ in range(_NUM_WAITS):
            if (await asyncio.wait([task], timeout=limit_s / _NUM_WAITS))[0]:
                return task.result()
        raise TimeoutError
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait([task])


def _may_be_paid(error: Exception) -> bool:
    """True where a request ended before its answer was there: the provider may have made one, and bill it."""
    is_lost = type(error).__name__ in ("APIConnectionError", "APITimeoutError")
    return isinstance(error, TimeoutError) or (is_lost and type(error.__cause__).__name__ not in _UNSENT)


def is_account_fault(text: str) -> bool:
    """True for a provider's error that is about the account and not about the request."""
    return _ACCOUNT_FAULT.search(text) is not None


async def load_response(call: Awaitable[Any]) -> dict[str, Any]:
    """The JSON object of a raw response of either client. Raises ReplyError where it is none, or an error."""
    return load_payload((await call).http_response.content)


async def _download(folder: Path | None, name: str, download: Callable[[], Awaitable[bytes]]) -> bytes:
    path = folder and folder / quote(name, safe="")
    if path is not None and path.is_file():
        return path.read_bytes()
    data = await download()
    if data.strip() and not any(True for _ in batch_lines(data)):
        raise ReplyError(f"status 200, but no results of a batch: {data[:200].decode('utf-8', 'replace')}")
    if path is not None:
        write_bytes(path, data)
    return data


def _free_descriptors() -> int:
    """Connections that this process may open; a few descriptors are left for files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard and soft != resource.RLIM_INFINITY:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return sys.maxsize if soft == resource.RLIM_INFINITY else max(1, soft - _FREE_DESCRIPTORS)


def _retry_after(error: Exception) -> float | None:
    headers = getattr(getattr(error, "response", None), "headers", {})
    try:
        return max(0.0, min(MAX_WAIT_S, float(headers.get("retry-after", ""))))
    except ValueError:
        return None


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

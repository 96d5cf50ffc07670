"""Calls of vision models through the official clients of Anthropic and OpenAI: retried, throttled, priced.

    api = APIS[provider](model, base_url, most_at_once)
    reply = await api.ask(ApiRequest(...))

An answer is waited for as long as retrying can help. What is wrong with one request raises RequestFault, what is
wrong with the account ApiStop; an outage that outlasts all retries raises OutageFault, and the request may be asked
again by the next run.
"""

import asyncio
import base64
import io
import json
import os
import random
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageOps

from spatialthinker.prices import Price, Usage, cost_usd, find_price

MAX_TRIES = 14
MAX_WAIT_S = 60.0
TIMEOUT_S = 120.0
_FIRST_WAIT_S = 0.5
_PLAIN_FORMATS = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
_PLAIN_MODES = ("RGB", "L")
_EXIF_ORIENTATION_TAG = 0x0112
_TOOL = "answer"
_FIXED_TEMPERATURE = ("o1", "o3", "o4", "gpt-5")
"""Models that refuse a temperature."""
_CLAUDE_WITH_TEMPERATURE = ("claude-3", "claude-haiku-4", "claude-opus-4", "claude-sonnet-4")
"""Models that accept one; newer ones decide themselves."""
_NO_KEY = "none"
"""What a local server is given where no key is set."""


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
    """What came back; `stop` is "end", "length" or "refusal"."""

    text: str
    stop: str
    usage: Usage
    cost_usd: float


class Throttle:
    """How many calls may be under way: fewer after a rate limit, slowly more again after answers."""

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
    async def submit_batch(self, bodies: Mapping[str, dict[str, Any]]) -> str:
        """Submit requests by name for an answer within a day; return the batch's id."""

    @abstractmethod
    async def collect_batch(self, batch_id: str) -> dict[str, Reply | str] | None:
        """The replies of a batch by name, a text where one failed; None while it runs."""

    async def ask(self, request: ApiRequest) -> Reply:
        """The reply to one request."""
        body = await asyncio.to_thread(self.body, request)  # images are encoded: calls under way must not wait for it
        fault = ""
        for attempt in range(MAX_TRIES):
            wait_s = min(MAX_WAIT_S, _FIRST_WAIT_S * 2 ** min(attempt, 7)) * (0.5 + random.random() / 2)
            try:
                async with self.throttle.slot():
                    message = await self._send(body)
                self.throttle.speed_up()
                return self.read(message)
            except self._retryable() as error:
                fault = f"{type(error).__name__}: {str(error)[:200]}"
                wait_s = self._judge(error, wait_s)
            self.num_retries += 1
            await asyncio.sleep(wait_s)
        raise OutageFault(f"no answer after {MAX_TRIES} tries; last: {fault}")

    @abstractmethod
    def _retryable(self) -> tuple[type[Exception], ...]: ...

    def _judge(self, error: Exception, wait_s: float) -> float:
        """The seconds to wait before the next try. Raises RequestFault or ApiStop where none can help."""
        status = getattr(error, "status_code", None)
        if status in (401, 403, 404):
            raise ApiStop(f"{self.model}: {error}") from None
        if status is not None and status < 500 and status not in (408, 409, 429):
            raise RequestFault(f"status {status}: {str(error)[:300]}") from None
        if status in (429, 529):
            wait_s = _retry_after(error) or wait_s
            self.throttle.slow_down(wait_s)
        return wait_s

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


class AnthropicApi(Api):
    """Messages API; the reply is the input of a forced tool."""

    KEYS = ("ANTHROPIC_API_KEY", "CLAUDE_API_KEY")
    MAX_IMAGE_BYTES = 5_000_000 * 3 // 4  # the limit is on the base64 text
    MAX_IMAGE_PX = 8000

    def _connect(self, base_url: str | None) -> Any:
        import anthropic

        key = find_key(self.KEYS, base_url)
        return anthropic.AsyncAnthropic(api_key=key, base_url=base_url, max_retries=0, timeout=TIMEOUT_S)

    def _retryable(self) -> tuple[type[Exception], ...]:
        import anthropic

        return (anthropic.AnthropicError, json.JSONDecodeError)

    def body(self, request: ApiRequest) -> dict[str, Any]:
        content: list[dict[str, Any]] = []
        for image in request.images:
            kind, data = self._encode(image)
            content.append({"type": "image", "source": {"type": "base64", "media_type": kind, "data": data}})
        content.append({"type": "text", "text": request.text})
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": request.max_tokens,
            "messages": [{"role": "user", "content": content}],
        }
        if self.model.startswith(_CLAUDE_WITH_TEMPERATURE):
            body["temperature"] = request.temperature
        if request.system is not None:
            body["system"] = [{"type": "text", "text": request.system, "cache_control": {"type": "ephemeral"}}]
        if request.schema is not None:
            tool = {"name": _TOOL, "description": "Return the result.", "input_schema": dict(request.schema)}
            body |= {"tools": [tool], "tool_choice": {"type": "tool", "name": _TOOL}}
        return body

    async def _send(self, body: dict[str, Any]) -> Any:
        # The client no longer has an argument for it, the service still reads it for these models.
        extra = {key: body[key] for key in body.keys() & {"temperature"}}
        arguments = {key: value for key, value in body.items() if key not in extra}
        return await self.client.messages.create(**arguments, extra_body=extra)

    def read(self, message: Any, is_batch: bool = False) -> Reply:
        texts = [json.dumps(block.input) for block in message.content if block.type == "tool_use"]
        texts += [block.text for block in message.content if block.type == "text"]
        stop = {"max_tokens": "length", "refusal": "refusal"}.get(message.stop_reason, "end")
        used = message.usage
        read, written = used.cache_read_input_tokens or 0, used.cache_creation_input_tokens or 0
        return self._reply(
            "\n".join(texts), stop, Usage(used.input_tokens, used.output_tokens, read, written), is_batch
        )

    async def submit_batch(self, bodies: Mapping[str, dict[str, Any]]) -> str:
        requests = [{"custom_id": name, "params": body} for name, body in bodies.items()]
        return (await self.client.messages.batches.create(requests=requests)).id

    async def collect_batch(self, batch_id: str) -> dict[str, Reply | str] | None:
        batch = await self.client.messages.batches.retrieve(batch_id)
        if batch.processing_status != "ended":
            return None
        replies: dict[str, Reply | str] = {}
        async for item in await self.client.messages.batches.results(batch_id):
            result = item.result
            is_done = result.type == "succeeded"
            replies[item.custom_id] = self.read(result.message, is_batch=True) if is_done else f"batch: {result.type}"
        return replies


class OpenAiApi(Api):
    """Chat completions with a JSON schema; prefixes are cached by themselves."""

    KEYS = ("OPENAI_API_KEY", "OPENAI_APIKEY", "OPENAI_KEY")
    MAX_IMAGE_BYTES = 20_000_000
    MAX_IMAGE_PX = 16_000

    def _connect(self, base_url: str | None) -> Any:
        import openai

        key = find_key(self.KEYS, base_url)
        return openai.AsyncOpenAI(api_key=key, base_url=base_url, max_retries=0, timeout=TIMEOUT_S)

    def _retryable(self) -> tuple[type[Exception], ...]:
        import openai

        return (openai.OpenAIError, json.JSONDecodeError)

    def body(self, request: ApiRequest) -> dict[str, Any]:
        content: list[dict[str, Any]] = []
        for image in request.images:
            kind, data = self._encode(image)
            address = {"url": f"data:{kind};base64,{data}", "detail": "high"}
            content.append({"type": "image_url", "image_url": address})
        content.append({"type": "text", "text": request.text})
        system = [] if request.system is None else [{"role": "system", "content": request.system}]
        body: dict[str, Any] = {
            "model": self.model,
            "max_completion_tokens": request.max_tokens,
            "messages": [*system, {"role": "user", "content": content}],
        }
        if not self.model.startswith(_FIXED_TEMPERATURE):
            body["temperature"] = request.temperature
        if request.schema is not None:
            schema = {"name": _TOOL, "strict": True, "schema": dict(request.schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body

    async def _send(self, body: dict[str, Any]) -> Any:
        return await self.client.chat.completions.create(**body)

    def read(self, message: Any, is_batch: bool = False) -> Reply:
        choice = message.choices[0]
        is_refused = bool(choice.message.refusal) or choice.finish_reason == "content_filter"
        stop = "refusal" if is_refused else "length" if choice.finish_reason == "length" else "end"
        text = choice.message.content or choice.message.refusal or ""
        used = message.usage
        read = (used.prompt_tokens_details.cached_tokens or 0) if used.prompt_tokens_details else 0
        return self._reply(text, stop, Usage(used.prompt_tokens - read, used.completion_tokens, read), is_batch)

    async def submit_batch(self, bodies: Mapping[str, dict[str, Any]]) -> str:
        path = "/v1/chat/completions"
        lines = [{"custom_id": n, "method": "POST", "url": path, "body": body} for n, body in bodies.items()]
        data = "\n".join(map(json.dumps, lines)).encode()
        file = await self.client.files.create(file=("batch.jsonl", data), purpose="batch")
        batch = await self.client.batches.create(input_file_id=file.id, endpoint=path, completion_window="24h")
        return batch.id

    async def collect_batch(self, batch_id: str) -> dict[str, Reply | str] | None:
        from openai.types.chat import ChatCompletion

        batch = await self.client.batches.retrieve(batch_id)
        if batch.status not in ("completed", "failed", "expired", "cancelled"):
            return None
        replies: dict[str, Reply | str] = {}
        for file_id in filter(None, (batch.output_file_id, batch.error_file_id)):
            for line in (await self.client.files.content(file_id)).text.splitlines():
                item = json.loads(line)
                answer = item.get("response") or {}
                if answer.get("status_code") == 200:
                    message = ChatCompletion.model_validate(answer["body"])
                    replies[item["custom_id"]] = self.read(message, is_batch=True)
                else:
                    replies[item["custom_id"]] = f"batch: {str(item.get('error') or answer)[:200]}"
        return replies


APIS: dict[str, type[Api]] = {"anthropic": AnthropicApi, "openai": OpenAiApi}


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
        with Image.open(io.BytesIO(data)) as image:
            kind = _PLAIN_FORMATS.get(image.format or "")
            is_upright = image.getexif().get(_EXIF_ORIENTATION_TAG, 1) == 1
            fits = len(data) <= max_bytes and max(image.size) <= max_px
            if kind is not None and image.mode in _PLAIN_MODES and is_upright and fits:
                image.load()
                return kind, base64.b64encode(data).decode()
            picture = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RequestFault(f"the image cannot be decoded: {error}") from None
    picture.thumbnail((max_px, max_px))
    for kind, options in (("image/png", {"format": "PNG"}), ("image/jpeg", {"format": "JPEG", "quality": 95})):
        buffer = io.BytesIO()
        picture.save(buffer, **options)
        if buffer.tell() <= max_bytes:
            return kind, base64.b64encode(buffer.getvalue()).decode()
    return encode_image(data, max_bytes, max(picture.size) * 3 // 4)


def merge_usage(replies: Sequence[Reply]) -> dict[str, Any]:
    """The tokens and the price of several replies as JSON values."""
    total = sum((reply.usage for reply in replies), Usage())
    return {"usage": total.__dict__, "cost_usd": round(sum(reply.cost_usd for reply in replies), 8)}

"""Anthropic and OpenAI through their official clients: how each words a request and reads a reply."""

import json
from collections.abc import Awaitable, Callable, Container, Mapping
from datetime import datetime
from functools import partial
from typing import Any

from spatialthinker.clients.model_api import TIMEOUT_S, Api, ApiRequest, BatchInfo, load_response
from spatialthinker.clients.prices import Usage
from spatialthinker.clients.replies import Reply, ReplyError, as_count, as_dict, as_text, batch_lines, first
from spatialthinker.plain_text import whole_characters

_TOOL = "answer"
_FIXED_TEMPERATURE = ("o1", "o3", "o4", "gpt-5")
"""Models that refuse a temperature."""
_CLAUDE_WITH_TEMPERATURE = ("claude-3", "claude-haiku-4", "claude-opus-4", "claude-sonnet-4")
"""Models that accept one; newer ones decide themselves."""


class AnthropicApi(Api):
    """Messages API; the reply is the input of a forced tool."""

    KEYS = ("ANTHROPIC_API_KEY", "CLAUDE_API_KEY")
    MAX_IMAGE_BYTES = 5_000_000 * 3 // 4  # the limit is on the base64 text
    MAX_IMAGE_PX = 8000

    def _connect(self, base_url: str | None) -> Any:
        import anthropic

        timeout = anthropic.Timeout(TIMEOUT_S, read=None)
        return anthropic.AsyncAnthropic(api_key=self.key, base_url=base_url, max_retries=0, timeout=timeout)

    def _retryable(self) -> tuple[type[Exception], ...]:
        import anthropic

        return (anthropic.AnthropicError,)

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
        return await load_response(self.client.messages.with_raw_response.create(**arguments, extra_body=extra))

    def read(self, message: dict[str, Any], is_batch: bool = False) -> Reply:
        if "content" not in message:
            raise ReplyError(f"status 200 with no message: {str(message)[:200]}")
        content = message["content"]
        parts = content if isinstance(content, list) else []
        tools = [part for part in parts if as_dict(part).get("type") == "tool_use"]
        # A forced tool's input is the answer: it comes last, where a draft in the text cannot hide it.
        ordered = [part for part in parts if part not in tools] + tools if tools else content
        text = as_text(ordered, {"text": "text", "tool_use": "input"})
        stop = {"max_tokens": "length", "refusal": "refusal"}.get(str(message.get("stop_reason")), "end")
        used = as_dict(message.get("usage"))
        names = ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
        usage = Usage(*(as_count(used.get(name)) for name in names))
        fault = "" if content and isinstance(content, str | list) else f"the reply has no content: {str(content)[:40]}"
        return self._reply(text, stop, usage, is_batch, fault)

    async def _send_batch(self, bodies: Mapping[str, dict[str, Any]], token: str) -> str:
        requests = [{"custom_id": name, "params": body} for name, body in bodies.items()]
        return batch_id(await load_response(self.client.messages.batches.with_raw_response.create(requests=requests)))

    async def _list_batches(self, since_s: float, known: Container[str]) -> list[BatchInfo]:
        found = []
        further: dict[str, str] = {}
        while True:
            call = self.client.messages.batches.with_raw_response.list(limit=100, **further)
            page = await load_response(call)
            batches = [as_dict(batch) for batch in page.get("data") or []]
            for batch in batches:  # the newest first
                if datetime.fromisoformat(batch["created_at"]).timestamp() < since_s:
                    return found
                if batch["id"] not in known:
                    token = await self._token(batch["id"]) if batch.get("processing_status") == "ended" else None
                    counts = as_dict(batch.get("request_counts"))
                    found.append(BatchInfo(batch["id"], sum(map(as_count, counts.values())), token))
            if not page.get("has_more") or not batches:
                return found
            further = {"after_id": batches[-1]["id"]}

    async def _token(self, name: str) -> str:
        """The common prefix of an ended batch's request names: the provider keeps no other mark."""
        for download in ((await self._find_results(name)) or {}).values():
            for item_id, _ in batch_lines(await download()):
                return item_id.partition("-")[0]
        return ""

    async def _find_results(self, name: str) -> dict[str, Callable[[], Awaitable[bytes]]] | None:
        batch = await load_response(self.client.messages.batches.with_raw_response.retrieve(name))
        if batch.get("processing_status") != "ended":
            return None
        address = batch.get("results_url") or f"/v1/messages/batches/{name}/results"

        async def download() -> bytes:
            from anthropic import AsyncAPIResponse

            return (await self.client.get(str(address), cast_to=AsyncAPIResponse[bytes])).http_response.content

        return {f"{name}.jsonl": download}

    def _read_result(self, item: dict[str, Any]) -> Reply | str:
        result = as_dict(item.get("result"))
        if result.get("type") == "succeeded":
            return self.read_batched(result.get("message"))
        return f"batch: {self.clean(str(result.get('error') or result.get('type')))}"


class OpenAiApi(Api):
    """Chat completions with a JSON schema; prefixes are cached by themselves."""

    KEYS = ("OPENAI_API_KEY", "OPENAI_APIKEY", "OPENAI_KEY")
    MAX_IMAGE_BYTES = 20_000_000
    MAX_IMAGE_PX = 16_000

    def _connect(self, base_url: str | None) -> Any:
        import openai

        timeout = openai.Timeout(TIMEOUT_S, read=None)
        return openai.AsyncOpenAI(api_key=self.key, base_url=base_url, max_retries=0, timeout=timeout)

    def _retryable(self) -> tuple[type[Exception], ...]:
        import openai

        return (openai.OpenAIError,)

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
        return await load_response(self.client.chat.completions.with_raw_response.create(**body))

    def read(self, message: dict[str, Any], is_batch: bool = False) -> Reply:
        if "choices" not in message:
            raise ReplyError(f"status 200 with no message: {str(message)[:200]}")
        choice = first(message["choices"])
        answer = as_dict(choice.get("message"))
        listed = answer.get("tool_calls")
        calls = [as_dict(as_dict(call).get("function")) for call in (listed if isinstance(listed, list) else [])]
        calls.append(as_dict(answer.get("function_call")))
        arguments = [value for call in calls if isinstance(value := call.get("arguments"), str | dict)]
        texts = [as_text(answer.get("content"), {"text": "text", "output_text": "text"})]
        texts += [value if isinstance(value, str) else json.dumps(value) for value in arguments]
        refusal = as_text(answer.get("refusal"), {})
        text = whole_characters("\n".join(filter(None, texts))) or refusal
        reason = str(choice.get("finish_reason"))
        is_refused = bool(refusal) or reason == "content_filter"
        used = as_dict(message.get("usage"))
        read = as_count(as_dict(used.get("prompt_tokens_details")).get("cached_tokens"))
        sent, written = as_count(used.get("prompt_tokens")), as_count(used.get("completion_tokens"))
        usage = Usage(max(0, sent - read), written, read)
        fault = "" if answer else f"the reply holds no message: {str(message['choices'])[:80]}"
        stop = "refusal" if is_refused else "length" if reason == "length" else "end"
        return self._reply(text, stop, usage, is_batch, fault)

    async def _send_batch(self, bodies: Mapping[str, dict[str, Any]], token: str) -> str:
        path = "/v1/chat/completions"
        lines = [{"custom_id": n, "method": "POST", "url": path, "body": body} for n, body in bodies.items()]
        data = "\n".join(map(json.dumps, lines)).encode()
        file = await load_response(
            self.client.files.with_raw_response.create(file=("batch.jsonl", data), purpose="batch")
        )
        call = self.client.batches.with_raw_response.create(
            input_file_id=batch_id(file),
            endpoint=path,
            completion_window="24h",
            metadata={"token": token} if token else None,
        )
        return batch_id(await load_response(call))

    async def _list_batches(self, since_s: float, known: Container[str]) -> list[BatchInfo]:
        found = []
        further: dict[str, str] = {}
        while True:
            page = await load_response(self.client.batches.with_raw_response.list(limit=100, **further))
            batches = [as_dict(batch) for batch in page.get("data") or []]
            for batch in batches:  # the newest first
                if batch["created_at"] < since_s:
                    return found
                if batch["id"] not in known:
                    number = as_count(as_dict(batch.get("request_counts")).get("total"))
                    found.append(BatchInfo(batch["id"], number, as_dict(batch.get("metadata")).get("token", "")))
            if not page.get("has_more") or not batches:
                return found
            further = {"after": batches[-1]["id"]}

    async def _find_results(self, name: str) -> dict[str, Callable[[], Awaitable[bytes]]] | None:
        batch = await load_response(self.client.batches.with_raw_response.retrieve(name))
        if batch.get("status") not in ("completed", "failed", "expired", "cancelled"):
            return None
        if batch["status"] != "completed":
            self._tell(f"batch {name} {batch['status']}: {batch.get('errors')}")
        files = [str(file) for key in ("output_file_id", "error_file_id") if (file := batch.get(key))]

        async def download(file: str) -> bytes:
            return (await self.client.files.with_raw_response.content(file)).http_response.content

        return {f"{name}.{file}.jsonl": partial(download, file) for file in files}

    def _read_result(self, item: dict[str, Any]) -> Reply | str:
        answer = as_dict(item.get("response"))
        if answer.get("status_code") == 200:
            return self.read_batched(answer.get("body"))
        return f"batch: {self.clean(str(item.get('error') or answer))}"


def batch_id(created: dict[str, Any]) -> str:
    """The id of what was created. Raises ReplyError where the server names none."""
    if not isinstance(name := created.get("id"), str) or not name:
        raise ReplyError(f"status 200 with no id: {str(created)[:200]}")
    return whole_characters(name)


APIS: dict[str, type[Api]] = {"anthropic": AnthropicApi, "openai": OpenAiApi}

"""Anthropic and OpenAI through their official clients: how each words a request and reads a reply."""

import json
from collections.abc import Container, Mapping
from typing import Any

from spatialthinker.clients.model_api import TIMEOUT_S, Api, ApiRequest, BatchInfo, Reply, find_key
from spatialthinker.clients.prices import Usage

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

    async def _send_batch(self, bodies: Mapping[str, dict[str, Any]], token: str) -> str:
        requests = [{"custom_id": name, "params": body} for name, body in bodies.items()]
        return (await self.client.messages.batches.create(requests=requests)).id

    async def _list_batches(self, since_s: float, known: Container[str]) -> list[BatchInfo]:
        found = []
        async for batch in self.client.messages.batches.list(limit=100):  # the newest first
            if batch.created_at.timestamp() < since_s:
                break
            if batch.id not in known:
                token = await self._token(batch.id) if batch.processing_status == "ended" else None
                found.append(BatchInfo(batch.id, sum(batch.request_counts.model_dump().values()), token))
        return found

    async def _token(self, batch_id: str) -> str:
        """The common prefix of an ended batch's request names: the provider keeps no other mark."""
        async for item in await self.client.messages.batches.results(batch_id):
            return item.custom_id.partition("-")[0]
        return ""

    async def _collect_batch(self, batch_id: str) -> dict[str, Reply | str] | None:
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

    async def _send_batch(self, bodies: Mapping[str, dict[str, Any]], token: str) -> str:
        path = "/v1/chat/completions"
        lines = [{"custom_id": n, "method": "POST", "url": path, "body": body} for n, body in bodies.items()]
        data = "\n".join(map(json.dumps, lines)).encode()
        file = await self.client.files.create(file=("batch.jsonl", data), purpose="batch")
        mark = {"token": token} if token else None
        batch = await self.client.batches.create(
            input_file_id=file.id, endpoint=path, completion_window="24h", metadata=mark
        )
        return batch.id

    async def _list_batches(self, since_s: float, known: Container[str]) -> list[BatchInfo]:
        found = []
        async for batch in self.client.batches.list(limit=100):  # the newest first
            if batch.created_at < since_s:
                break
            if batch.id not in known:
                number = batch.request_counts.total if batch.request_counts else 0
                found.append(BatchInfo(batch.id, number, (batch.metadata or {}).get("token", "")))
        return found

    async def _collect_batch(self, batch_id: str) -> dict[str, Reply | str] | None:
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

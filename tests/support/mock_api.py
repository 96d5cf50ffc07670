"""A local stand-in for the APIs of Anthropic and OpenAI, batches included, with faults on demand.

    python tests/support/mock_api.py --port 0 --latency_s 1 --faults 0.3 --calls calls.txt

Prints its address. Answers are made from the scene in the request by the templates, and so depend on the request
alone; a fault depends on the request and on how often it came. Every answered request leaves a line in `--calls`.
"""

import argparse
import asyncio
import hashlib
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aiohttp import web

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # it is run as a file

from data_gen.questions.draft import Draft
from data_gen.questions.templates import TEMPLATES
from data_gen.scenes.scene import Scene
from spatialthinker.scene_graph import Relation, SceneObject
from spatialthinker.schema import LETTERS

FAULTS = ("429", "500", "timeout", "cut", "refusal", "prose", "truncated", "invalid")
UNANSWERED = ("429", "500", "timeout", "cut", "error_body", "page", "list", "forbidden", "drip", "no_json", "deep")
"""Faults without a message, which cost nothing."""
UNKNOWN_MODEL = "no-such-model"
STATIC_TOKENS, OUTPUT_TOKENS = 1400, 120


@dataclass
class Mock:
    latency_s: float = 0.0
    faults: float = 0.0
    kinds: tuple[str, ...] = FAULTS
    timeout_s: float = 5.0
    calls: Path | None = None
    bill: Path | None = None
    """A line for every message that was answered, with what its usage says and True where it was in a batch."""
    credit: int | None = None
    """So many requests are answered, all later ones refused; None answers all."""
    seen: Counter[str] = field(default_factory=Counter)
    batches: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    downloads: int = 0
    under_way: int = 0
    most_under_way: int = 0
    """Requests that wait for their answer, now and at most; GET /most_under_way."""

    def fault(self, text: str) -> str | None:
        """The fault of this request, if any."""
        self.seen[text] += 1
        rng = random.Random(hashlib.sha256(f"{self.seen[text]}/{text}".encode()).hexdigest())
        return rng.choice(self.kinds) if rng.random() < self.faults else None

    def note(self, text: str) -> None:
        if self.calls is not None:
            with self.calls.open("a") as file:
                file.write(hashlib.sha256(text.encode()).hexdigest()[:16] + "\n")

    def charge(self, message: dict[str, Any], is_batch: bool) -> None:
        if self.bill is not None:
            with self.bill.open("a") as file:
                file.write(json.dumps([message.get("usage"), is_batch]) + "\n")


def read_request(text: str) -> tuple[Scene, str]:
    """The scene and the category that a request asks for."""
    width, height = map(int, re.findall(r"Size: (\d+) x (\d+)", text)[0])
    number = r"(-?\d+)"
    found = re.findall(rf"^(\S+\.\d+) \[{number}, {number}, {number}, {number}\]$", text, re.MULTILINE)
    objects = tuple(SceneObject(i, tuple(map(float, box))) for i, *box in found)
    relations = tuple(Relation(*x) for x in re.findall(r"^(\S+\.\d+) \| (.+?) \| (\S+\.\d+)$", text, re.MULTILINE))
    category = re.findall(r"Needed: category (\w+)", text)[0]
    return Scene("mock", b"", width, height, objects, relations), category


def answer(text: str) -> dict[str, Any]:
    """A reply that passes the checks; to a question with options, one of their letters."""
    if "Needed: category" not in text:
        letters = re.findall(r"^\(([A-D])\)", text, re.MULTILINE)
        return {"answer": random.Random(text).choice(letters)}
    scene, category = read_request(text.split("\n\nYour reply to this was")[0])
    rng = random.Random(hashlib.sha256(text.encode()).hexdigest())
    names = [category, *TEMPLATES]
    drafts: list[Draft] = next((found for name in names if (found := TEMPLATES[name](scene, rng))), [])
    draft = rng.choice(drafts)
    options = rng.sample(draft.options, len(draft.options))
    return {
        "question": draft.question,
        "options": options,
        "answer": LETTERS[options.index(draft.answer)],
        "category": draft.category,
        "level": draft.level,
        "rating": rng.randint(1, 10),
        "evidence_ids": list(draft.evidence),
        "evidence_relations": [
            {"subject": r.subject, "predicate": r.predicate, "object": r.object} for r in draft.relations
        ],
    }


def reply_text(text: str, fault: str | None) -> tuple[str, str]:
    """The reply's text and its stop reason in Anthropic's words."""
    values = answer(text)
    if fault == "refusal":
        return "I cannot help with this picture.", "refusal"
    if fault == "truncated":
        return json.dumps(values)[: len(json.dumps(values)) // 2], "max_tokens"
    if fault == "prose":
        return f"Sure! Here it is {{as asked}}:\n```json\n{json.dumps(values)}\n```\nAnything else?", "end_turn"
    if fault == "invalid":
        values |= {"category": "Position", "evidence_ids": ["ghost.1"]}
    return json.dumps(values), "tool_use"


def text_of(body: dict[str, Any]) -> str:
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(c.get("text", "") for c in content)


def anthropic_message(body: dict[str, Any], fault: str | None) -> dict[str, Any]:
    text, stop = reply_text(text_of(body), fault)
    block: dict[str, Any] = {"type": "text", "text": text}
    if stop == "tool_use" and "tools" in body:
        block = {"type": "tool_use", "id": "t", "name": body["tools"][0]["name"], "input": json.loads(text)}
    used = {"input_tokens": len(text_of(body)) // 4, "output_tokens": OUTPUT_TOKENS}
    used |= {"cache_read_input_tokens": STATIC_TOKENS, "cache_creation_input_tokens": 0}
    head = {"id": "m", "type": "message", "role": "assistant", "model": body["model"], "stop_sequence": None}
    return head | {"content": [block], "stop_reason": stop, "usage": used}


def openai_message(body: dict[str, Any], fault: str | None) -> dict[str, Any]:
    text, stop = reply_text(text_of(body), fault)
    message = {"role": "assistant", "content": text, "refusal": None}
    if stop == "refusal":
        message |= {"content": None, "refusal": text}
    reason = "length" if stop == "max_tokens" else "stop"
    tokens = len(text_of(body)) // 4 + STATIC_TOKENS
    used = {"prompt_tokens": tokens, "completion_tokens": OUTPUT_TOKENS, "total_tokens": tokens + OUTPUT_TOKENS}
    used["prompt_tokens_details"] = {"cached_tokens": STATIC_TOKENS}
    choice = {"index": 0, "finish_reason": reason, "message": message}
    return {"id": "c", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]} | {
        "usage": used
    }


MESSAGES = {"anthropic": anthropic_message, "openai": openai_message}
ERROR = {"error": {"type": "api_error", "message": "down \x1b[2J\u202e, your key was test-key-0123456789"}}


def text_of_message(message: dict[str, Any]) -> str:
    """The text or the tool's input of a whole message."""
    if "choices" in message:
        return message["choices"][0]["message"]["content"]
    block = message["content"][0]
    return json.dumps(block["input"]) if block["type"] == "tool_use" else block["text"]


def with_text(message: dict[str, Any], text: Any) -> dict[str, Any]:
    """The message with another text, or other content."""
    if "choices" in message:
        message["choices"][0]["message"]["content"] = text
    else:
        message["content"] = [{"type": "text", "text": text}] if isinstance(text, str) else text
    return message


def set_usage(key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda message: message | {key: value}


def without_choice(value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda message: message | {"choices" if "choices" in message else "content": value}


def as_parts(message: dict[str, Any]) -> Any:
    text = text_of_message(message)
    return with_text(message, [{"type": "text", "text": text}, {"type": "odd"}, None, 3, {"type": "text"}])


def as_tool_call(message: dict[str, Any]) -> Any:
    text = text_of_message(message)
    if "choices" in message:
        call = {"id": "t", "type": "function", "function": {"name": "answer", "arguments": text}}
        message["choices"][0]["message"] |= {"content": None, "tool_calls": [call]}
    return message


def reworded(change: Callable[[str], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda message: with_text(message, change(text_of_message(message)))


def without_message(message: dict[str, Any]) -> Any:
    if "choices" in message:
        message["choices"][0]["message"] = None
        return message
    return message | {"content": None}


def null_counts(message: dict[str, Any]) -> Any:
    return message | {"usage": dict.fromkeys(message["usage"], None)}


def drafted(text: str) -> str:
    draft = json.dumps(json.loads(text) | {"question": "A draft?"})
    return f"<think>First {draft}, no.</think>\n{text}"


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no_choices": without_choice([]),
    "null_choices": without_choice(None),
    "odd_choices": without_choice([None, 3, "x"]),
    "no_usage": lambda message: {key: value for key, value in message.items() if key != "usage"},
    "null_usage": set_usage("usage", None),
    "odd_usage": set_usage("usage", [{"input_tokens": "many"}]),
    "null_counts": null_counts,
    "null_message": without_message,
    "null_stop": lambda message: message | {"stop_reason": None, "id": None, "model": ["x"]},
    "parts": as_parts,
    "tool_call": as_tool_call,
    "surrogate": reworded(lambda text: text[:-1] + ', "note": "\ud800"}'),
    "surrogate_id": set_usage("id", "\udfff"),
    "separators": reworded(lambda text: text.replace(" ", "\u2028", 1) + "\x85\u2029 done"),
    "draft": reworded(drafted),
    "trailing_commas": reworded(lambda text: text.replace("]", ",]").replace("}", ",}")),
    "single_quotes": reworded(lambda text: str(json.loads(text))),
    "nul": reworded(lambda text: text.replace('"question": "', '"question": "\\u0000') + "\0"),
    "null_question": reworded(lambda text: json.dumps(json.loads(text) | {"question": None})),
    "nested": reworded(lambda text: '{"a":' * 5000 + "1" + "}" * 5000),
    "number_of_400_digits": reworded(lambda text: text[:-1] + ', "n": ' + "9" * 400 + "}"),
}
"""Messages that are answered, and paid, in a form that no schema foresees."""


def payload(provider: str, body: dict[str, Any], fault: str | None) -> Any:
    """The JSON of an answer with status 200."""
    if fault == "error_body":
        return ERROR
    if fault == "list":
        return [ERROR]
    if fault == "deep":
        return "deep"
    message = MESSAGES[provider](body, fault)
    return HOSTILE[fault](message) if fault in HOSTILE else message


def encode(value: Any) -> str:
    """The JSON text of an answer; halves of surrogates stay as escapes."""
    return "[" * 5000 + "]" * 5000 if value == "deep" else json.dumps(value)


def create_app(mock: Mock) -> web.Application:
    """The server; all paths of both providers."""

    def handler(provider: str) -> Any:
        async def handle(request: web.Request) -> web.StreamResponse:
            if "bad-key" in str(request.headers):
                return web.json_response({"error": {"type": "authentication_error", "message": "no"}}, status=401)
            body = await request.json()
            if body["model"] == UNKNOWN_MODEL:
                return web.json_response({"error": {"message": f"there is no {UNKNOWN_MODEL}"}}, status=404)
            text = text_of(body)
            fault = mock.fault(text)
            if mock.credit is not None and mock.seen.total() > mock.credit:
                return web.json_response({"error": {"message": "no credit left"}}, status=403)
            mock.under_way += 1
            mock.most_under_way = max(mock.most_under_way, mock.under_way)
            await asyncio.sleep(mock.latency_s)
            mock.under_way -= 1
            if fault == "429":
                return web.json_response({"error": {"message": "slow"}}, status=429, headers={"Retry-After": "0.2"})
            if fault == "500":
                return web.Response(status=500, text="<html>broken</html>")
            if fault == "timeout":
                await asyncio.sleep(mock.timeout_s)
                return web.Response(status=504)
            if fault == "cut":
                request.transport.close()
                return web.Response()
            if fault == "forbidden":
                return web.json_response(ERROR, status=403)
            if fault == "page":
                return web.Response(text="<html>\x1b[31mLog in</html>", content_type="text/html")
            if fault == "no_json":
                return web.Response(body=b'{"id": "c", \xff\xfe', content_type="application/json")
            if fault == "drip":
                response = web.StreamResponse(headers={"Content-Type": "application/json"})
                await response.prepare(request)
                with suppress(ConnectionError):
                    for _ in range(400):
                        await response.write(b" ")
                        await asyncio.sleep(0.2)
                return response
            value = payload(provider, body, fault)
            if fault not in UNANSWERED:
                mock.note(text)
                mock.charge(value, is_batch=False)
            return web.Response(text=encode(value), content_type="application/json")

        return handle

    async def show_most(_: web.Request) -> web.Response:
        return web.Response(text=str(mock.most_under_way))

    app = web.Application(client_max_size=1 << 28)
    app.router.add_get("/most_under_way", show_most)
    app.router.add_post("/v1/messages", handler("anthropic"))
    app.router.add_post("/v1/chat/completions", handler("openai"))
    app.router.add_get("/stats", lambda _: _stats(mock))
    add_batches(app, mock)
    return app


async def _stats(mock: Mock) -> web.Response:
    return web.json_response({"requests": sum(mock.seen.values()), "downloads": mock.downloads})


def add_batches(app: web.Application, mock: Mock) -> None:
    """Batches that have ended when they are looked at for the second time."""

    def look(batch_id: str) -> dict[str, Any]:
        if (batch := mock.batches.get(batch_id)) is None:
            raise web.HTTPNotFound
        batch["looks"] += 1
        return batch

    def results(batch: dict[str, Any], provider: str) -> list[tuple[str, Any]]:
        if "results" in batch:
            return batch["results"]
        found = batch["results"] = []
        for name, body in batch["requests"]:
            fault = mock.fault(text_of(body))
            is_failed = fault in UNANSWERED and fault not in ("error_body", "list", "deep")
            value = None if is_failed else payload(provider, body, fault)
            found.append((name, value))
            if fault not in UNANSWERED:
                mock.note(text_of(body))
                mock.charge(value, is_batch=True)
        return found

    async def create_anthropic(request: web.Request) -> web.Response:
        items = (await request.json())["requests"]
        batch_id = f"b{len(mock.batches)}"
        requests = [(x["custom_id"], x["params"]) for x in items]
        mock.batches[batch_id] = {"provider": "anthropic", "looks": 0, "time": time.time(), "requests": requests}
        return web.json_response(anthropic_batch(batch_id, "in_progress"))

    def anthropic_batch(batch_id: str, status: str) -> dict[str, Any]:
        counts = dict.fromkeys(("processing", "succeeded", "errored", "canceled", "expired"), 0)
        counts["processing" if status == "in_progress" else "succeeded"] = len(mock.batches[batch_id]["requests"])
        created = datetime.fromtimestamp(mock.batches[batch_id]["time"], UTC).isoformat()
        times = {"created_at": created, "expires_at": "2100-01-01T00:00:00Z"}
        return {"id": batch_id, "type": "message_batch", "processing_status": status, "request_counts": counts} | times

    async def get_anthropic(request: web.Request) -> web.Response:
        batch_id = request.match_info["id"]
        status = "ended" if look(batch_id)["looks"] > 1 else "in_progress"
        url = f"{request.url.origin()}/v1/messages/batches/{batch_id}/results"
        return web.json_response(anthropic_batch(batch_id, status) | {"results_url": url})

    async def get_results(request: web.Request) -> web.Response:
        lines = []
        for name, message in results(mock.batches[request.match_info["id"]], "anthropic"):
            result = {"type": "succeeded", "message": message}
            if message is None:
                error = {"type": "error", "error": {"type": "api_error", "message": "down"}}
                result = {"type": "errored", "error": error}
            lines.append(json.dumps({"custom_id": name, "result": result}, ensure_ascii="\\ud" in json.dumps(result)))
        mock.downloads += 1
        return web.Response(text="\n".join(lines))

    async def create_file(request: web.Request) -> web.Response:
        data = await request.post()
        file_id = f"f{len(mock.files)}"
        mock.files[file_id] = data["file"].file.read().decode()
        return web.json_response(
            {"id": file_id, "object": "file", "bytes": 1, "created_at": 0, "filename": "x", "purpose": "batch"}
            | {"status": "processed"}
        )

    async def create_openai(request: web.Request) -> web.Response:
        asked = await request.json()
        items = [json.loads(line) for line in mock.files[asked["input_file_id"]].splitlines()]
        batch_id = f"b{len(mock.batches)}"
        requests = [(x["custom_id"], x["body"]) for x in items]
        mock.batches[batch_id] = {"provider": "openai", "looks": 0, "time": time.time(), "requests": requests}
        mock.batches[batch_id]["metadata"] = asked.get("metadata")
        return web.json_response(openai_batch(batch_id, "in_progress"))

    def openai_batch(batch_id: str, status: str) -> dict[str, Any]:
        return {
            "id": batch_id,
            "object": "batch",
            "endpoint": "/v1/chat/completions",
            "input_file_id": "f",
            "completion_window": "24h",
            "created_at": int(mock.batches[batch_id]["time"]),
            "status": status,
            "metadata": mock.batches[batch_id]["metadata"],
        }

    def newest(provider: str) -> list[str]:
        return [name for name, batch in reversed(mock.batches.items()) if batch["provider"] == provider]

    async def list_anthropic(request: web.Request) -> web.Response:
        statuses = {name: "ended" if look(name)["looks"] > 1 else "in_progress" for name in newest("anthropic")}
        data = [anthropic_batch(name, status) for name, status in statuses.items()]
        return web.json_response({"data": data, "has_more": False, "first_id": None, "last_id": None})

    async def list_openai(request: web.Request) -> web.Response:
        data = [openai_batch(name, "in_progress") for name in newest("openai")]
        return web.json_response({"object": "list", "data": data, "has_more": False})

    async def get_openai(request: web.Request) -> web.Response:
        batch_id = request.match_info["id"]
        if look(batch_id)["looks"] < 2:
            return web.json_response(openai_batch(batch_id, "in_progress"))
        lines = []
        for name, message in results(mock.batches[batch_id], "openai"):
            response = {"status_code": 200 if message else 500, "body": message or {}}
            line = {"custom_id": name, "response": response, "error": None}
            lines.append(json.dumps(line, ensure_ascii="\\ud" in json.dumps(line)))
        mock.files[f"out-{batch_id}"] = "\n".join(lines)
        return web.json_response(openai_batch(batch_id, "completed") | {"output_file_id": f"out-{batch_id}"})

    async def get_file(request: web.Request) -> web.Response:
        mock.downloads += 1
        return web.Response(text=mock.files[request.match_info["id"]])

    app.router.add_post("/v1/messages/batches", create_anthropic)
    app.router.add_get("/v1/messages/batches", list_anthropic)
    app.router.add_get("/v1/batches", list_openai)
    app.router.add_get("/v1/messages/batches/{id}", get_anthropic)
    app.router.add_get("/v1/messages/batches/{id}/results", get_results)
    app.router.add_post("/v1/files", create_file)
    app.router.add_get("/v1/files/{id}/content", get_file)
    app.router.add_post("/v1/batches", create_openai)
    app.router.add_get("/v1/batches/{id}", get_openai)


async def serve(mock: Mock, port: int) -> None:
    """Serve until the process ends."""
    runner = web.AppRunner(create_app(mock), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port, backlog=1024)
    await site.start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency_s", type=float, default=0.0)
    parser.add_argument("--faults", type=float, default=0.0)
    every = (*FAULTS, *UNANSWERED[4:], *HOSTILE)
    parser.add_argument(
        "--kinds", type=lambda text: every if text == "every" else tuple(text.split(",")), default=FAULTS
    )
    parser.add_argument("--timeout_s", type=float, default=5.0)
    parser.add_argument("--calls", type=Path)
    parser.add_argument("--bill", type=Path)
    parser.add_argument("--credit", type=int)
    options = vars(parser.parse_args())
    port = options.pop("port")
    asyncio.run(serve(Mock(**options), port))


if __name__ == "__main__":
    main()

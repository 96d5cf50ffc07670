"""Replies as servers and models write them: garbled messages, drafts in reasoning, objects that are no strict JSON."""

import asyncio
import json
import random
import time
from typing import Any

import pytest

from data_gen.curate.validation import read_choice_index
from data_gen.questions.prompts import ReplyFault, parse_reply
from spatialthinker.clients.keys import find_key, read_env_file
from spatialthinker.clients.model_api import (
    Api,
    ApiRequest,
    ApiStop,
    OutageFault,
    RequestFault,
    is_account_fault,
    within,
)
from spatialthinker.clients.prices import Usage
from spatialthinker.clients.providers import APIS
from spatialthinker.clients.replies import Reply, ReplyError, batch_lines, find_object, load_payload
from spatialthinker.plain_text import from_cell, printable, to_cell, whole_characters
from tests.support.fuzz_readers import VALUES

TEXT = json.dumps(VALUES)
DRAFT = json.dumps(VALUES | {"question": "A draft?"})


@pytest.mark.parametrize(
    "text",
    [
        f"<think>{DRAFT}</think>{TEXT}",
        f"<thinking>\n{DRAFT}\n</thinking>\n```json\n{TEXT}\n```",
        f"{DRAFT}</think>{TEXT}",
        f"First {DRAFT}. Better: {TEXT} Done {{so}}.",
        f"{TEXT}<think>but {DRAFT}",
        TEXT.replace("]", ",]").replace("}", ", }"),
        str(VALUES),
        str(VALUES).replace('"Where is the man\'s hat?"', "'Where is the man's hat?'"),
        TEXT.replace('"question"', "question").replace('"rating"', "// how good\nrating /* 1-10 */"),
        TEXT.replace("{", "{ \u2028", 1) + "\x85\u2029",
        json.dumps({"name": "answer", "arguments": VALUES}),
        json.dumps({"name": "answer", "arguments": TEXT}),
        f"<tool_call>\n{json.dumps({'name': 'answer', 'arguments': VALUES})}\n</tool_call>",
        json.dumps([VALUES]),
        json.dumps({name.title(): value for name, value in VALUES.items()}),
        TEXT.replace("Where", "Wh\0ere\x1b[31m"),
        TEXT.replace("Where is", "Where\\nis"),
        json.dumps(VALUES | {"options": {"A": "on", "B": "in"}}),
        json.dumps(VALUES | {"options": '["on", "in"]', "rating": "7/10"}),
        '{"a":' * 2000 + "\n" + TEXT,
        TEXT[:-1] + ', "note": "\\ud800"}',
    ],
)
def test_a_usable_reply_is_read_whatever_its_form(text):
    draft = parse_reply(text)
    assert draft.question == VALUES["question"] and draft.options == ("on", "in") and draft.answer == "in"
    assert draft.rating == 7 and draft.relations[0].predicate == "in"


@pytest.mark.parametrize("name", [name for name in VALUES if name not in ("rating", "evidence_relations")])
@pytest.mark.parametrize("value", [None, {}, [None], [[]], True, {"a": 1}])
def test_no_text_is_made_of_what_is_none(name, value):
    with pytest.raises(ReplyFault):
        parse_reply(json.dumps(VALUES | {name: value}))


@pytest.mark.parametrize("relations", [[None], ["a on b"], [{"subject": None, "predicate": "on", "object": "b.1"}], 3])
def test_a_relation_that_is_none_is_a_fault(relations):
    with pytest.raises(ReplyFault):
        parse_reply(json.dumps(VALUES | {"evidence_relations": relations}))


@pytest.mark.parametrize("text", ["", "{", f"<think>{TEXT}", TEXT[:-9], "[" * 9999, '{"question":' * 9999, "'" * 9000])
def test_a_reply_without_an_object_is_a_fault(text):
    with pytest.raises(ReplyFault, match="holds no JSON object with a question"):
        parse_reply(text)


def test_a_vote_is_read_as_a_reply_is():
    options = ("on", "none", "behind")
    texts = {
        '<think>{"answer": "A"}</think>{"answer": "C"}': 2,
        "{'answer': 'C',}": 2,
        '{"answer": null}': None,
        '{"answer": ["C"]}': None,
        '{"answer": ' + "9" * 5000 + "}": None,
        "<think>A or B?</think> C": 2,
        '{"answer": {"letter": "C"}}': None,
        "[" * 5000: None,
    }
    assert {text: read_choice_index(text, options) for text in texts} == texts


@pytest.fixture(params=APIS)
def api(request, monkeypatch) -> Api:
    monkeypatch.setattr("spatialthinker.clients.model_api._FIRST_WAIT_S", 0.001)
    return APIS[request.param]({"anthropic": "claude-sonnet-4-5", "openai": "gpt-4o"}[request.param], "http://[::1]:9")


def message(api: Api, text: Any) -> dict[str, Any]:
    if api.KEYS[0].startswith("OPENAI"):
        return {"choices": [{"message": {"content": text}}], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}
    return {"content": text, "usage": {"input_tokens": 9, "output_tokens": 2}}


@pytest.mark.parametrize("content", ["a\nb", [{"type": "text", "text": "a"}, {"text": "b"}, None], ["a", "b", 3]])
def test_content_is_a_text_or_parts(api, content):
    reply = api.read(message(api, content))
    assert reply.text == "a\nb" and reply.usage == Usage(9, 2) and not reply.fault


@pytest.mark.parametrize(
    "usage", [None, [], "many", {"input_tokens": None, "prompt_tokens": None}, {"input_tokens": -1}]
)
@pytest.mark.parametrize("count", [True, "7", float("nan"), 1e300, -3, [1], None])
def test_a_usage_that_says_nothing_counts_nothing(api, usage, count):
    names = ("input_tokens", "prompt_tokens", "output_tokens", "cache_read_input_tokens")
    for value in (usage, dict.fromkeys(names, count)):
        reply = api.read(message(api, "a") | {"usage": value})
        assert reply.usage == Usage() and reply.cost_usd == 0
    whole = message(api, "a")
    del whole["usage"]
    assert api.read(whole).usage == Usage()


@pytest.mark.parametrize("value", [None, [], {}, 3, False])
def test_a_reply_without_a_message_says_so_and_keeps_its_cost(api, value):
    key = "choices" if api.KEYS[0].startswith("OPENAI") else "content"
    reply = api.read(message(api, "a") | {key: value})
    assert reply.text == "" and reply.fault and reply.cost_usd > 0


@pytest.mark.parametrize(
    "data",
    [b"", b"<html>", b"[]", b"null", b'"x"', b'{"error": {"message": "x"}}', b'{"type": "error"}', b"\xff\xfe{}"]
    + [b'{"choices": [{"error": {"code": 502}}]}', b"[" * 5000 + b"]" * 5000, b'{"n": ' + b"9" * 5000 + b"}"],
)
def test_a_success_that_is_none_is_a_fault_to_retry(api, data):
    with pytest.raises(ReplyError, match="status 200"):
        load_payload(data)
    with pytest.raises(ReplyError, match="status 200 with no message"):
        api.read(load_payload(b'\xef\xbb\xbf{"detail": "x"}'))


class Refusal(Exception):
    body = None

    def __init__(self, status_code: int | None, text: str) -> None:
        super().__init__(text)
        self.status_code = status_code


async def ask(api: Api, monkeypatch, *answers: Any) -> Reply:
    """The reply where the provider answers so, one after the other, and the last again and again."""
    waiting = list(answers)

    async def send(body: Any) -> Any:
        answer = waiting.pop(0) if len(waiting) > 1 else waiting[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(api, "_send", send)
    monkeypatch.setattr(api, "_retryable", lambda: (Refusal,))
    return await api.ask(ApiRequest("x"))


@pytest.mark.parametrize(
    "status, text",
    [(403, "blocked"), (404, "no route"), (405, "no such method"), (400, "bad image"), (413, "too large")],
)
def test_a_refusal_of_one_item_is_that_item_s_fault(api, monkeypatch, status, text):
    async def run() -> None:
        assert (await ask(api, monkeypatch, message(api, "a"))).text == "a"
        with pytest.raises(RequestFault, match=text):
            await ask(api, monkeypatch, Refusal(status, text))
        assert (await ask(api, monkeypatch, Refusal(403, "once"), ReplyError("page"), message(api, "b"))).text == "b"

    asyncio.run(run())


@pytest.mark.parametrize("status", [403, 404, 405])
def test_a_refusal_before_any_answer_condemns_no_item(api, monkeypatch, status):
    with pytest.raises(OutageFault, match="blocked"):
        asyncio.run(ask(api, monkeypatch, Refusal(status, "blocked")))


@pytest.mark.parametrize(
    "status, text",
    [(401, "x"), (402, "x"), (407, "x"), (403, "billing hard limit"), (404, "The model `x` does not exist")]
    + [(400, "Your credit balance is too low"), (429, "insufficient_quota"), (None, "invalid_api_key")],
)
def test_the_account_s_own_fault_ends_the_run(api, monkeypatch, status, text):
    with pytest.raises(ApiStop):
        asyncio.run(ask(api, monkeypatch, ReplyError(text) if status is None else Refusal(status, text)))


@pytest.mark.parametrize(
    "text", ["the picture is too large", "no route", "slow down", "overloaded", "blocked by a rule"]
)
def test_other_faults_are_not_the_account_s(text):
    assert not is_account_fault(text)


def test_a_request_has_a_limit_as_a_whole(api, monkeypatch):
    monkeypatch.setattr("spatialthinker.clients.model_api.REQUEST_S", 0.01)
    monkeypatch.setattr("spatialthinker.clients.model_api.MAX_TRIES", 2)

    async def drip(body: Any) -> Any:
        while True:
            await asyncio.sleep(0.001)

    monkeypatch.setattr(api, "_send", drip)
    with pytest.raises(OutageFault, match="after 2 tries; last: TimeoutError: no end of the answer in time"):
        asyncio.run(api.ask(ApiRequest("x")))
    assert api.num_given_up == 2


@pytest.mark.parametrize("num_turns", [1, 5, 12])
def test_an_answer_that_came_while_the_process_was_stopped_is_kept(num_turns):
    async def answer() -> str:
        await asyncio.sleep(0.01)
        for _ in range(num_turns):
            await asyncio.sleep(0)
        return "an answer"

    async def go() -> str:
        asyncio.get_running_loop().call_soon(time.sleep, 0.5)
        return await within(0.2, answer())

    assert asyncio.run(go()) == "an answer"


def test_a_limit_ends_the_call_and_a_fault_of_the_call_is_its_own():
    ended = []

    async def call(fault: Exception | None) -> None:
        try:
            if fault is not None:
                raise fault
            await asyncio.sleep(60)
        finally:
            ended.append(fault)

    with pytest.raises(TimeoutError):
        asyncio.run(within(0.02, call(None)))
    with pytest.raises(ReplyError, match="odd"):
        asyncio.run(within(60, call(ReplyError("odd"))))
    assert len(ended) == 2

    async def leave() -> None:
        task = asyncio.create_task(within(60, call(None)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    assert len(ended) == 3


def lost(cause: str) -> Exception:
    error = type("APIConnectionError", (Refusal,), {})(None, "Connection error.")
    error.__cause__ = type(cause, (Exception,), {})()
    return error


@pytest.mark.parametrize(
    ("error", "is_given_up"),
    [
        (lost("ReadError"), True),
        (lost("ReadTimeout"), True),
        (lost("RemoteProtocolError"), True),
        (lost("ConnectError"), False),
        (lost("PoolTimeout"), False),
        (TimeoutError(), True),
        (ReplyError("status 200, but no JSON"), False),
    ],
)
def test_requests_whose_answer_may_be_billed_and_never_came_are_told(api, monkeypatch, capsys, error, is_given_up):
    monkeypatch.setattr("spatialthinker.clients.model_api.MAX_TRIES", 1)
    with pytest.raises(OutageFault):
        asyncio.run(ask(api, monkeypatch, error))
    asyncio.run(api.close())
    assert ("1 requests ended without an answer" in capsys.readouterr().err) == is_given_up


def test_a_server_s_text_is_shown_without_signs_and_keys(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789abcdef")
    api = APIS["openai"]("gpt-4o")
    text = "bad\x1b[2J\x1b]0;title\x07 key sk-0123456789abcdef\r\nis\u202e wrong \x9b31m\ud800"
    assert api.clean(text) == "bad key [key] is wrong 31m\ufffd"
    with pytest.raises(ApiStop) as caught:
        api._judge(Refusal(401, text), 0.0)
    assert "sk-0123" not in str(caught.value) and "\x1b" not in str(caught.value)


def test_lines_of_a_batch_stand_alone():
    lines = [b'{"custom_id": "a", "x": "\xe2\x80\xa8\xc2\x85"}', b'{"custom_id": "b", "x": ', b"[1]", b"", b"\xff"]
    lines += [b'{"custom_id": "c", "x": "\xff"}\r', b'{"custom_id": ["d"]}', b'{"custom_id": "e", "n": ' + b"9" * 5000]
    found = dict(batch_lines(b"\n".join(lines)))
    assert list(found) == ["a", "b", "c", "e"] and found["a"] == {"custom_id": "a", "x": "\u2028\x85"}
    assert found["b"] is found["e"] is None


def test_cells_that_a_spreadsheet_would_run_are_marked_and_read_back():
    marked = {
        "=1+1": "'=1+1",
        "+cmd|x": "'+cmd|x",
        "-2+3": "'-2+3",
        "@SUM(A1)": "'@SUM(A1)",
        "\tx": "'\tx",
        "'=x": "''=x",
    }
    plain = ["-3", "+4.5", "a=b", "'quoted'", "", "é", "(A) -", "3-4"]
    for text, cell in (marked | {text: text for text in plain}).items():
        assert to_cell(text) == cell and from_cell(cell) == text


def test_halves_of_surrogates_are_replaced_and_whole_ones_joined():
    assert whole_characters("a\ud800b\ud83d\ude00\0") == "a\ufffdb\U0001f600"
    assert printable(" a\x00\x1b[1mb\u202e\n c\t") == "ab c"


def test_keys_come_from_the_environment_or_a_file(tmp_path, monkeypatch):
    path = tmp_path / ".env"
    path.write_text("# keys\nexport A_KEY=\"one two\"\nB_KEY=three # four\n\nC_KEY=\nD_KEY = '#5'\nE_KEY=six\n")
    monkeypatch.setenv("E_KEY", "set")
    for name in "ABCD":
        monkeypatch.delenv(f"{name}_KEY", raising=False)
    read_env_file(path)
    found = [find_key([f"{name}_KEY"], None) for name in "ABCDE"]
    for name in "ABCD":
        monkeypatch.delenv(f"{name}_KEY", raising=False)
    assert found == ["one two", "three", None, "#5", "set"] and find_key(["C_KEY"], "http://x") == "none"
    read_env_file(tmp_path / "none")
    path.write_text("A_KEY=1\nsk-secret\n")
    with pytest.raises(ValueError, match=r"\.env, line 2: write NAME=VALUE$"):
        read_env_file(path)


CORPUS = [TEXT, str(VALUES), f"<think>{DRAFT}</think>{TEXT}", '{"answer": "B"}', "[" * 3000, '{"a":{"question":']


@pytest.mark.parametrize("seed", range(5))
def test_mutated_replies_raise_nothing_else(seed):
    rng = random.Random(seed)
    signs = "{}[]:,\"'\\/*<>\0\ud800\u2028 \n9.-eé" + "ntfu"
    for _ in range(300):
        text = list(rng.choice(CORPUS))
        for _ in range(rng.randint(1, 12)):
            place = rng.randrange(len(text))
            text[place : place + rng.choice((0, 0, 1, 5))] = rng.choice(signs) * rng.choice((1, 1, 2, 40))
        found = find_object("".join(text), "question")
        assert found is None or "question" in found
        read_choice_index("".join(text), ("on", "in"))
        try:
            parse_reply("".join(text))
        except ReplyFault:
            pass

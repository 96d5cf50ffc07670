"""A second opinion: a model reads the answers that the rules could not, apart from strict and released scoring.

It sees the question and the model's text, never the image or the right answer; the same rules read its reply.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from evaluation.benchmarks.samples import Sample
from evaluation.journal import Record
from evaluation.scoring.strict import PARSE_FAILURES
from spatialthinker.clients.model_api import ApiRequest, OutageFault, RequestFault
from spatialthinker.clients.providers import APIS
from spatialthinker.storage.journal import Journal, JournalFault, Line

MAX_REPLY_TOKENS = 32
MAX_TEXT_CHARS = 6_000
"""Longer texts are shown by their end, where answers stand."""
_PROMPT = """\
Below are a question and somebody's reply to it. Report the final answer that the reply commits to; do not answer the \
question yourself. If the reply commits to no single answer, report NONE. Report {form} and nothing else.

<question>
{question}
</question>
<reply>
{reply}
</reply>"""

Ask = Callable[[str], Awaitable[tuple[str, float]]]
"""From a prompt to the reply and its cost in dollars."""


class _Opinion(Struct):
    """Keys of a line of the journal."""

    key: str
    reply: str
    cost_usd: float


def check_reply(path: Path, line: Line) -> Line:
    """The line of a journal; JournalFault where it holds no reply."""
    try:
        msgspec.convert(line, _Opinion)
    except msgspec.ValidationError as error:
        raise JournalFault(f"{path}: {str(line)[:80]} is no reply ({error}); remove that line") from None
    return line


def write_prompt(sample: Sample, record: Record) -> str:
    """Return what the extractor is asked about one answer."""
    form = "the letter of the option" if sample.reference.letter else "the answer alone"
    return _PROMPT.format(form=form, question=sample.question, reply=record.reasoning[-MAX_TEXT_CHARS:])


class Extractor:
    """A model named as "openai:NAME", "anthropic:NAME", or a local folder or hub name."""

    def __init__(self, name: str, base_url: str | None, concurrency: int) -> None:
        self.name = name
        provider, _, model = name.partition(":")
        self._connect = partial(APIS[provider], model, base_url, concurrency) if provider in APIS and model else None
        self._api = self._connect() if self._connect else None  # a missing key is said at once
        self._concurrency = concurrency if self._api else 1
        self._generate: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_stopped = False

    def stop(self) -> None:
        """Ask nothing more; what is under way is waited for."""
        self._is_stopped = True
        if self._loop is not None and self._api is not None:
            self._loop.call_soon_threadsafe(self._api.stop)

    async def _ask(self, prompt: str) -> tuple[str, float]:
        if self._api is not None:
            reply = await self._api.ask(ApiRequest(prompt, max_tokens=MAX_REPLY_TOKENS, temperature=0.0))
            return reply.text, reply.cost_usd
        if self._generate is None:
            from transformers import pipeline

            self._generate = pipeline("text-generation", model=self.name)
        chat = [{"role": "user", "content": prompt}]
        made = self._generate(chat, max_new_tokens=MAX_REPLY_TOKENS, do_sample=False, return_full_text=False)
        return made[0]["generated_text"], 0.0

    def read(self, items: Sequence[tuple[Sample, Record]], path: Path) -> dict[str, Any]:
        """Return the facts for a summary; every reply is in the journal at `path` at once and is asked once.

        An item whose request failed stays unread. Errors: ApiStop when going on makes no sense.
        """
        unread = [
            (sample, record) for sample, record in items if record.kind in PARSE_FAILURES and not record.correct_strict
        ]
        with asyncio.Runner() as runner:
            self._loop = runner.get_loop()
            self._api = self._connect() if self._connect else None  # a client keeps to one loop
            replies = runner.run(self._ask_all(unread, path))
            self._loop = None
        marks = {
            sample.id: int(sample.grade(replies[sample.id]["reply"]).is_correct)
            for sample, _ in unread
            if sample.id in replies
        }
        return {
            "model": self.name,
            "unread": len(unread),
            "asked": len(marks),
            "cost_usd": round(sum(replies[name]["cost_usd"] for name in marks), 6),
            "correct": {record.id: marks.get(record.id, record.correct_strict) for _, record in items},
        }

    async def _ask_all(self, items: Sequence[tuple[Sample, Record]], path: Path) -> Mapping[str, dict[str, Any]]:
        replies: dict[str, dict[str, Any]] = {}
        journal = Journal(path)
        journal.open()
        try:
            differences, lines = journal.begin({"extractor": self.name})
            if differences:
                raise ValueError(f"{path}: made with another extractor ({differences[0]}); choose another name")
            replies |= {line["key"]: line for line in map(partial(check_reply, path), lines)}
            room = asyncio.Semaphore(self._concurrency)

            async def ask(sample: Sample, record: Record) -> None:
                prompt = write_prompt(sample, record)
                key = json.dumps([sample.id, prompt])
                if key not in replies:
                    async with room:
                        if self._is_stopped:
                            return
                        try:
                            reply, cost = await self._ask(prompt)
                        except (RequestFault, OutageFault):
                            return
                    line = {"key": key, "reply": reply, "cost_usd": cost}
                    journal.append(line)
                    replies[key] = line
                replies[sample.id] = replies[key]

            results = await asyncio.gather(*(ask(*item) for item in items), return_exceptions=True)
            if fault := next((result for result in results if isinstance(result, BaseException)), None):
                raise fault
        finally:
            journal.close()
            if self._api is not None:
                await self._api.close()
        return replies

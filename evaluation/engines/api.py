"""API models as back ends: concurrent requests, or batches that later runs collect.

A fault of one request is that item's error. A fault of the account, or the same fault many times in a row, ends the
run with the provider's message; all answers so far are in the journal.
"""

import asyncio
import json
import secrets
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from evaluation.benchmarks.samples import Sample, build_request
from evaluation.engines.local import Answer, ModelOptions, item_error
from evaluation.engines.stopping import BatchPending
from spatialthinker.clients.model_api import Api, ApiRequest, ApiStop, OutageFault, Reply, RequestFault
from spatialthinker.clients.providers import APIS
from spatialthinker.prompts import IMAGE_MARK
from spatialthinker.storage.files import write_json

MAX_SAME_ERRORS = 10
"""Consecutive errors of one kind that end the run."""

_GO_ON = "The beginning of your reply is given. Repeat it word for word and go on from there:"
"""Request for a reply with a given beginning: not every API takes a part of the model's own turn."""

MAX_BATCH_BYTES = 90_000_000
MAX_BATCH_ITEMS = 10_000
"""Below what both providers accept: 200 MB and 50,000 requests, 256 MB and 100,000."""


def make_request(sample: Sample, options: ModelOptions) -> tuple[str, ApiRequest]:
    """Return the prompt and what is sent: images first, then the text without their marks.

    Errors: ValueError if an image cannot be read; a question is never sent without its image.
    """
    request = build_request(sample, options.template)
    text = request.prompt.replace(IMAGE_MARK, "").strip()
    if request.prefix:
        text = f"{text}\n\n{_GO_ON}\n{request.prefix}"
    images = tuple(request.encoded)  # made upright and small enough where they are sent
    return request.prompt, ApiRequest(text, images, max_tokens=options.max_tokens, temperature=options.temperature)


def read_reply(prompt: str, reply: Reply, seconds: float = 0.0) -> Answer:
    """Return the answer in a reply; a refusal is an answer too, a wrong one. A batch's answers take no time."""
    used = reply.usage
    return Answer(
        prompt=prompt,
        text=reply.text,
        finish_reason="length" if reply.stop == "length" else "stop",
        prompt_tokens=used.input + used.cache_read + used.cache_write,
        response_tokens=used.output,
        cost_usd=reply.cost_usd,
        seconds=seconds,
        error=reply.fault or None,
    )


class ApiBackend:
    """One provider with at most `options.concurrency` requests in flight."""

    provider: str

    def __init__(self, options: ModelOptions) -> None:
        self.options = options
        self._connect = partial(APIS[self.provider], options.model_path, options.base_url, options.concurrency)
        self.api: Api = self._connect()  # a missing key is said at once
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_stopped = False
        self.batch_file = options.batch_file

    def stop(self) -> None:
        """End retries; requests under way are waited for."""
        self._is_stopped = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.api.stop)

    def answer(self, samples: Iterable[Sample]) -> Iterator[tuple[Sample, Answer]]:
        """Yield answers as they come.

        Errors: ApiStop when going on makes no sense, BatchPending when a batch is not done.
        """
        with asyncio.Runner() as runner:
            self._loop = runner.get_loop()
            self.api = self._connect()  # a client keeps to one loop, and a run has one for each data set
            try:
                if self.batch_file is not None:
                    yield from self._use_batches(runner, list(samples), Path(self.batch_file))
                else:
                    yield from self._ask_all(runner, iter(samples))
            except OutageFault as error:  # of a batch: an item's own is its answer
                raise ApiStop(f"{error}. Nothing is lost: the same command goes on") from error
            finally:
                self._loop = None
                runner.run(self.api.close())

    def _ask_all(self, runner: asyncio.Runner, waiting: Iterator[Sample]) -> Iterator[tuple[Sample, Answer]]:
        tasks: set[asyncio.Task[tuple[Sample, Answer]]] = set()
        last_error, repeats = "", 0

        async def step() -> set[asyncio.Task[tuple[Sample, Answer]]]:
            while len(tasks) < self.options.concurrency and (sample := next(waiting, None)) is not None:
                tasks.add(asyncio.create_task(self._ask(sample)))
            if not tasks:
                return set()
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return done

        async def finish() -> list[tuple[Sample, Answer]]:
            self.api.stop()  # ends retries; a request itself has a limit
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            return [pair for pair in ended if not isinstance(pair, BaseException) and pair[1].error is None]

        stop: ApiStop | None = None
        try:
            while stop is None and (done := runner.run(step())):
                tasks -= done
                for task in done:
                    if isinstance(fault := task.exception(), ApiStop):
                        stop = fault
                        continue
                    sample, answer = task.result()
                    if self._is_stopped and answer.error is not None:
                        continue  # not asked to its end
                    yield sample, answer
                    kind = (answer.error or "").split(":")[0]
                    repeats = repeats + 1 if kind and kind == last_error else int(bool(kind))
                    last_error = kind
                    if repeats >= MAX_SAME_ERRORS:
                        stop = ApiStop(f"{repeats} errors of one kind in a row, the last: {answer.error}")
            if stop is not None:
                yield from runner.run(finish())  # they are paid for
                raise stop
        finally:
            for task in tasks:
                task.cancel()

    async def _ask(self, sample: Sample) -> tuple[Sample, Answer]:
        start = time.monotonic()
        try:
            prompt, request = await asyncio.to_thread(make_request, sample, self.options)
            reply = await self.api.ask(request)
            return sample, read_reply(prompt, reply, time.monotonic() - start)
        except ApiStop:
            raise
        except (RequestFault, OutageFault) as error:
            return sample, Answer(error=f"{type(error).__name__}: item {sample.id}: {error}")
        except ValueError as error:  # an unreadable image, a template that cannot be filled
            return sample, item_error(sample, error)

    def _use_batches(
        self, runner: asyncio.Runner, samples: Sequence[Sample], state: Path
    ) -> Iterator[tuple[Sample, Answer]]:
        """Collect the batches that `state` names, then submit what is in none; both are written down at once."""
        batches = _read_batches(state)
        by_id = {sample.id: sample for sample in samples}
        self._find_lost(runner, batches, state)
        waiting = by_id.keys() - {item_id for batch in batches.values() for item_id in batch.items.values()}
        for token, batch in list(batches.items()):
            replies = self._collect(runner, batch, state)
            if replies is None:
                continue
            for name, item_id in batch.items.items():
                if item_id in by_id:  # else it is in the journal already
                    reply = replies.get(name, "not in the batch")
                    yield by_id[item_id], self._read_batched(by_id[item_id], reply)
            del batches[token]
            _write_batches(state, batches)
        bodies: dict[str, Any] = {}
        size = 0
        for item_id in sorted(waiting):
            try:
                body = self.api.body(make_request(by_id[item_id], self.options)[1])
            except ValueError as error:  # an unreadable image
                yield by_id[item_id], item_error(by_id[item_id], error)
                continue
            length = len(json.dumps(body))
            if self._is_stopped:
                return
            if bodies and (size + length > MAX_BATCH_BYTES or len(bodies) == MAX_BATCH_ITEMS):
                self._submit(runner, bodies, batches, state)
                bodies, size = {}, 0
            bodies[item_id] = body
            size += length
        if bodies:
            self._submit(runner, bodies, batches, state)
        if batches:
            count = sum(len(batch.items) for batch in batches.values())
            names = ", ".join(self.api.clean(batch.batch_id or "one that was cut off") for batch in batches.values())
            raise BatchPending(f"{count} items are submitted as {names}; run the same command later")
        state.unlink(missing_ok=True)

    def _find_lost(self, runner: asyncio.Runner, batches: "dict[str, _Batch]", state: Path) -> None:
        """Find out what became of the batches whose submission was cut off: they run, or never arrived."""
        for token, batch in list(batches.items()):
            if batch.batch_id is None:
                known = {other.batch_id for other in batches.values() if other.batch_id is not None}
                batch.batch_id = runner.run(self.api.find_batch(token, len(batch.items), batch.time_s, known))
                if batch.batch_id == "":
                    del batches[token]
                _write_batches(state, batches)

    def _collect(self, runner: asyncio.Runner, batch: "_Batch", state: Path) -> dict[str, Reply | str] | None:
        """The replies of a batch by name; None for one that has not ended or cannot be collected."""
        if batch.batch_id is None:
            return None
        try:
            return runner.run(self.api.collect_batch(batch.batch_id, state.with_suffix("")))
        except RequestFault as error:  # the others are collected all the same
            print(  # noqa: T201
                f"batch {self.api.clean(batch.batch_id)} cannot be collected ({error}); its {len(batch.items)} items "
                f"stay under way. If it is gone for good, take it out of {state}, and they are asked again",
                file=sys.stderr,
            )
            return None

    def _submit(
        self, runner: asyncio.Runner, bodies: dict[str, Any], batches: "dict[str, _Batch]", state: Path
    ) -> None:
        """Send a batch: its items are noted before, its id after; `_find_lost` mends a cut between the two."""
        token = secrets.token_hex(8)
        batch = _Batch({f"{token}-{number}": item_id for number, item_id in enumerate(bodies)}, time.time())
        batches[token] = batch
        _write_batches(state, batches)
        named = dict(zip(batch.items, bodies.values(), strict=True))
        batch.batch_id = runner.run(self.api.submit_batch(named, token))
        _write_batches(state, batches)

    def _read_batched(self, sample: Sample, reply: Reply | str) -> Answer:
        if isinstance(reply, str):
            return Answer(error=f"item {sample.id}: {reply}")
        try:
            prompt = build_request(sample, self.options.template).prompt
        except ValueError:  # its image is gone by now: the answer is paid for
            prompt = ""
        return read_reply(prompt, reply)


class _Batch(Struct):
    """Questions that are submitted together."""

    items: dict[str, str]
    """Ids by the names of the requests, which start with the batch's token."""
    time_s: float
    batch_id: str | None = None
    """The provider's; None where the run was cut off before it could be noted."""


def _read_batches(state: Path) -> dict[str, _Batch]:
    """Return the submitted batches by token. Errors: ApiStop for a file that does not say them."""
    if not state.is_file():
        return {}
    try:
        found = msgspec.json.decode(state.read_bytes(), type=dict[str, _Batch | list[str]])
    except (msgspec.DecodeError, RecursionError) as error:
        raise ApiStop(f'{state}: damaged ({error}); it names the batches as {{"BATCH": ["ITEM", ...], ...}}') from None
    listed = {
        name: _Batch({item: item for item in batch}, 0.0, name)
        for name, batch in found.items()
        if isinstance(batch, list)
    }
    return {name: batch for name, batch in found.items() if isinstance(batch, _Batch)} | listed


def _write_batches(state: Path, batches: dict[str, _Batch]) -> None:
    write_json(state, msgspec.to_builtins(batches))


class OpenAiBackend(ApiBackend):
    """Chat completions of OpenAI or of a compatible server."""

    provider = "openai"


class AnthropicBackend(ApiBackend):
    """Anthropic's messages."""

    provider = "anthropic"

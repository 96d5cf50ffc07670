"""Models behind an API, as back ends: many questions at once, or one batch that is fetched by a later run.

Faults of one item are that item's error; what is wrong with the account, or the same fault many times in a row, ends
the run with the provider's message. Everything answered before is in the journal.
"""

import asyncio
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from evaluation.backends import Answer, ModelOptions
from evaluation.samples import IMAGE_MARK, Sample, build_request
from spatialthinker.model_api import Api, ApiRequest, ApiStop, OutageFault, Reply, RequestFault
from spatialthinker.providers import APIS

MAX_SAME_ERRORS = 10
"""So many errors of one kind in a row end the run."""


class BatchPending(Exception):
    """A batch was submitted or is still being worked on; the message says what to do."""


def make_request(sample: Sample, options: ModelOptions) -> tuple[str, ApiRequest]:
    """Return the prompt and what is sent: images first, then the text without their marks.

    Errors: ValueError if an image cannot be read; a question is never sent without its image.
    """
    request = build_request(sample, options.template)
    images = []
    for image in request.images:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        images.append(buffer.getvalue())
    text = request.prompt.replace(IMAGE_MARK, "").strip()
    return request.prompt, ApiRequest(
        text, tuple(images), max_tokens=options.max_tokens, temperature=options.temperature
    )


def read_reply(prompt: str, reply: Reply) -> Answer:
    """Return the answer in a reply; a refusal is an answer too, a wrong one."""
    used = reply.usage
    return Answer(
        prompt=prompt,
        text=reply.text,
        finish_reason="length" if reply.stop == "length" else "stop",
        prompt_tokens=used.input + used.cache_read + used.cache_write,
        response_tokens=used.output,
        cost_usd=reply.cost_usd,
    )


class ApiBackend:
    """One provider; `options.concurrency` questions are under way at a time."""

    provider: str

    def __init__(self, options: ModelOptions) -> None:
        self.options = options
        self.api: Api = APIS[self.provider](options.model_path, options.base_url, options.concurrency)

    def answer(self, samples: Iterable[Sample]) -> Iterator[tuple[Sample, Answer]]:
        """Yield answers as they come.

        Errors: ApiStop when going on makes no sense, BatchPending when a batch is not done.
        """
        with asyncio.Runner() as runner:
            try:
                if self.options.batch_file is not None:
                    yield from runner.run(self._collect(list(samples), Path(self.options.batch_file)))
                else:
                    yield from self._ask_all(runner, iter(samples))
            finally:
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

        async def stop() -> None:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        try:
            while done := runner.run(step()):
                tasks -= done
                for task in done:
                    sample, answer = task.result()
                    yield sample, answer
                    kind = (answer.error or "").split(":")[0]
                    repeats = repeats + 1 if kind and kind == last_error else int(bool(kind))
                    last_error = kind
                    if repeats >= MAX_SAME_ERRORS:
                        raise ApiStop(f"{repeats} errors of one kind in a row, the last: {answer.error}")
        finally:
            runner.run(stop())

    async def _ask(self, sample: Sample) -> tuple[Sample, Answer]:
        try:
            prompt, request = make_request(sample, self.options)
            return sample, read_reply(prompt, await self.api.ask(request))
        except ApiStop:
            raise
        except (RequestFault, OutageFault) as error:
            return sample, Answer(error=f"{type(error).__name__}: item {sample.id}: {error}")
        except ValueError as error:  # an unreadable image
            return sample, Answer(error=str(error))

    async def _collect(self, samples: list[Sample], state: Path) -> list[tuple[Sample, Answer]]:
        """The answers of the batch in `state`, or a new batch submitted."""
        prompts, bodies, faults = {}, {}, []
        for sample in samples:
            try:
                prompts[sample.id], request = make_request(sample, self.options)
                bodies[sample.id] = self.api.body(request)
            except ValueError as error:
                faults.append((sample, Answer(error=f"item {sample.id}: {error}")))
        if not state.is_file():
            batch = await self.api.submit_batch(bodies)
            state.parent.mkdir(parents=True, exist_ok=True)
            state.write_text(json.dumps({"batch": batch, "items": sorted(bodies)}))
            raise BatchPending(f"batch {batch} of {len(bodies)} items submitted; run the same command to collect it")
        batch = json.loads(state.read_text())["batch"]
        replies: dict[str, Any] | None = await self.api.collect_batch(batch)
        if replies is None:
            raise BatchPending(f"batch {batch} is not done yet; run the same command later")
        state.rename(state.with_suffix(".collected.json"))
        answers = []
        for sample in samples:
            reply = replies.get(sample.id)
            if isinstance(reply, Reply):
                answers.append((sample, read_reply(prompts[sample.id], reply)))
            elif sample.id in bodies:
                answers.append((sample, Answer(error=f"item {sample.id}: {reply or 'not in the batch'}")))
        return [*answers, *faults]


class OpenAiBackend(ApiBackend):
    """Chat completions of OpenAI or of any server that speaks them."""

    provider = "openai"


class AnthropicBackend(ApiBackend):
    """Anthropic's messages."""

    provider = "anthropic"

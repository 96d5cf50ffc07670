"""The stage validate_with_gpt4o: a vision model answers every question, and rows it disagrees with are left out.

An error is no disagreement: it is retried, stays open for the next run and never counts against a row.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_gen.arguments import read_bool, read_budget, read_choice, read_count
from data_gen.curate.export import export_parquet, find_images, image_source
from data_gen.curate.filters import record_key, record_line
from data_gen.curate.selection import digest, reorder
from data_gen.journal import ACCEPTED, FAILED, QUARANTINED, RESERVE_BYTES, SceneJournal, newest_lines
from data_gen.questions.prompts import object_schema
from data_gen.questions.records import Record, journal_of, read_records, write_csv
from data_gen.scenes.sources import Source
from spatialthinker.clients.model_api import Api, ApiRequest, OutageFault, Reply, RequestFault, merge_usage
from spatialthinker.clients.providers import APIS
from spatialthinker.clients.replies import find_object
from spatialthinker.response import extract_choice, find_answer
from spatialthinker.schema import LETTERS, parquet_path, question_with_options
from spatialthinker.storage.files import claim_output
from spatialthinker.storage.journal import Line

SYSTEM_PROMPT = """\
You get a picture and a multiple-choice question about it. Look closely and choose the one option that is true of the \
picture. If there is no picture, choose the option that you think most likely. Return the letter of your choice."""

SCHEMA = object_schema(answer={"type": "string", "enum": list(LETTERS)})
BLIND_MODES = ("off", "flag", "drop")
NUM_BLIND_VOTES = 2
"""Votes without the image that must all be right, options reshuffled in between: by chance 1 in 16 of four options."""

RELEASED_TRIES = 4
"""Two calls and, where both disagree, two more; the first agreement keeps the row."""


@dataclass(frozen=True)
class ValidationOptions:
    """Arguments of validate_with_gpt4o; see there."""

    input_file: Path
    output_file: Path
    source: str | None
    sample_limit: int | None
    provider: str
    model: str
    base_url: str | None
    concurrency: int
    votes: int | None
    blind: str
    seed: int
    max_cost_usd: float | None
    is_overwritten: bool

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> "ValidationOptions":
        """The checked arguments of validate_with_gpt4o by their names there. Raises ValueError for a wrong one."""
        read_count("save_every", given["save_every"])
        return cls(
            input_file=Path(given["input_file"]),
            output_file=Path(given["output_file"]),
            source=given["source"],
            sample_limit=read_count("sample_limit", given["sample_limit"]),
            provider=read_choice("provider", given["provider"], tuple(APIS)),
            model=str(given["model_name"]),
            base_url=given["base_url"],
            concurrency=read_count("concurrency", given["concurrency"]) or 1,
            votes=read_count("votes", given["votes"]),
            blind=read_choice("blind_control", given["blind_control"], BLIND_MODES),
            seed=read_count("seed", given["seed"], 0) or 0,
            max_cost_usd=read_budget(given["max_cost_usd"]),
            is_overwritten=read_bool("overwrite", given["overwrite"]),
        )

    def connect(self) -> Api:
        """The client of the provider. Raises ApiStop without a key, or without a price for the budget."""
        api = APIS[self.provider](self.model, self.base_url, self.concurrency)
        api.check_budget(self.max_cost_usd)
        return api

    def settings(self) -> dict[str, Any]:
        """Settings that must agree for two runs to share a journal."""
        names = ("source", "provider", "model", "votes", "blind", "seed")
        return {"stage": "validate", "input_file": str(self.input_file)} | {n: getattr(self, n) for n in names}


class Judge:
    """Validates records by a model's votes."""

    def __init__(self, api: Api, options: ValidationOptions) -> None:
        self.api, self.options = api, options

    async def judge(self, record: Record, image: bytes, index: int) -> Line:
        """The journal's line of a record."""
        replies: list[Reply] = []
        try:
            agreements = await self._look(record, image, replies)
            is_kept = any(agreements) if self.options.votes is None else 2 * sum(agreements) > len(agreements)
            line = record_line(record, index, ACCEPTED if is_kept else QUARANTINED, agreements=agreements)
            if not is_kept:
                line["reason"] = f"{self.options.model} agreed {sum(agreements)} times in {len(agreements)}"
            elif self.options.blind != "off":
                line["is_blind"] = await self._is_blind(record, replies)
                if line["is_blind"] and self.options.blind == "drop":
                    line |= {"status": QUARANTINED, "reason": "answered without the picture"}
        except (OutageFault, RequestFault, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and not replies:
                raise  # nothing is paid
            line = record_line(record, index, FAILED, reason=str(error) or "the run was stopped before an answer")
        return line | merge_usage(replies)

    async def _look(self, record: Record, image: bytes, replies: list[Reply]) -> list[bool]:
        agreements: list[bool] = []
        for vote in range(self.options.votes or RELEASED_TRIES):
            agreements.append(await self._agrees(record, image, vote, replies))
            if self.options.votes is None and agreements[-1]:
                break
        return agreements

    async def _is_blind(self, record: Record, replies: list[Reply]) -> bool:
        for vote in range(NUM_BLIND_VOTES):
            if not await self._agrees(record, None, vote, replies):
                return False
        return True

    async def _agrees(self, record: Record, image: bytes | None, vote: int, replies: list[Reply]) -> bool:
        turned = turn_options(record, vote, self.options.seed)
        text, images = question_with_options(turned.question, turned.options), () if image is None else (image,)
        reply = await self.api.ask(ApiRequest(text, images, SYSTEM_PROMPT, SCHEMA, max_tokens=100))
        replies.append(reply)
        if reply.fault:
            raise RequestFault(reply.fault)
        return read_choice_index(reply.text, turned.options) == turned.answer_index


def turn_options(record: Record, vote: int, seed: int) -> Record:
    """The record as a vote shows it: as it is at first, then with options in another order."""
    if vote == 0:
        return record
    start = int(digest(record, seed, "vote"), 16)
    return reorder(record, (start + vote) % len(record.options), seed + vote)


def read_choice_index(text: str, options: tuple[str, ...]) -> int | None:
    """The option that a reply names; None where it names none. "The answer is B" is B, "I can't tell" is nothing."""
    values = find_object(text, "answer")
    answer = find_answer(text) or "" if values is None else values["answer"]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        return None
    letter = extract_choice(str(answer), options).letter
    return None if letter is None else LETTERS.index(letter)


def validate(options: ValidationOptions, source: Source | None = None) -> SceneJournal:
    """Judge every record that the journal has not settled, write the kept ones and return the closed journal.

    The images come from `source`, or from where options and input file say.
    """
    if options.output_file.suffix not in (".csv", ".parquet") or options.output_file.is_dir():
        raise ValueError(f"--output_file {options.output_file}: name a file that ends in .csv or .parquet")
    records = list(read_records(options.input_file))[: options.sample_limit]
    if not records:
        raise ValueError(f"--input_file {options.input_file} holds no rows")
    if number := sum(not record.options for record in records):
        raise ValueError(
            f"--input_file {options.input_file}: {number} rows have no options, and only choices are judged"
        )
    source = source or image_source(options.input_file, options.source)
    api = options.connect()
    journal_path = journal_of(options.output_file)
    if not journal_path.is_file():
        claim_output(options.output_file, options.is_overwritten)
    settings = options.settings() | {"source": source.locator}
    reserve = options.concurrency * RESERVE_BYTES

    async def judge_all() -> None:
        try:
            await _judge_all(options, source, records, journal, api)
        finally:
            await api.close()

    with SceneJournal(journal_path, settings, options.is_overwritten, reserve) as journal:
        try:
            asyncio.run(judge_all())
        finally:
            kept = list(read_records(journal_path))
            _write_output(options.output_file, kept, source)
    _print_result(options, journal, len(records))
    return journal


def _print_result(options: ValidationOptions, journal: SceneJournal, number: int) -> None:
    outcomes = journal.outcomes()
    print(f"{options.output_file}: {outcomes[ACCEPTED]} of {number} rows kept, {journal.cost_usd:.4f} dollars")  # noqa: T201
    if outcomes[FAILED]:
        print(f"{outcomes[FAILED]} rows got no answer; the same command asks them again")  # noqa: T201
    if options.blind != "off":
        blind = sum(1 for line in newest_lines(journal.path) if line.get("is_blind"))
        print(f"answered without the picture: {blind} rows (is_blind in {journal.path})")  # noqa: T201


def _write_output(path: Path, kept: list[Record], source: Source) -> None:
    if path.suffix == ".csv":
        write_csv(kept, path)
    elif kept:
        export_parquet({path.stem: kept}, source, path.parent)
        parquet_path(path.parent, path.stem).replace(path)


async def _judge_all(
    options: ValidationOptions, source: Source, records: list[Record], journal: SceneJournal, api: Api
) -> None:
    judge = Judge(api, options)
    waiting: dict[str, list[tuple[int, Record]]] = {}
    for index, record in enumerate(records):
        if not journal.is_settled(record_key(record)):
            waiting.setdefault(record.image_id, []).append((index, record))
    tasks: set[asyncio.Task[None]] = set()

    async def work(index: int, record: Record, image: bytes) -> None:
        journal.add(await judge.judge(record, image, index))

    async with api.finishing(lambda: tasks):
        for image_id, image in find_images(source, waiting.keys()):
            for index, record in waiting.pop(image_id):
                while len(tasks) >= options.concurrency:
                    done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        task.result()
                journal.check_room()
                if options.max_cost_usd is not None and journal.cost_usd >= options.max_cost_usd:
                    print(f"stopped at --max_cost_usd {options.max_cost_usd}; the same command goes on")  # noqa: T201
                    return
                tasks.add(asyncio.create_task(work(index, record, image)))
        for group in waiting.values():
            for index, record in group:
                journal.add(record_line(record, index, FAILED, reason="the source has no image of it"))

"""Generation by the providers' batch APIs, at half the price: each run of the command collects what has ended, sends
what has to be asked again, and submits what is new.

Beside OUT.jsonl stands OUT.batches.jsonl: for each batch one line with its targets before it is sent, one with its id
after, so that nothing is submitted twice, whenever a run is cut off, and replies find their scenes. What the provider
answered is downloaded once and kept in OUT.batches.
"""

import asyncio
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_gen.generate.estimate import OUTPUT_TOKENS, STATIC_TOKENS
from data_gen.generate.options import GenerationOptions
from data_gen.generate.outcomes import quarantined_line, walk
from data_gen.generate.requests import MAX_ASKS, NO_QUESTION, Wish, choose_wish, judge, make_request, repaired
from data_gen.journal import RESERVE_BYTES, SceneJournal
from data_gen.questions.quotas import Steering
from data_gen.scenes.scene import Scene, SceneFault, read_image_id, read_scene
from data_gen.scenes.sources import Source
from spatialthinker.clients.model_api import (
    Api,
    ApiRequest,
    ApiStop,
    OutageFault,
    Reply,
    RequestFault,
    is_account_fault,
    merge_usage,
)
from spatialthinker.clients.prices import Usage, cost_usd
from spatialthinker.storage.journal import Line, read_lines

MAX_BATCH_REQUESTS = 1000
"""With images of 100 kB a batch has about 130 MB; the providers take 200 and more."""

MAX_SENDS = 5
"""A request that the provider failed to answer is sent again so often."""

SENDING, OPEN, COLLECTED = "sending", "open", "collected"

DEAREST_TOKENS = 2500
"""Of a crowded scene with a large picture: the budget takes every image under way for such a one."""


@dataclass
class Item:
    """One scene in a batch."""

    key: str
    index: int
    wish: Wish
    replies: list[Reply] = field(default_factory=list)
    """Replies of earlier rounds."""
    faults: list[str] = field(default_factory=list)
    sends: int = 1

    def take(self, reply: Reply | str) -> None:
        """Note an answer, or the fault for which there is none; the account's own faults cost no try."""
        if isinstance(reply, Reply):
            self.replies.append(reply)
        else:
            self.faults = [reply]
            self.sends += not is_account_fault(reply)

    def as_dict(self) -> dict[str, Any]:
        replies = [reply.__dict__ | {"usage": reply.usage.__dict__} for reply in self.replies]
        return self.__dict__ | {"wish": list(self.wish.__dict__.values()), "replies": replies}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Item":
        category, level, further = values["wish"]
        replies = [Reply(**{**reply, "usage": Usage(**reply["usage"])}) for reply in values["replies"]]
        return cls(**{**values, "wish": Wish(category, level, tuple(further)), "replies": replies})

    def request(self, scene: Scene, options: GenerationOptions) -> ApiRequest:
        """The first request, or that of the repair round."""
        request = make_request(scene, self.wish, options.has_image, options.temperature)
        return repaired(request, self.replies[-1], self.faults) if self.replies else request

    def line(self, reason: str) -> Line:
        """The journal's line of an item without a row."""
        return quarantined_line(self.key, self.index, reason) | self.paid()

    def paid(self) -> Line:
        """Target, replies, usage and cost, as keys of a journal line."""
        return {"asked": list(self.wish.asked), "replies": [r.text for r in self.replies], **merge_usage(self.replies)}


def batches_path(out: Path) -> Path:
    """The journal of batches beside a CSV."""
    return out.with_name(f"{out.stem}.batches.jsonl")


@dataclass
class Batch:
    """Requests that are submitted together."""

    items: dict[str, Item]
    """By the name of the request, which starts with the batch's token."""
    time_s: float
    batch_id: str | None = None
    """The provider's; None where the run was cut off before it could be noted."""


class BatchRun:
    """One run of the command with --batch_api=True."""

    def __init__(
        self, options: GenerationOptions, source: Source, journal: SceneJournal, batches: SceneJournal, api: Api
    ) -> None:
        self.options, self.source, self.journal, self.batches, self.api = options, source, journal, batches, api
        self.open: dict[str, Batch] = {}
        self.known_ids: set[str] = set()
        for line in read_lines(batches.path):
            if "key" in line:
                self._replay(line)

    def _replay(self, line: Line) -> None:
        """Take one line of the journal of batches into account."""
        token = line["key"]
        if line["status"] == SENDING:
            items = {name: Item.from_dict(item) for name, item in line["items"].items()}
            self.open[token] = Batch(items, line["time_s"])
            for replaced in line["replaces"]:
                self.open.pop(replaced, None)
        elif line["status"] == OPEN and token in self.open:
            self.open[token].batch_id = line["batch_id"]
            self.known_ids.add(line["batch_id"])
        else:
            self.open.pop(token, None)

    def _note(self, token: str, status: str, **more: Any) -> None:
        line = {"key": token, "index": len(self.batches.entries), "status": status, **more}
        self.batches.add(line)
        self._replay(line)

    async def go(self) -> None:
        """Collect, send again, submit."""
        await self._find_lost()
        folder = batches_path(self.options.out).with_suffix("")
        for token, batch in list(self.open.items()):
            if batch.batch_id is None:
                continue
            try:
                replies = await self.api.collect_batch(batch.batch_id, folder)
            except RequestFault as error:  # the others are collected all the same
                print(  # noqa: T201
                    f"batch {self.api.clean(batch.batch_id)} cannot be collected ({error}); its {len(batch.items)} "
                    f"images stay under way. If it is gone for good, remove {self.batches.path} once no other batch "
                    "is under way, and they are asked again"
                )
                continue
            if replies is not None:
                await self._take_in(token, replies)
        await self._submit_new()
        under_way = sum(len(batch.items) for batch in self.open.values())
        print(  # noqa: T201
            f"{len(self.open)} batches with {under_way} images are under way"
            + ("; run the same command again to collect them" if under_way else "")
        )

    async def _find_lost(self) -> None:
        """Find out what became of the batches whose submission was cut off: they run, or never arrived.

        A batch is sent again only when it is certain that the provider has none like it. Until then its images count
        as under way.
        """
        lost = {token: batch for token, batch in self.open.items() if batch.batch_id is None}
        for token, batch in lost.items():
            batch_id = await self.api.find_batch(token, len(batch.items), batch.time_s, self.known_ids)
            if batch_id:
                self._note(token, OPEN, batch_id=batch_id)
            elif batch_id is None:
                print(  # noqa: T201
                    f"a submission of {len(batch.items)} images was cut off and may have arrived; a later run of the "
                    "same command finds out"
                )
            else:
                await self._send_again(token, list(batch.items.values()))

    async def _take_in(self, token: str, replies: dict[str, Reply | str]) -> None:
        """Settle what a batch answered; what has to be asked again goes into a batch that replaces it."""
        items = self.open[token].items
        if replies:  # else the whole batch failed, which is no item's fault
            for name, item in items.items():
                item.take(replies.get(name, "batch: no result"))
        again: list[tuple[Item, Scene]] = []
        for item, scene in self._scenes(list(items.values())):
            line = self._settle(item, replies.get(f"{token}-{item.index}"), scene)
            if line is None:
                again.append((item, scene))
            else:
                self.journal.add(line)
        await self._submit(again, replaces=[token])

    async def _send_again(self, token: str, items: list[Item]) -> None:
        await self._submit(list(self._scenes(items)), replaces=[token])

    def _settle(self, item: Item, reply: Reply | str | None, scene: Scene) -> Line | None:
        """The journal's line of an item, or None where it is sent again."""
        if not isinstance(reply, Reply):
            return None if item.sends <= MAX_SENDS else item.line("; ".join(item.faults))
        outcome = judge(reply, scene, item.index, item.wish, self.options.provenance())
        if isinstance(outcome, dict):
            return outcome | item.paid()
        item.faults = outcome
        return None if len(item.replies) < MAX_ASKS else item.line("; ".join(outcome))

    def _scenes(self, items: list[Item]) -> Iterator[tuple[Item, Scene]]:
        """The items that have no outcome yet, with their scenes, in one pass over their part of the source.

        One whose scene is no longer there gets its outcome here.
        """
        waiting = {item.index: item for item in items if not self.journal.is_settled(item.key)}
        first = min(waiting, default=0)
        for index, row in enumerate(self.source.rows(first), first):
            if not waiting:
                return
            if index in waiting:
                item = waiting.pop(index)
                try:
                    if (image_id := read_image_id(row, index)) != item.key:
                        raise SceneFault(f"row {index} of the source is now {image_id!r}")
                    scene = read_scene(row, index, self.source.root)
                except SceneFault as error:
                    self.journal.add(item.line(str(error)))
                    continue
                yield item, scene
        for item in waiting.values():
            self.journal.add(item.line(f"the source has no row {item.index} any more"))

    async def _submit(self, pairs: list[tuple[Item, Scene]], replaces: Sequence[str] = ()) -> None:
        """Send a batch: its items are noted before, its id after; `_find_lost` mends a cut between the two."""
        token = secrets.token_hex(8)
        bodies: dict[str, Any] = {}
        items: dict[str, Line] = {}
        for item, scene in pairs:
            name = f"{token}-{item.index}"
            try:
                bodies[name] = self.api.body(item.request(scene, self.options))
                items[name] = item.as_dict()
            except RequestFault as error:
                self.journal.add(item.line(str(error)))
        if not items:
            for replaced in replaces:
                self._note(replaced, COLLECTED)
            return
        self._note(token, SENDING, time_s=time.time(), replaces=list(replaces), items=items)
        self._note(token, OPEN, batch_id=await self.api.submit_batch(bodies, token))

    async def _submit_new(self) -> None:
        steering = Steering(self.options.relation_percent)
        under_way = {item.key: item.wish for batch in self.open.values() for item in batch.items.values()}
        waiting: list[tuple[Item, Scene]] = []
        cap = self.options.data_cap
        for index, image_id, scene in walk(self.source, self.journal, self.journal.add, cap, under_way):
            if scene is None:
                wish = under_way.get(image_id)
                steering.add(wish.asked if wish else self.journal.entries[image_id].got)
                continue
            wish = choose_wish(scene, steering, self.options.has_image)
            if wish is None:
                steering.add(None)
                self.journal.add(quarantined_line(image_id, index, NO_QUESTION))
                continue
            if self._is_out_of_money(len(under_way)):
                break
            steering.add(wish.asked)
            under_way[image_id] = wish
            waiting.append((Item(image_id, index, wish), scene))
            if len(waiting) == MAX_BATCH_REQUESTS:
                await self._submit(waiting)
                waiting = []
        if waiting:
            await self._submit(waiting)

    def _is_out_of_money(self, num_under_way: int) -> bool:
        """True when one more image might exceed the budget, with all in flight uncached and requested twice."""
        limit = self.options.max_cost_usd
        if limit is None or self.api.price is None:
            return False
        dearest = Usage(MAX_ASKS * DEAREST_TOKENS, MAX_ASKS * OUTPUT_TOKENS, cache_write=MAX_ASKS * STATIC_TOKENS)
        expected = self.journal.cost_usd + (num_under_way + 1) * cost_usd(dearest, self.api.price, is_batch=True)
        if expected <= limit:
            return False
        print(f"stopped submitting at --max_cost_usd {limit}", file=sys.stderr)  # noqa: T201
        return True


def run_batches(options: GenerationOptions, source: Source, journal: SceneJournal, api: Api) -> None:
    """Collect and submit batches once."""

    async def go(batches: SceneJournal) -> None:
        try:
            await BatchRun(options, source, journal, batches, api).go()
        except OutageFault as error:
            raise ApiStop(f"{error}. Nothing is lost: the same command goes on") from error
        finally:
            await api.close()

    reserve = MAX_BATCH_REQUESTS * RESERVE_BYTES // 16
    with SceneJournal(batches_path(options.out), options.settings(), options.is_overwritten, reserve) as batches:
        asyncio.run(go(batches))

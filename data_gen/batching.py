"""Generation by the providers' batch APIs, at half the price: each run of the command collects what has ended, sends
what has to be asked again, and submits what is new.

Beside OUT.jsonl stands OUT.batches.jsonl: one line for each batch with the wishes in it, so that nothing is submitted
twice and replies find their scenes.
"""

import asyncio
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_gen.asking import MAX_ASKS, Wish, choose_wish, judge, make_request, repaired
from data_gen.estimate import OUTPUT_TOKENS, STATIC_TOKENS
from data_gen.generation_options import GenerationOptions
from data_gen.journal import Journal, Line, newest_lines
from data_gen.quotas import Steering
from data_gen.scenes import Scene, SceneFault, read_image_id, read_scene
from data_gen.sources import Source
from data_gen.stages import quarantined_line
from spatialthinker.model_api import Api, ApiRequest, Reply, merge_usage
from spatialthinker.prices import Usage, cost_usd

MAX_BATCH_REQUESTS = 1000
"""With images of 100 kB a batch has about 130 MB; the providers take 200 and more."""

MAX_SENDS = 5
"""A request that the provider failed to answer is sent again so often."""

OPEN, COLLECTED = "open", "collected"


@dataclass
class Item:
    """One scene in a batch."""

    key: str
    index: int
    wish: Wish
    replies: list[Reply] = field(default_factory=list)
    """What earlier rounds brought and cost."""
    faults: list[str] = field(default_factory=list)
    sends: int = 1

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

    def paid(self) -> Line:
        """The part of the journal's line that says what was asked, answered and paid."""
        return {"asked": list(self.wish.asked), "replies": [r.text for r in self.replies], **merge_usage(self.replies)}


def batches_path(out: Path) -> Path:
    """The journal of batches beside a CSV."""
    return out.with_name(f"{out.stem}.batches.jsonl")


class BatchRun:
    """One run of the command with --batch_api=True."""

    def __init__(
        self, options: GenerationOptions, source: Source, journal: Journal, batches: Journal, api: Api
    ) -> None:
        self.options, self.source, self.journal, self.batches, self.api = options, source, journal, batches, api
        self.open: dict[str, dict[str, Item]] = {}
        superseded: set[str] = set()
        for line in newest_lines(batches.path):
            superseded.update(line.get("collects", ()))
            if line["status"] == OPEN:
                self.open[line["key"]] = {name: Item.from_dict(item) for name, item in line["items"].items()}
        for batch_id in superseded:
            self.open.pop(batch_id, None)

    async def go(self) -> None:
        """Collect, send again, submit."""
        for batch_id in list(self.open):
            replies = await self.api.collect_batch(batch_id)
            if replies is not None:
                await self._take_in(batch_id, replies)
        await self._submit_new()
        under_way = sum(map(len, self.open.values()))
        print(  # noqa: T201
            f"{len(self.open)} batches with {under_way} images are under way"
            + ("; run the same command again to collect them" if under_way else "")
        )

    async def _take_in(self, batch_id: str, replies: dict[str, Reply | str]) -> None:
        """Settle what a batch answered; what has to be asked again goes into a batch that replaces it."""
        items = {item.key: (name, item) for name, item in self.open.pop(batch_id).items()}
        again: list[tuple[Item, Scene]] = []
        for scene, index in self._scenes({key for key in items if not self.journal.is_settled(key)}):
            name, item = items[scene.image_id]
            reply = replies.get(name, "batch: no result")
            line = self._settle(item, reply, scene, index)
            if line is None:
                again.append((item, scene))
            else:
                self.journal.add(line)
        if again:
            await self._submit(again, collects=[batch_id])
        else:
            self.batches.add({"key": batch_id, "index": 0, "status": COLLECTED})

    def _settle(self, item: Item, reply: Reply | str, scene: Scene, index: int) -> Line | None:
        """The journal's line of an item, or None where it is sent again."""
        if isinstance(reply, str):
            item.sends += 1
            return None if item.sends <= MAX_SENDS else quarantined_line(item.key, index, reply) | item.paid()
        item.replies.append(reply)
        outcome = judge(reply, scene, index, item.wish, self.options.provenance())
        if isinstance(outcome, dict):
            return outcome | item.paid()
        item.faults = outcome
        if len(item.replies) < MAX_ASKS:
            return None
        return quarantined_line(item.key, index, "; ".join(outcome)) | item.paid()

    def _scenes(self, keys: set[str]) -> Iterator[tuple[Scene, int]]:
        """The scenes of these images with their index, in one pass over the source."""
        missing = set(keys)
        for index, row in enumerate(self.source.rows()):
            if not missing:
                return
            try:
                image_id = read_image_id(row, index)
                if image_id in missing:
                    yield read_scene(row, index, self.source.root), index
                    missing.discard(image_id)
            except SceneFault:
                continue

    async def _submit(self, pairs: list[tuple[Item, Scene]], collects: list[str]) -> None:
        named = {f"i{item.index}-{len(item.replies)}-{item.sends}": (item, scene) for item, scene in pairs}
        bodies = {name: self.api.body(item.request(scene, self.options)) for name, (item, scene) in named.items()}
        batch_id = await self.api.submit_batch(bodies)
        items = {name: item for name, (item, _) in named.items()}
        line = {"key": batch_id, "index": len(self.batches.entries), "status": OPEN, "collects": collects}
        self.batches.add(line | {"items": {name: item.as_dict() for name, item in items.items()}})
        self.open[batch_id] = items

    async def _submit_new(self) -> None:
        steering = Steering(self.options.relation_percent)
        under_way = {item.key: item.wish for items in self.open.values() for item in items.values()}
        waiting: list[tuple[Item, Scene]] = []
        for index, row in enumerate(self.source.rows()):
            if self.options.data_cap is not None and index >= self.options.data_cap:
                break
            image_id = f"row-{index}"
            try:
                image_id = read_image_id(row, index)
                if self.journal.is_settled(image_id) or image_id in under_way:
                    wish = under_way.get(image_id)
                    steering.add(wish.asked if wish else self.journal.entries[image_id].got)
                    continue
                scene = read_scene(row, index, self.source.root)
                wish = choose_wish(scene, steering, self.options.has_image)
                if wish is None:
                    raise SceneFault("the graph carries no question of any category")
            except SceneFault as error:
                steering.add(None)
                if not self.journal.is_settled(image_id):
                    self.journal.add(quarantined_line(image_id, index, str(error)))
                continue
            if self._is_out_of_money(len(under_way)):
                break
            steering.add(wish.asked)
            under_way[image_id] = wish
            waiting.append((Item(image_id, index, wish), scene))
            if len(waiting) == MAX_BATCH_REQUESTS:
                await self._submit(waiting, [])
                waiting = []
        if waiting:
            await self._submit(waiting, [])

    def _is_out_of_money(self, num_under_way: int) -> bool:
        """Whether one image more might pass the limit, every one under way taken as uncached and asked twice."""
        limit = self.options.max_cost_usd
        if limit is None or self.api.price is None:
            return False
        dearest = Usage(input=MAX_ASKS * (STATIC_TOKENS + 2500), output=MAX_ASKS * OUTPUT_TOKENS)
        expected = self.journal.cost_usd + (num_under_way + 1) * cost_usd(dearest, self.api.price, is_batch=True)
        if expected <= limit:
            return False
        print(f"stopped submitting at --max_cost_usd {limit}", file=sys.stderr)  # noqa: T201
        return True


def run_batches(options: GenerationOptions, source: Source, journal: Journal, api: Api) -> None:
    """Collect and submit batches once."""

    async def go(batches: Journal) -> None:
        try:
            await BatchRun(options, source, journal, batches, api).go()
        finally:
            await api.close()

    with Journal(batches_path(options.out), options.settings(), options.is_overwritten) as batches:
        asyncio.run(go(batches))

"""Many scenes at once: a window over the source, outcomes into the journal the moment they are there."""

import asyncio
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field

from data_gen.generate.options import GenerationOptions
from data_gen.generate.outcomes import quarantined_line, walk
from data_gen.generate.requests import NO_QUESTION, ask_scene, choose_wish, make_request
from data_gen.journal import ACCEPTED, FAILED, SceneJournal
from data_gen.questions.quotas import LOOKBACK, Steering
from data_gen.scenes.scene import Scene
from data_gen.scenes.sources import Source
from spatialthinker.clients.model_api import Api, ApiStop
from spatialthinker.storage.journal import JournalFault, Line

MAX_FAILURES_IN_A_ROW = 20
"""So many scenes without an answer, each after all its retries, end the run: the provider is down."""

_REPORT_S = 10.0
Outcome = tuple[str, str] | None


@dataclass
class Progress:
    """Progress of a run and its rate."""

    total: int | None
    started: float = field(default_factory=time.monotonic)
    reported: float = field(default_factory=time.monotonic)
    outcomes: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    cost_usd: float = 0.0
    failures_in_a_row: int = 0
    last_failure: str = ""

    def add(self, line: Line) -> None:
        """Count one line of the journal."""
        self.outcomes[line["status"]] += 1
        self.cost_usd += line.get("cost_usd", 0.0)
        self.failures_in_a_row = self.failures_in_a_row + 1 if line["status"] == FAILED else 0
        self.last_failure = line.get("reason", "")
        if line.get("asked"):
            self.asked[line["asked"][0]] += 1
            self.accepted[line["asked"][0]] += line["status"] == ACCEPTED
        if time.monotonic() - self.reported > _REPORT_S:
            self.reported = time.monotonic()
            print(self.text(), file=sys.stderr)  # noqa: T201

    def text(self) -> str:
        """Rate, price so far, price to come and acceptance per category on one line."""
        done = self.outcomes.total()
        rate = done / max(time.monotonic() - self.started, 1e-9)
        to_come = f", about {self.cost_usd / max(done, 1) * (self.total - done):.2f} to come" if self.total else ""
        shares = ", ".join(f"{name} {self.accepted[name] / n:.0%}" for name, n in sorted(self.asked.items()))
        return (
            f"{done}{f' of {self.total}' if self.total else ''} images, {rate:.1f}/s, "
            f"{self.cost_usd:.2f} dollars{to_come}; accepted: {shares or 'none'}"
        )


class LiveRun:
    """One run of a model over a source."""

    def __init__(self, options: GenerationOptions, source: Source, journal: SceneJournal, api: Api) -> None:
        self.options, self.source, self.journal, self.api = options, source, journal, api
        self.steering = Steering(options.relation_percent)
        total = min(source.num_rows, options.data_cap or source.num_rows) if source.num_rows is not None else None
        self.progress = Progress(total and total - len(journal.entries))
        self.window: deque[asyncio.Task[Outcome] | Outcome] = deque()
        self.tasks: set[asyncio.Task[Outcome]] = set()

    async def go(self) -> None:
        """Ask everything that the journal has not settled; on a stop, wait for what is under way."""
        async with self.api.finishing(lambda: [task for task in self.window if isinstance(task, asyncio.Task)]):
            for index, image_id, scene in walk(self.source, self.journal, self._settle, self.options.data_cap):
                await self._make_room()
                if self._is_out_of_money():
                    break
                self._start(index, image_id, scene)
        print(self.progress.text(), file=sys.stderr)  # noqa: T201

    def _start(self, index: int, image_id: str, scene: Scene | None) -> None:
        if scene is None:
            entry = self.journal.entries[image_id]
            self.steering.add(entry.asked)
            self.window.append(entry.got)
            return
        wish = choose_wish(scene, self.steering, self.options.has_image)
        if wish is None:
            self.steering.add(None)
            self.window.append(None)
            self._settle(quarantined_line(image_id, index, NO_QUESTION))
            return
        self.steering.add(wish.asked)

        async def work() -> Outcome:
            request = make_request(scene, wish, self.options.has_image, self.options.temperature)
            line = await ask_scene(self.api, scene, index, wish, request, self.options.provenance())
            self._settle(line)
            return self.journal.entries[image_id].got

        task = asyncio.create_task(work())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        self.window.append(task)

    def _settle(self, line: Line) -> None:
        self.journal.add(line)
        self.progress.add(line)

    async def _make_room(self) -> None:
        """Wait until one more request may start, and give the steering the outcomes that are old enough."""
        while len(self.tasks) >= self.options.concurrency:
            done, _ = await asyncio.wait(self.tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        while len(self.window) >= LOOKBACK:
            oldest = self.window[0]
            if isinstance(oldest, asyncio.Task):
                await asyncio.wait([oldest])  # `await oldest` would cancel it when the run is told to stop
                oldest = oldest.result()
            self.window.popleft()
            self.steering.settle(oldest)
        self.journal.check_room()
        if self.progress.failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
            raise ApiStop(
                f"{MAX_FAILURES_IN_A_ROW} images in a row got no answer ({self.progress.last_failure}); the provider "
                "seems to be down. Nothing is lost: the same command goes on"
            )

    def _is_out_of_money(self) -> bool:
        limit = self.options.max_cost_usd
        if limit is None:
            return False
        done = max(self.progress.outcomes.total(), 1)
        under_way = len(self.tasks) * self.progress.cost_usd / done
        if self.journal.cost_usd + under_way < limit:
            return False
        print(  # noqa: T201
            f"stopped at --max_cost_usd {limit}: {self.journal.cost_usd:.4f} dollars are spent; "
            "the same command with a higher limit goes on",
            file=sys.stderr,
        )
        return True


def run_model(options: GenerationOptions, source: Source, journal: SceneJournal, api: Api) -> None:
    """Ask a model about every scene of a source."""
    if options.concurrency > LOOKBACK:
        raise JournalFault(f"--concurrency {options.concurrency}: at most {LOOKBACK} requests at once")

    async def go() -> None:
        try:
            await LiveRun(options, source, journal, api).go()
        finally:
            await api.close()

    asyncio.run(go())

"""Single controller: one driver calls groups of Ray actors, with dispatch over ranks and error reports.

The driver has a WorkerGroup per role and calls its methods like local ones; `@register` sets a method's dispatch mode:
how arguments are split over ranks and results are collected.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from verl.distributed.placement import ResourcePool
from verl.distributed.watchdog import Watchdog, watched
from verl.protocol import DataProto

ROOT = Path(__file__).resolve().parents[2]
"""Of the checkout; workers find its packages before installed ones of the same names."""
DEATH_REPORT_DELAY_S = 3.0
"""Maximum delay between broken connections at other ranks and the report of a process' death."""
WATCH_PERIOD_S = 2.0
"""Seconds between questions to the processes of watched groups; a death is known after two at most."""
DEATHS = (RayActorError, OutOfMemoryError, WorkerCrashedError, NodeDiedError)
"""Ray's errors for a call whose process is gone; the second is its memory monitor's."""


class WorkerError(RuntimeError):
    """A worker died or raised; the message names its role, rank and method.

    Attributes:
        role: of the group that was called.
        has_ended: True if no process of the group died or is still at work, and another actor's death was the cause.
    """

    def __init__(self, message: str, role: str = "", has_ended: bool = False):
        super().__init__(message)
        self.role, self.has_ended = role, has_ended


class Dispatch(Enum):
    """Dispatch mode of a worker method: how arguments are split and results are collected.

    ONE_TO_ALL: every rank gets all arguments; a list of results.
    DP_COMPUTE_PROTO: DataProto arguments are cut into equal parts, one per rank; results are concatenated.
    DP_COMPUTE_METRIC: the same cut; a list of results.
    """

    ONE_TO_ALL = "one_to_all"
    DP_COMPUTE_PROTO = "dp_compute_proto"
    DP_COMPUTE_METRIC = "dp_compute_metric"


def register(dispatch: Dispatch = Dispatch.ONE_TO_ALL) -> Callable[[Callable], Callable]:
    """Marks a worker method as callable on the group."""

    def mark(method: Callable) -> Callable:
        marked = watched(method)
        marked.dispatch = dispatch  # type: ignore[attr-defined]
        return marked

    return mark


@dataclass(frozen=True)
class WorkerSpec:
    """Specification of one role's actors: class, constructor arguments, CPUs and environment."""

    cls: type
    kwargs: dict[str, Any]
    name: str
    num_cpus: float = 1.0
    env: dict[str, str] | None = None


class WorkerGroup:
    """The Ray actors of one role, one per `ranks_per_actor` ranks of the pool, with the GPUs of these ranks.

    A call that exceeds the watchdog's timeout raises a WorkerError with the folder of the stack dumps.
    """

    machines: Sequence[str] = ()
    """Machine of each rank; empty names when there is only one."""
    watched: Sequence["WorkerGroup"] = ()
    """Groups whose deaths end a wait for this one's calls at once: without them what is waited for is in vain."""
    called: Sequence["WorkerGroup"] = ()
    """Groups whose actors this one's methods call."""

    def __init__(
        self, pool: ResourcePool, spec: WorkerSpec, ranks_per_actor: int = 1, watchdog: Watchdog | None = None
    ):
        self.spec = spec
        self.watchdog = watchdog
        remote = ray.remote(spec.cls)
        self.actors = []
        world_size = pool.num_ranks // ranks_per_actor
        self.machines = [pool.machine(rank * ranks_per_actor) for rank in range(world_size)]
        for rank in range(world_size):
            pool_ranks = range(rank * ranks_per_actor, (rank + 1) * ranks_per_actor)
            path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
            env = {"PYTHONPATH": path} | pool.visible_gpus(pool_ranks) | (spec.env or {})
            if watchdog is not None:
                env |= watchdog.environment(spec.name, rank)
            options = remote.options(
                num_cpus=spec.num_cpus,
                num_gpus=0,
                scheduling_strategy=pool.strategy(pool_ranks[0]),
                runtime_env={"env_vars": env},
            )
            self.actors.append(options.remote(rank=rank, world_size=world_size, **spec.kwargs))

    def __len__(self) -> int:
        return len(self.actors)

    @property
    def rank_names(self) -> list[str]:
        """Name of each rank, with its machine if there are several."""
        return [f"{self.spec.name} rank {rank}{self._on(rank)}" for rank in range(len(self))]

    def _on(self, *ranks: int) -> str:
        """The machines of ranks, as words behind them; empty when there is only one."""
        names = sorted({self.machines[rank] for rank in ranks} - {""}) if self.machines else []
        return f" on {', '.join(names)}" if names else ""

    def __getattr__(self, method: str) -> Callable:
        dispatch = getattr(getattr(self.spec.cls, method, None), "dispatch", None)
        if dispatch is None:
            raise AttributeError(f"{self.spec.cls.__name__} has no registered method {method!r}")

        def call(*args: Any, **kwargs: Any) -> Any:
            return self.start(method, *args, **kwargs)()

        return call

    def start(self, method: str, *args: Any, **kwargs: Any) -> Callable[[], Any]:
        """Starts a registered method on all ranks; returns a function that waits for and collects the results."""
        dispatch = getattr(self.spec.cls, method).dispatch
        calls = [(args, kwargs)] * len(self)
        if dispatch is not Dispatch.ONE_TO_ALL:
            calls = self._split(args, kwargs)
        refs = [getattr(actor, method).remote(*a, **k) for actor, (a, k) in zip(self.actors, calls, strict=True)]

        def wait() -> Any:
            results = self._wait(method, refs)
            return DataProto.concat(results) if dispatch is Dispatch.DP_COMPUTE_PROTO else results

        return wait

    def run_on(self, rank: int, method: str, *args: Any) -> Any:
        """The result of a method on one rank alone."""
        return self._wait(method, [getattr(self.actors[rank], method).remote(*args)])[0]

    def _split(self, args: tuple, kwargs: dict[str, Any]) -> list[tuple[tuple, dict[str, Any]]]:
        def parts(value: Any) -> list[Any]:
            return value.chunk(len(self)) if isinstance(value, DataProto) else [value] * len(self)

        split_args = [parts(value) for value in args]
        split_kwargs = {key: parts(value) for key, value in kwargs.items()}
        return [
            (tuple(part[rank] for part in split_args), {key: part[rank] for key, part in split_kwargs.items()})
            for rank in range(len(self))
        ]

    def _wait(self, method: str, refs: list[Any]) -> list[Any]:
        """Results in rank order; raises at the first failure, since other ranks may hang on the failed one."""
        pending = list(refs)
        caller_timeout_s = self.watchdog.caller_timeout_s if self.watchdog is not None else None
        deadline = time.monotonic() + (math.inf if caller_timeout_s is None else caller_timeout_s)
        asked: dict[Any, tuple[WorkerGroup, int]] = {}
        while pending:
            left_s = max(0.0, deadline - time.monotonic())
            period_s = min(left_s, WATCH_PERIOD_S) if self.watched else left_s
            done, pending = ray.wait(pending, num_returns=1, timeout=period_s if period_s < math.inf else None)
            if not done:
                self._ask_watched(method, asked)
                if time.monotonic() >= deadline:
                    raise self._stall(method, [refs.index(ref) for ref in pending])
                continue
            error = _failure(done[0])
            if error is None:
                continue
            failures = {done[0]: error}
            if not _is_process_death(error) and pending:  # it may be a consequence of another rank's death
                done, pending = ray.wait(pending, num_returns=len(pending), timeout=DEATH_REPORT_DELAY_S)
                failures |= {ref: later for ref in done if (later := _failure(ref))}
            first = min(failures, key=lambda ref: not _is_process_death(failures[ref]))
            described = self._describe(f"in {method}", refs.index(first), failures[first], bool(pending))
            if _is_death_of_other(failures[first]) and (dead := self._find_dead_called(method)) is not None:
                described = WorkerError(str(dead), described.role, described.has_ended)
            raise described from failures[first]
        return ray.get(refs)

    def _find_dead_called(self, method: str) -> WorkerError | None:
        """The death of an actor that the method called; None when all that answer in time are alive."""
        asked = {
            actor.__ray_ready__.remote(): (group, rank)
            for group in self.called
            for rank, actor in enumerate(group.actors)
        }
        answered, _ = (
            ray.wait(list(asked), num_returns=len(asked), timeout=DEATH_REPORT_DELAY_S) if asked else ([], [])
        )
        for question in answered:
            error = _failure(question)
            if error is not None and _is_process_death(error):
                group, rank = asked[question]
                return group._describe(f"beside {method} of {self.spec.name}", rank, error)
        return None

    def _ask_watched(self, method: str, asked: dict[Any, tuple["WorkerGroup", int]]) -> None:
        """Raises for a watched process that has died; one at work answers later.

        Args:
            asked: group and rank by question that is not answered yet; those that are not asked are added.
        """
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0) if asked else ([], [])
        for question in answered:
            group, rank = asked.pop(question)
            error = _failure(question)
            if error is not None and _is_process_death(error):
                raise group._describe(f"beside {method} of {self.spec.name}", rank, error) from error
        open_ones = set(asked.values())
        for group in self.watched:
            for rank, actor in enumerate(group.actors):
                if (group, rank) not in open_ones:
                    asked[actor.__ray_ready__.remote()] = (group, rank)

    def _describe(self, when: str, rank: int, error: RayError, is_pending: bool = False) -> WorkerError:
        where = f"{self.spec.name} rank {rank} of {len(self)} {when}{self._on(rank)}"
        if isinstance(error, GetTimeoutError):
            words = "an actor that it called gave no answer in time (trainer.watchdog_timeout_s)"
            stacks = self.watchdog.describe_stacks() if self.watchdog is not None else ""
            return WorkerError(f"{where}: {words}; {stacks}", self.spec.name, has_ended=not is_pending)
        if not isinstance(error, DEATHS):
            return WorkerError(f"{where}: {error}", self.spec.name)
        is_other = _is_death_of_other(error)
        whose = "an actor that it called" if is_other else "its process"
        return WorkerError(f"{where}: {whose} died: {error}", self.spec.name, has_ended=is_other and not is_pending)

    def _stall(self, method: str, ranks: list[int]) -> WorkerError:
        assert self.watchdog is not None
        return WorkerError(
            f"{self.spec.name} rank {', '.join(map(str, ranks))} of {len(self)}{self._on(*ranks)}: no answer "
            f"from {method} after {self.watchdog.timeout_s:g} s (trainer.watchdog_timeout_s); "
            f"{self.watchdog.describe_stacks()}",
            self.spec.name,
        )

    def kill(self) -> None:
        """Ends all actors at once."""
        for actor in self.actors:
            ray.kill(actor)


def _failure(ref: Any) -> RayError | None:
    """The error of a finished call, or None."""
    try:
        ray.get(ref)
    except RayError as error:
        return error
    return None


def _is_process_death(error: RayError) -> bool:
    """True when the called process itself died."""
    return isinstance(error, DEATHS) and not isinstance(error, RayTaskError)


def _is_death_of_other(error: RayError) -> bool:
    """True when a call inside the task found another process dead."""
    return isinstance(error, DEATHS) and isinstance(error, RayTaskError)

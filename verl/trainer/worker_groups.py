"""Worker groups of a run: training ranks and engines, placed on the machines of a cluster and loaded."""

import os
import time
from dataclasses import dataclass
from typing import Any

from spatialthinker.multicast import multicast_environment
from verl.config.records import Config
from verl.distributed.watchdog import Watchdog

CPUS_PER_ACTOR = 1.0


def cluster_address() -> str | None:
    """The Ray cluster that RAY_ADDRESS names; None when the run starts Ray itself."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    return None if address in ("", "local") else address


class Laps:
    """Seconds of the parts of a start, one after the other, since a time in seconds since the epoch."""

    def __init__(self, begin: float | None = None) -> None:
        self.begin = self.last = time.time() if begin is None else begin
        self.seconds: dict[str, float] = {}

    def mark(self, name: str) -> None:
        """Ends a part."""
        now = time.time()
        self.seconds[name], self.last = now - self.last, now

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.0f}" for name, seconds in self.seconds.items())
        return f"Started in {self.last - self.begin:.0f} s: {parts}"


@dataclass(frozen=True)
class Place:
    """The machines of a run's workers, and environment variables: of all of them, and of threads."""

    pool: Any
    shared: dict[str, str]
    threads: dict[str, str]


def find_place(config: Config, device: str) -> Place:
    """The machines of the cluster, checked, that the run's workers take."""
    from verl.data.processor import threads_per_rank
    from verl.distributed.single_controller import ResourcePool
    from verl.trainer.hosts import check_hosts, network_environment

    pool = ResourcePool(config.num_ranks, 2 * CPUS_PER_ACTOR, device == "cuda", config.trainer.nnodes)
    shared = {"TOKENIZERS_PARALLELISM": "true", "VLLM_LOGGING_LEVEL": "ERROR", "TRANSFORMERS_VERBOSITY": "error"}
    shared |= multicast_environment() | network_environment()
    if cluster_address():
        check_hosts(config, pool.machines, shared)
    # The engine waits while the ranks work and they while it does, but threads that spin would still take turns.
    return Place(pool, shared, {"OMP_NUM_THREADS": str(threads_per_rank(config))})


def place_ranks(
    config: Config,
    device: str,
    num_steps: int,
    place: Place,
    watchdog: Watchdog | None = None,
    notes_kernels: bool = False,
) -> Any:
    """Training ranks that have yet to load; they can note their kernels for a benchmark."""
    from verl.distributed.single_controller import WorkerGroup, WorkerSpec
    from verl.workers.fsdp_worker import FSDPWorker
    from verl.workers.profiled_worker import ProfiledWorker

    spec = WorkerSpec(
        cls=ProfiledWorker if notes_kernels else FSDPWorker,
        kwargs={"config": config, "device": device, "num_steps": num_steps},
        name="actor",
        num_cpus=CPUS_PER_ACTOR,
        env=place.shared | place.threads,
    )
    return WorkerGroup(place.pool, spec, watchdog=watchdog)


def build_workers(
    config: Config,
    device: str,
    processor: Any,
    num_steps: int,
    watchdog: Watchdog | None = None,
    laps: Laps | None = None,
) -> tuple[Any, Any]:
    """Training ranks and engines, loaded side by side; `laps` counts the seconds.

    On GPUs every worker.rollout.tensor_parallel_size ranks share an engine, which runs on their GPUs; on a CPU all of
    a machine do.
    """
    from verl.distributed.single_controller import WorkerGroup, WorkerSpec
    from verl.trainer.engine_arguments import rollout_arguments
    from verl.workers.rollout import RolloutWorker

    on_gpu, place = device == "cuda", find_place(config, device)
    actor = place_ranks(config, device, num_steps, place, watchdog)
    threads = {"OMP_NUM_THREADS": "1"} if on_gpu else place.threads  # a GPU's engine has threads of its own
    rollout = WorkerGroup(
        place.pool,
        WorkerSpec(
            cls=RolloutWorker,
            kwargs=rollout_arguments(config, device, processor),
            name="rollout",
            num_cpus=CPUS_PER_ACTOR,
            env=place.shared | threads,
        ),
        ranks_per_actor=config.worker.rollout.tensor_parallel_size if on_gpu else config.trainer.n_gpus_per_node,
        watchdog=watchdog,
    )
    actor.watched, rollout.watched = [rollout], [actor]
    host, port = actor.run_on(0, "open_store")
    # On a GPU the engine measures how much memory is free: nobody else may take some meanwhile.
    loading = [actor.start("load", host, port), rollout.start("prepare" if on_gpu else "load")]
    for wait in loading:
        wait()
    laps = laps or Laps()
    laps.mark("ranks" if on_gpu else "ranks and engines")
    if on_gpu:
        rollout.load()
        laps.mark("engines")
    # An engine's death is told by the next call to it: ranks that are at work would be left between two states.
    actor.watched = []
    return actor, rollout

"""Worker groups of a run: training ranks and engines, placed on the machines of a cluster and loaded."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spatialthinker.multicast import multicast_environment
from verl.config.auto import without_auto
from verl.config.records import Config, ConfigError
from verl.distributed.watchdog import Watchdog

CPUS_PER_ACTOR = 1.0
GB = 1024**3


def cluster_address() -> str | None:
    """The Ray cluster that RAY_ADDRESS names; None when the run starts Ray itself."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    return None if address in ("", "local") else address


class Laps:
    """Seconds of the parts of a start, one after the other, since a time in seconds since the epoch."""

    def __init__(self, begin: float | None = None) -> None:
        self.begin = self.last = time.time() if begin is None else begin
        self.parts: list[str] = []

    def mark(self, name: str, workers: Sequence[dict[str, float]] = ()) -> None:
        """Ends a part; of what workers did in it side by side, in seconds, the longest is told."""
        now = time.time()
        longest = [f"{inner} {max(each[inner] for each in workers):.0f}" for inner in (workers[0] if workers else ())]
        self.parts.append(f"{name} {now - self.last:.0f}" + (f" ({', '.join(longest)})" if longest else ""))
        self.last = now

    def __str__(self) -> str:
        return f"Started in {self.last - self.begin:.0f} s: {', '.join(self.parts)}"


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
    shared = {"TOKENIZERS_PARALLELISM": "true"}
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "TRANSFORMERS_VERBOSITY": "error"}
    shared |= {name: os.environ.get(name, level) for name, level in quiet.items()}
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


def load_in_turn(actor: Any, rollout: Any, share: Any, laps: Laps) -> None:
    """Loads engines on empty GPUs while the ranks read their model into host memory, and then the ranks.

    Not side by side: vLLM measures its memory while it starts, and takes what others allocate meanwhile for its own.

    Args:
        share: worker.rollout.gpu_memory_utilization, a number.

    Raises:
        ConfigError: the share is more than the ranks leave.
    """
    *_, engines = [wait() for wait in [actor.start("read"), rollout.start("load")]]
    laps.mark("engines and reading", engines)
    before = sum(rollout.memory(), [])
    actor.load(*actor.run_on(0, "open_store"))
    check_room(before, sum(rollout.memory(), []), share)
    laps.mark("ranks")


def check_room(before: Sequence[Any], after: Sequence[Any], share: float) -> None:
    """Passes if every GPU has room for its engine's share beside the rank; vLLM looked when there was no rank yet.

    Args:
        before, after: verl.workers.rollout.GpuMemory of each GPU, its engine asleep, without and with its rank.
        share: as configured.

    Raises:
        ConfigError: a GPU has not; the message has the largest share that fits.
    """
    held = [empty.free - full.free for empty, full in zip(before, after, strict=True)]  # by each rank
    room, of_rank, wanted = min((gpu.at_start - own, own, gpu.share) for gpu, own in zip(after, held, strict=True))
    if room < wanted:
        raise ConfigError(
            [
                f"worker.rollout.gpu_memory_utilization = {share:g}: the engine's share is {wanted / GB:.1f} GiB, and "
                f"beside the rank's {of_rank / GB:.1f} its GPU has room for {room / GB:.1f}; lower it to "
                f"{max(0, int(1000 * share * room / wanted)) / 1000:g}, or let the rank hold less with "
                "worker.actor.offload.offload_optimizer=true and its like"
            ]
        )


def build_workers(
    config: Config,
    device: str,
    processor: Any,
    num_steps: int,
    watchdog: Watchdog | None = None,
    laps: Laps | None = None,
) -> tuple[Any, Any]:
    """Training ranks and engines, loaded; `laps` counts the seconds.

    On GPUs every worker.rollout.tensor_parallel_size ranks share an engine, which runs on their GPUs; on a CPU all of
    a machine do.
    """
    from verl.distributed.single_controller import WorkerGroup, WorkerSpec
    from verl.trainer.engine_arguments import rollout_arguments
    from verl.workers.rollout import CPU_ENVIRONMENT, RolloutWorker

    on_gpu, place = device == "cuda", find_place(config, device)
    actor = place_ranks(config, device, num_steps, place, watchdog)
    # A GPU's engine has threads of its own.
    own = {"OMP_NUM_THREADS": "1"} if on_gpu else place.threads | CPU_ENVIRONMENT
    rollout = WorkerGroup(
        place.pool,
        WorkerSpec(
            cls=RolloutWorker,
            kwargs=rollout_arguments(config, device, processor),
            name="rollout",
            num_cpus=CPUS_PER_ACTOR,
            env=place.shared | own,
        ),
        ranks_per_actor=config.worker.rollout.tensor_parallel_size if on_gpu else config.trainer.n_gpus_per_node,
        watchdog=watchdog,
    )
    actor.watched, rollout.watched = [rollout], [actor]
    actor.called = [rollout]  # weights are sent from rank to engine
    laps = laps or Laps()
    if on_gpu:
        load_in_turn(actor, rollout, without_auto(config).worker.rollout.gpu_memory_utilization, laps)
    else:
        waits = [actor.start("load", *actor.run_on(0, "open_store")), rollout.start("load")]
        *_, engines = [wait() for wait in waits]
        laps.mark("ranks and engines", engines)
    # An engine's death is told by the next call to it: ranks that are at work would be left between two states.
    actor.watched = []
    return actor, rollout

"""The local engines by name, and several of them side by side through Ray.

On GPUs that is one engine for each, or for each group that shares a model; on the CPU one for each core where the
model is small: much of its time goes into Python, which one process does on one core. GPUs and cores are those of this
machine, or of all machines of a cluster that was asked for.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from evaluation.benchmarks.samples import Sample
from evaluation.benchmarks.templates import is_template_file
from evaluation.engines.local import LOCAL, Answer, Backend, HuggingFaceBackend, ModelOptions, VllmBackend
from evaluation.journal import weight_files
from spatialthinker.network import check_cluster_address

ROOT = Path(__file__).resolve().parents[2]
MAX_CPU_ENGINES = 8
MAX_CPU_WEIGHTS_BYTES = 1 << 30
"""A model with larger weights gets one engine on all cores: it computes for longer than Python takes."""
ITEMS_PER_CPU_ENGINE = 128
"""Fewer are answered before a further engine is loaded."""
PLACEMENT_TIMEOUT_S = 60


class _Replica:
    """An engine in a process of its own; Ray shows it only its own GPUs."""

    def __init__(self, backend: Callable[[ModelOptions], Backend], options: ModelOptions) -> None:
        self.backend = backend(options)

    def wait_until_loaded(self) -> None:
        """Return when the model is there: Ray runs calls in their order."""

    def answer(self, samples: list[Sample]) -> Iterator[tuple[str, Answer]]:
        for sample, answer in self.backend.answer(samples):
            yield sample.id, answer


class DataParallelBackend:
    """Replicas of a back end; answers come as soon as any replica has one.

    With `options.ray_address` they run on that cluster, wherever it has room for them; else on one of their own.

    Args:
        num_replicas: on this machine; on a cluster as many as it has room for.
        gpus_each: of a replica; 0 on CPUs.
        threads_each: of a replica on CPUs; None for all that its machine gives.

    Errors: ValueError if the cluster cannot be joined, or has no room.
    """

    def __init__(
        self,
        backend: Callable[[ModelOptions], Backend],
        options: ModelOptions,
        num_replicas: int,
        gpus_each: int = 0,
        threads_each: int | None = None,
    ) -> None:
        import ray
        from ray.exceptions import RayTaskError

        if not ray.is_initialized():
            join_ray(options.ray_address)
        places = [{"num_cpus": 0, "num_gpus": gpus_each}] * num_replicas
        if options.ray_address != LOCAL:
            places, threads_each = find_places(options)
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
        if threads_each is not None:
            environment["OMP_NUM_THREADS"] = str(threads_each)
        paths = {name: getattr(options, name) for name in ("model_path", "processor_name", "template")}
        found = {name: str(Path(path).absolute()) for name, path in paths.items() if path and _is_path(path)}
        options = replace(options, **found)  # a cluster's processes have another working directory
        replica: Any = ray.remote(runtime_env={"env_vars": environment})(_Replica)
        self.replicas: list[Any] = [replica.options(**place).remote(backend, options) for place in places]
        try:
            ray.get([replica.wait_until_loaded.remote() for replica in self.replicas])
        except RayTaskError as error:  # the engine's own error is the one that helps
            raise error.as_instanceof_cause() from error

    def answer(self, samples: Iterable[Sample]) -> Iterator[tuple[Sample, Answer]]:
        """Yield answers of all replicas. Samples carry where their images lie; each replica reads its own."""
        import ray

        chosen = list(samples)
        by_id = {sample.id: sample for sample in chosen}
        count = len(self.replicas)
        streams: list[Any] = [
            replica.answer.options(num_returns="streaming").remote(chosen[index::count])
            for index, replica in enumerate(self.replicas)
        ]
        while streams:
            ready: Any = ray.wait(streams, num_returns=1, fetch_local=False)[0][0]
            try:
                item_id, answer = ray.get(next(ready))
            except StopIteration:
                streams.remove(ready)
                continue
            yield by_id[item_id], answer


def _is_path(name: str) -> bool:
    return Path(name).is_dir() or is_template_file(name)


def count_cpu_engines(options: ModelOptions, cores: int) -> int:
    """Return how many engines the items are shared by on so many cores."""
    weights = weight_files(Path(options.model_path))
    if not weights or sum(path.stat().st_size for path in weights) > MAX_CPU_WEIGHTS_BYTES:
        return 1
    return max(1, min(cores, MAX_CPU_ENGINES, options.num_items // ITEMS_PER_CPU_ENGINE))


def join_ray(address: str) -> None:
    """Join the cluster of an address, or start one of our own for LOCAL. Errors: ValueError if none can be joined."""
    import ray

    # Without an address Ray would join the cluster of RAY_ADDRESS, where a training may hold the GPUs.
    start: Any = {"include_dashboard": False} if address == LOCAL else {}
    check_cluster_address(address)
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **start)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ValueError(f"--ray_address {address}: no Ray cluster can be joined there ({error})") from error


def find_places(options: ModelOptions) -> tuple[list[dict[str, Any]], int | None]:
    """Return the room for each replica of the joined cluster, as options of an actor, and the threads of each.

    Errors: ValueError if the cluster has no room, or has given it to others.
    """
    import ray
    from ray.exceptions import GetTimeoutError
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    needs, threads = count_replicas(nodes, options)
    group = placement_group(needs, strategy="SPREAD")
    try:
        ray.get(group.ready(), timeout=PLACEMENT_TIMEOUT_S)
    except GetTimeoutError as error:
        remove_placement_group(group)
        raise ValueError(
            f"--ray_address {options.ray_address}: the cluster had no room for {len(needs)} engines of {needs[0]} "
            f"within {PLACEMENT_TIMEOUT_S} s, some of it is in use; wait until what runs there has ended"
        ) from error
    strategies = [PlacementGroupSchedulingStrategy(group, index) for index in range(len(needs))]
    return [
        {"num_cpus": need["CPU"], "num_gpus": need.get("GPU", 0), "scheduling_strategy": strategy}
        for need, strategy in zip(needs, strategies, strict=True)
    ], threads


def count_replicas(nodes: list[dict[str, float]], options: ModelOptions) -> tuple[list[dict[str, float]], int | None]:
    """Return what each replica needs of a cluster's machines, and the threads of each on CPUs.

    Args:
        nodes: resources of each machine as Ray names them; an engine lies on one of them.

    Errors: ValueError if no machine is large enough.
    """
    size = options.tensor_parallel_size
    gpus = [int(node.get("GPU", 0)) for node in nodes]
    if any(gpus):
        if number := sum(count // size for count in gpus):
            return [{"CPU": 0, "GPU": size}] * number, None
        raise ValueError(f"--tensor_parallel_size {size}: the cluster's machines have {max(gpus)} GPUs at most")
    if size > 1:
        raise ValueError(f"--tensor_parallel_size {size}: the cluster of --ray_address has no GPUs")
    cores = [int(node.get("CPU", 0)) for node in nodes]
    if not (total := sum(cores)):
        raise ValueError(f"--ray_address {options.ray_address}: the cluster has neither GPUs nor CPUs to give")
    number = count_cpu_engines(options, total)
    threads = max(1, total // number) if number > 1 else max(cores)
    while (room := sum(count // threads for count in cores)) < number and threads > 1:
        threads -= 1
    return [{"CPU": threads}] * min(number, room), threads


def load_huggingface(options: ModelOptions) -> Backend:
    """Return one engine, or those that the cluster of `options.ray_address` has room for."""
    if options.ray_address != LOCAL:
        return DataParallelBackend(HuggingFaceBackend, options, 0)
    return HuggingFaceBackend(options)


def load_vllm(options: ModelOptions) -> Backend:
    """Return one engine, or one for each group of `tensor_parallel_size` visible GPUs, or several on the CPU.

    With `options.ray_address` they are the cluster's GPUs and CPUs, not this machine's.

    Errors: ValueError if a group needs more GPUs than are visible.
    """
    if options.ray_address != LOCAL:
        return DataParallelBackend(VllmBackend, options, 0)
    import torch

    gpus = torch.cuda.device_count()
    cores = len(os.sched_getaffinity(0))
    if gpus == 0 and (num_engines := count_cpu_engines(options, cores)) > 1:
        return DataParallelBackend(VllmBackend, options, num_engines, threads_each=cores // num_engines)
    if options.tensor_parallel_size > max(gpus, 1):
        raise ValueError(f"--tensor_parallel_size {options.tensor_parallel_size}: {gpus} GPUs are visible")
    num_replicas = gpus // options.tensor_parallel_size
    if num_replicas < 2:
        return VllmBackend(options)
    return DataParallelBackend(VllmBackend, options, num_replicas, options.tensor_parallel_size)


LOCAL_BACKENDS: dict[str, Callable[[ModelOptions], Backend]] = {"huggingface": load_huggingface, "vllm": load_vllm}

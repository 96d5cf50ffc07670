"""The local engines by name, and several of them side by side through Ray.

On GPUs that is one engine for each, or for each group that shares a model; on the CPU one for each core where the
model is small: much of its time goes into Python, which one process does on one core.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from evaluation.benchmarks.samples import Sample
from evaluation.benchmarks.templates import is_template_file
from evaluation.engines.local import Answer, Backend, HuggingFaceBackend, ModelOptions, VllmBackend
from evaluation.journal import weight_files

ROOT = Path(__file__).resolve().parents[2]
MAX_CPU_ENGINES = 8
MAX_CPU_WEIGHTS_BYTES = 1 << 30
"""A model with larger weights gets one engine on all cores: it computes for longer than Python takes."""
ITEMS_PER_CPU_ENGINE = 128
"""Fewer are answered before a further engine is loaded."""


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
    """Replicas of a back end; answers come as soon as any replica has one."""

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
            # Without an address Ray would join the cluster of RAY_ADDRESS, where a training may hold the GPUs.
            start: Any = {"include_dashboard": False} if options.ray_address == "local" else {}
            ray.init(options.ray_address, log_to_driver=False, logging_level=logging.ERROR, **start)
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
        if threads_each is not None:
            environment["OMP_NUM_THREADS"] = str(threads_each)
        resources: Any = {"num_gpus": gpus_each, "num_cpus": 0, "runtime_env": {"env_vars": environment}}
        paths = {name: getattr(options, name) for name in ("model_path", "processor_name", "template")}
        found = {name: str(Path(path).absolute()) for name, path in paths.items() if path and _is_path(path)}
        options = replace(options, **found)  # a cluster's processes have another working directory
        replica = ray.remote(**resources)(_Replica)
        self.replicas: list[Any] = [replica.remote(backend, options) for _ in range(num_replicas)]
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


def load_vllm(options: ModelOptions) -> Backend:
    """Return one engine, or one for each group of `tensor_parallel_size` visible GPUs, or several on the CPU.

    Errors: ValueError if a group needs more GPUs than are visible.
    """
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


LOCAL_BACKENDS: dict[str, Callable[[ModelOptions], Backend]] = {"huggingface": HuggingFaceBackend, "vllm": load_vllm}

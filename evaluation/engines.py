"""The local engines by name; on several GPUs one engine for each (or each group that shares a model), through Ray."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from evaluation.backends import Answer, Backend, HuggingFaceBackend, ModelOptions, VllmBackend
from evaluation.samples import Sample


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
        self, backend: Callable[[ModelOptions], Backend], options: ModelOptions, num_replicas: int, gpus_each: int
    ) -> None:
        import ray
        from ray.exceptions import RayTaskError

        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False)
        replica = ray.remote(num_gpus=gpus_each, num_cpus=0)(_Replica)
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


def load_vllm(options: ModelOptions) -> Backend:
    """Return one engine, or one for each group of `tensor_parallel_size` visible GPUs.

    Errors: ValueError if a group needs more GPUs than are visible.
    """
    import torch

    gpus = torch.cuda.device_count()
    if options.tensor_parallel_size > max(gpus, 1):
        raise ValueError(f"--tensor_parallel_size {options.tensor_parallel_size}: {gpus} GPUs are visible")
    num_replicas = gpus // options.tensor_parallel_size
    if num_replicas < 2:
        return VllmBackend(options)
    return DataParallelBackend(VllmBackend, options, num_replicas, options.tensor_parallel_size)


LOCAL_BACKENDS: dict[str, Callable[[ModelOptions], Backend]] = {"huggingface": HuggingFaceBackend, "vllm": load_vllm}

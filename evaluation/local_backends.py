"""The back ends of this machine: one row each in LOCAL_BACKENDS."""

from collections.abc import Callable

from evaluation.backends import Backend, HuggingFaceBackend, ModelOptions, VllmBackend
from evaluation.data_parallel import DataParallelBackend


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

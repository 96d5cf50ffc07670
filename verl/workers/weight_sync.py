"""Weight sync from training ranks to rollout engines: CUDA IPC on GPUs, Ray's object store on CPUs."""

import os
from collections import ChainMap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import ray
import torch
import torch.distributed as dist
from torch import Tensor, nn

from verl.distributed.allocator import fixed_segments
from verl.distributed.fsdp import full_weights
from verl.distributed.watchdog import TIMEOUT_VARIABLE

MOST_CHUNK_BYTES = 2 << 30
CHUNKS_OF_MEMORY = 32
"""Parts of a GPU's memory of which a chunk takes at most one."""

Handles = dict[str, tuple[Any, ...]]  # GPU UUID -> arguments of rebuild_cuda_tensor


def send_weights(
    model: nn.Module,
    engines: Sequence[Any],
    device: torch.device,
    dtype: torch.dtype,
    memory_gb: float | None = None,
) -> None:
    """Gathers the full weights, on GPUs in chunks, and loads them into every engine; collective.

    On GPUs an engine rank maps the memory of the training rank on its GPU (CUDA IPC, vLLM's weight transfer). On a CPU
    rank 0 puts the weights into Ray's object store: one copy for all engines.

    Args:
        memory_gb: GiB of each GPU that the run may take; None: all.
    """
    is_sender = not dist.is_initialized() or dist.get_rank() == 0
    if device.type == "cuda":
        memory = memory_gb * 2**30 if memory_gb else torch.cuda.get_device_properties(device).total_memory
        chunk_bytes = int(min(MOST_CHUNK_BYTES, memory / CHUNKS_OF_MEMORY))
        _send_by_ipc(full_weights(model, dtype), engines, is_sender, chunk_bytes)
        return
    weights = [(name, tensor.detach()) for name, tensor in full_weights(model, dtype)]
    if is_sender:
        shared = ray.put(weights)
        _wait([engine.load_weights.remote(shared) for engine in engines])


def _send_by_ipc(
    weights: Iterable[tuple[str, Tensor]], engines: Sequence[Any], is_sender: bool, chunk_bytes: int
) -> None:
    for chunk in _copied_chunks(weights, chunk_bytes):
        tensors = [tensor for _, tensor in chunk]
        torch.cuda.synchronize()
        of_ranks = _gather_handles([_ipc_handle(tensor) for tensor in tensors])
        if is_sender:
            update = {
                "names": [name for name, _ in chunk],
                "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors],
                "shapes": [list(tensor.shape) for tensor in tensors],
            }
            parts = zip(engines, share_handles(of_ranks, len(engines)), strict=True)
            _wait([engine.receive_weights.remote(update | {"ipc_handles": own}) for engine, own in parts])
        if dist.is_initialized():
            dist.barrier(device_ids=[torch.cuda.current_device()])
        chunk.clear()  # freed before the next one is gathered
        del tensors
        torch.cuda.ipc_collect()
    if is_sender:
        _wait([engine.finish_weights.remote() for engine in engines])


def _wait(calls: list[Any]) -> None:
    """Waits for engines, a second longer than they take to write their stacks, so that the rank itself stays whole."""
    limit_s = os.environ.get(TIMEOUT_VARIABLE)
    ray.get(calls, timeout=float(limit_s) + 1 if limit_s else None)


def _copied_chunks(weights: Iterable[tuple[str, Tensor]], chunk_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Copies of consecutive weights, chunks of at least so many bytes except the last.

    Copies, since shared memory of a parameter itself could not be freed later; a gathered weight is freed once copied.
    """
    chunk: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in weights:
        with fixed_segments():
            chunk.append((name, tensor.detach().clone(memory_format=torch.contiguous_format)))
        size += tensor.nbytes
        del tensor
        if size >= chunk_bytes:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _ipc_handle(tensor: Tensor) -> Handles:
    from torch.multiprocessing.reductions import reduce_tensor

    _, arguments = reduce_tensor(tensor)
    return {str(torch.cuda.get_device_properties(tensor.device).uuid): arguments}


def _gather_handles(handles: list[Handles]) -> list[list[Handles]]:
    """Handles by rank and tensor; collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [handles]
    of_ranks: list[list[Handles]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, handles)
    return of_ranks


def share_handles(of_ranks: Sequence[list[Handles]], num_engines: int) -> list[list[Handles]]:
    """Handles by engine and tensor: each has its own GPUs' alone, or they would grow with the square of the GPUs.

    Args:
        of_ranks: by rank and tensor; as many neighbours share each engine.
    """
    size = len(of_ranks) // num_engines
    shares = [of_ranks[start : start + size] for start in range(0, len(of_ranks), size)]
    return [[dict(ChainMap(*copies)) for copies in zip(*share, strict=True)] for share in shares]

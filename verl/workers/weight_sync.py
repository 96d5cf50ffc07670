"""How new weights travel from the training ranks to the engines: the one place that differs between devices."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import ray
import torch
import torch.distributed as dist
from torch import Tensor, nn

from verl.fsdp import full_weights

CHUNK_BYTES = 2 << 30

Handles = dict[str, tuple[Any, ...]]  # id of a GPU -> what rebuilds a tensor that lies there


def send_weights(model: nn.Module, engines: Sequence[Any], device: torch.device, dtype: torch.dtype) -> None:
    """Gathers the model's full weights over all ranks and loads them into every engine; all ranks must call it.

    On GPUs the engines map the ranks' own memory (CUDA IPC, through vLLM's weight transfer), about CHUNK_BYTES at a
    time; each engine rank reads from the training rank that shares its GPU. On a CPU rank 0 hands the weights over
    through Ray's object store: one copy for all engines.
    """
    is_sender = not dist.is_initialized() or dist.get_rank() == 0
    if device.type == "cuda":
        _send_by_ipc(full_weights(model, dtype), engines, is_sender)
        return
    weights = [(name, tensor.detach()) for name, tensor in full_weights(model, dtype)]
    if is_sender:
        shared = ray.put(weights)
        ray.get([engine.load_weights.remote(shared) for engine in engines])


def _send_by_ipc(weights: Iterable[tuple[str, Tensor]], engines: Sequence[Any], is_sender: bool) -> None:
    for chunk in _chunks(weights):
        tensors = [tensor.detach().contiguous() for _, tensor in chunk]  # alive until the engines have read them
        torch.cuda.synchronize()
        handles = _merge_over_ranks([_ipc_handle(tensor) for tensor in tensors])
        if is_sender:
            update = {
                "names": [name for name, _ in chunk],
                "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors],
                "shapes": [list(tensor.shape) for tensor in tensors],
                "ipc_handles": handles,
            }
            ray.get([engine.receive_weights.remote(update) for engine in engines])
        if dist.is_initialized():
            dist.barrier(device_ids=[torch.cuda.current_device()])
        torch.cuda.ipc_collect()
    if is_sender:
        ray.get([engine.finish_weights.remote() for engine in engines])


def _chunks(weights: Iterable[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    """Consecutive weights of at least CHUNK_BYTES together."""
    chunk: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in weights:
        chunk.append((name, tensor))
        size += tensor.nbytes
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _ipc_handle(tensor: Tensor) -> Handles:
    from torch.multiprocessing.reductions import reduce_tensor

    _, arguments = reduce_tensor(tensor)
    return {str(torch.cuda.get_device_properties(tensor.device).uuid): arguments}


def _merge_over_ranks(handles: list[Handles]) -> list[Handles]:
    """For each tensor the handles of all ranks' copies."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return handles
    of_ranks: list[list[Handles]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, handles)
    return [{gpu: args for one in copies for gpu, args in one.items()} for copies in zip(*of_ranks, strict=True)]

"""Gathers of whole batches over the ranks of a group."""

from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict

from verl.protocol import DataProto


def allgather_dict_tensors(
    tensors: dict[str, torch.Tensor] | TensorDict, size: int, group: Any, dim: int = 0
) -> dict[str, torch.Tensor] | TensorDict:
    """The tensors of all ranks, joined along dim in the order of ranks; a TensorDict gives a TensorDict.

    Shapes must agree between ranks. One gather per key, in sorted order, so that ranks agree on the order.

    Args:
        size: number of ranks in the group.
    """
    gathered: dict[str, torch.Tensor] = {}
    mine: dict[str, torch.Tensor] = dict(tensors.items())  # type: ignore[arg-type]
    for key, tensor in sorted(mine.items()):
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(size)]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        gathered[key] = torch.cat(parts, dim=dim)
    if not isinstance(tensors, TensorDict):
        return gathered
    batch_size = list(tensors.batch_size)
    batch_size[dim] *= size
    return TensorDict(gathered, batch_size=batch_size)


def all_gather_data_proto(data: DataProto, size: int, group: Any) -> None:
    """Gives every rank the rows of all ranks, in the order of ranks, in place.

    Tensors pass through the group's device and come back to their own; non-tensors are pickled. A group of one rank
    moves nothing.
    """
    if size == 1:
        return
    if data.batch is not None:
        home = next(iter(data.batch.values())).device
        on_group = data.batch.to("cuda" if dist.get_backend(group) == "nccl" else "cpu")
        gathered = allgather_dict_tensors(on_group, size, group)
        data.batch = gathered.to(home)  # type: ignore[union-attr]
    parts: list[Any] = [None] * size
    dist.all_gather_object(parts, data.non_tensor_batch, group=group)
    rows = [DataProto(non_tensor_batch=part) for part in parts]
    data.non_tensor_batch = DataProto.concat(rows).non_tensor_batch
    data.check_consistency()

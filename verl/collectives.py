"""All-gather of tensor dictionaries and DataProto batches over a process group."""

from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict

from verl.protocol import DataProto


def allgather_dict_tensors(
    tensors: dict[str, torch.Tensor] | TensorDict, size: int, group: Any, dim: int = 0
) -> dict[str, torch.Tensor] | TensorDict:
    """Tensors of all ranks concatenated along dim in rank order; the result is a TensorDict when the input is one.

    Shapes must agree between ranks. Keys are gathered in sorted order, the same on all ranks.

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
    """Replaces the batch by the rows of all ranks, in rank order, in place.

    Tensors are gathered on the group's device and returned to their own; non-tensors are pickled. No-op for one rank.
    """
    if size == 1:
        return
    if data.batch is not None:
        device = next(iter(data.batch.values())).device
        on_group = data.batch.to("cuda" if dist.get_backend(group) == "nccl" else "cpu")
        gathered = allgather_dict_tensors(on_group, size, group)
        data.batch = gathered.to(device)  # type: ignore[union-attr]
    parts: list[Any] = [None] * size
    dist.all_gather_object(parts, data.non_tensor_batch, group=group)
    rows = [DataProto(non_tensor_batch=part) for part in parts]
    data.non_tensor_batch = DataProto.concat(rows).non_tensor_batch
    data.check_consistency()

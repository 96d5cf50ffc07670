"""Reads what a rank of EasyR1 or of SpatialThinker's release saved, whatever version of torch wrote it.

A DTensor is pickled with the fields that its classes had at the time, and a later torch builds broken objects from
them: the mesh of torch 2.5 keeps its ranks as `mesh`, that of 2.11 as `_layout` and `_rank_map`. Here these classes
become plain records. Only tensors and their parts are unpickled: no code of the file is run.
"""

import pickle
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import _utils

PARTS = ("DTensorSpec", "DeviceMesh", "TensorMeta", "Shard", "Replicate", "Partial", "_StridedShard", "_MeshLayout")
PARTS += ("ShardOrderEntry",)
ALLOWED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch", "Tensor"): torch.Tensor,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("torch._utils", "_rebuild_tensor_v2"): _utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): _utils._rebuild_parameter,
    ("torch.nn.parameter", "Parameter"): torch.nn.Parameter,
}


class Record:
    """An object of any class: what it was made with, and its fields."""

    def __new__(cls, *arguments: Any) -> "Record":
        record = super().__new__(cls)
        record.__dict__["arguments"] = arguments
        return record

    def __init__(self, *arguments: Any):
        """The arguments are kept by __new__, which alone is called when an object is unpickled."""


@dataclass(frozen=True)
class ShardedTensor:
    """One rank's part of a parameter."""

    local: torch.Tensor
    spec: Any

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of the whole parameter."""
        return tuple(self.spec.tensor_meta.arguments[0])

    @property
    def mesh_names(self) -> tuple[str, ...]:
        """Names of the mesh's dimensions."""
        fields = vars(self.spec.mesh)
        return tuple(fields.get("mesh_dim_names") or fields.get("_mesh_dim_names") or ())

    @property
    def ranks(self) -> torch.Tensor:
        """The ranks in the mesh's shape."""
        fields = vars(self.spec.mesh)
        known = fields.get("mesh", fields.get("_mesh"))
        if known is None:
            layout = fields["_layout"]
            shape, stride = ((size,) if isinstance(size, int) else size for size in (layout.shape, layout.stride))
            known = fields["_rank_map"].as_strided(shape, stride)
        return known

    @property
    def placement(self) -> tuple[str, int]:
        """Kind and dimension along the mesh's last dimension."""
        last = self.spec.placements[-1]
        return type(last).__name__, getattr(last, "dim", 0)


def _rebuild(function: Any, kind: Any, arguments: tuple, state: Any) -> Any:
    """In place of torch's own: a DTensor becomes a ShardedTensor, anything else what it was, without attributes."""
    if kind is ShardedTensor:
        fields: dict[str, Any] = {}
        for part in state if isinstance(state, tuple) else (state,):  # of __dict__ and of __slots__
            fields |= part or {}
        return ShardedTensor(fields["_local_tensor"], fields["_spec"])
    return function(*arguments)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        """The few names that weights consist of.

        Raises:
            pickle.UnpicklingError: any other.
        """
        if (module_name, global_name) in ALLOWED:
            return ALLOWED[module_name, global_name]
        if (module_name, global_name) == ("torch._tensor", "_rebuild_from_type_v2"):
            return _rebuild
        if module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype):
            return getattr(torch, global_name)
        if module_name == "torch._utils" and global_name == "_rebuild_wrapper_subclass":
            return None  # _rebuild has no use for it
        if module_name.startswith("torch.distributed.") and global_name == "DTensor":
            return ShardedTensor
        if module_name.startswith("torch.distributed.") and global_name in PARTS:
            return type(global_name, (Record,), {})
        raise pickle.UnpicklingError(f"it holds {module_name}.{global_name}, which is no part of weights")


class WeightsPickle:
    """Stand-in for the module `pickle` in torch.load."""

    Unpickler = _Unpickler

"""CPU offloading of tensors through pinned host memory.

PinnedBuffer    copies of a state dict in reused host memory: asynchronous checkpoints
Offloader       parameters and optimizer states, on the device only while a context manager is open
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from verl.distributed.optim import local_part

ALIGNMENT = 256
"""Bytes between starts of slots, for which a GPU's copies are fastest."""


class PinnedBuffer:
    """Host memory that is reused by every copy; pinned (page-locked) for copies from a GPU."""

    def __init__(self) -> None:
        self.memory: Tensor | None = None

    def slots(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """One uint8 slot per tensor, of as many bytes and with its own storage; earlier contents are lost.

        Raises:
            RuntimeError: the memory must be allocated anew and the driver refuses to pin it.
        """
        sizes = [tensor.numel() * tensor.itemsize for tensor in tensors]
        *starts, end = accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0)
        if self.memory is None or len(self.memory) != end:
            self.memory = None  # first: old and new buffer may not fit together
            self.memory = torch.empty(end, dtype=torch.uint8)
            if any(tensor.is_cuda for tensor in tensors):
                _pin(self.memory)
        return [_slot(self.memory, start, size) for start, size in zip(starts, sizes, strict=True)]

    def copy_state(self, state: Any) -> Any:
        """A copy of a nested state dict in this buffer; the next call overwrites it.

        Sharded tensors (DTensor) stay sharded, with their local parts in host memory.
        """
        with torch.no_grad():
            parts = {_tensor_key(leaf): local_part(leaf) for leaf in tree_leaves(state) if isinstance(leaf, Tensor)}
            copies = {}
            for (key, part), slot in zip(parts.items(), self.slots([*parts.values()]), strict=True):
                copies[key] = slot.view(part.dtype).view(part.shape).copy_(part, non_blocking=True)
            _synchronize(parts.values())
            return tree_map_only(Tensor, lambda leaf: _with_local_part(leaf, copies[_tensor_key(leaf)]), state)


def _tensor_key(tensor: Tensor) -> tuple[Any, ...]:
    """A key that tied tensors share."""
    part = local_part(tensor)
    return part.untyped_storage().data_ptr(), part.storage_offset(), part.shape, part.stride(), part.dtype


def _slot(memory: Tensor, start: int, size: int) -> Tensor:
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(memory.numpy(), dtype=torch.uint8, offset=start, count=size)


def _with_local_part(tensor: Tensor, part: Tensor) -> Tensor:
    """A host tensor of the same type and sharding, with `part` as its local part."""
    shell = torch.empty_like(tensor, device="cpu")
    local_part(shell).set_(part)  # type: ignore[call-overload]
    return shell


def _synchronize(tensors: Iterable[Tensor]) -> None:
    """Waits for asynchronous copies of these tensors; before that neither source nor target may change."""
    if any(tensor.is_cuda for tensor in tensors):
        torch.cuda.synchronize()


class OffloadedTensors:
    """Tensors that move between their device and pinned host memory and remain the same objects.

    Only their storages are freed and filled again, so FSDP2 and optimizers can keep their references.

    Args:
        tensors: returns the tensors at each call; of sharded ones the local parts are moved.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]]):
        self.tensors = tensors
        self.buffer = PinnedBuffer()
        self.slots: list[Tensor] = []
        self.offloaded: list[Tensor] = []  # whole storages as bytes

    def offload(self, have_changed: bool = True) -> None:
        """Copies the tensors to host memory and frees their device memory; they must not be read until `load`.

        Args:
            have_changed: False skips the copy: host memory still holds the same values.

        Raises:
            RuntimeError: at the first call, the driver refuses to pin the memory.
        """
        assert not self.offloaded, "the tensors are offloaded already"
        storages = _storages(self.tensors())
        if have_changed or not self.slots:
            self.slots = self.buffer.slots(storages)
            for slot, data in zip(self.slots, storages, strict=True):
                slot.copy_(data, non_blocking=True)
            _synchronize(storages)
        for data in storages:
            data.untyped_storage().resize_(0)
        self.offloaded = storages

    def load(self) -> None:
        """Copies the tensors back to their device; does nothing when they are there."""
        for slot, data in zip(self.slots if self.offloaded else [], self.offloaded, strict=True):
            data.untyped_storage().resize_(len(slot))
            data.copy_(slot, non_blocking=True)
        self.offloaded = []


class Offloader:
    """Offloaded tensors by owner: a model or an optimizer."""

    def __init__(self) -> None:
        self.by_owner: dict[Any, OffloadedTensors] = {}

    def offload(self, owner: Any, tensors: Callable[[], Iterable[Tensor]]) -> None:
        """Keeps the owner's tensors in host memory from now on, except inside `on_device`."""
        self.by_owner[owner] = OffloadedTensors(tensors)
        self.by_owner[owner].offload()

    @contextmanager
    def on_device(self, *owners: Any, have_changed: bool) -> Iterator[None]:
        """Context in which the tensors of these owners are on their device; unknown owners are skipped.

        Args:
            have_changed: True when the tensors may be changed inside, so that they must be copied back.
        """
        parts = [self.by_owner[owner] for owner in owners if owner in self.by_owner]
        for part in parts:
            part.load()
        try:
            yield
        finally:
            for part in parts:
                part.offload(have_changed)


def _storages(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Distinct whole storages of the tensors, as bytes."""
    storages = {}
    for tensor in tensors:
        storage = local_part(tensor.detach()).untyped_storage()
        if storage.nbytes():
            storages[storage.data_ptr()] = storage
    return [torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage) for storage in storages.values()]


def _pin(memory: Tensor) -> None:
    """Pins existing host memory; torch's pin_memory=True rounds up to a power of two and may waste half.

    Raises:
        RuntimeError: the driver refuses.
    """
    runtime: Any = torch.cuda.cudart()
    error = int(runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
    if error:
        raise RuntimeError(
            f"{memory.numel() / 2**30:.1f} GiB of host memory cannot be page-locked for copies from a GPU (CUDA error "
            f"{error}): give the machine or its container more; offload_params, offload_optimizer and checkpoints ask "
            "for it"
        )
    release = weakref.finalize(memory, runtime.cudaHostUnregister, memory.data_ptr())
    release.atexit = False

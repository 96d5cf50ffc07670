"""Host memory: copies of tensors in it, tensors that wait in it while others use their device, and what is in use."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from verl.optim import local_part

ALIGNMENT = 256
"""Bytes, of the places in host memory: what a GPU's copies are fastest at."""


class Room:
    """Host memory for copies, kept for the next ones; page-locked for a GPU's, so that they run at the bus's speed."""

    def __init__(self) -> None:
        self.memory: Tensor | None = None

    def places(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """For each tensor a place of as many bytes, a tensor with a storage of its own; what they held before is lost.

        Raises:
            RuntimeError: the driver does not lock the pages, when memory of another size is needed.
        """
        sizes = [tensor.numel() * tensor.itemsize for tensor in tensors]
        *starts, end = accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0)
        if self.memory is None or len(self.memory) != end:
            self.memory = None  # first, for there may be no room for both
            self.memory = torch.empty(end, dtype=torch.uint8)
            if any(tensor.is_cuda for tensor in tensors):
                _lock_pages(self.memory)
        return [_bytes_at(self.memory, start, size) for start, size in zip(starts, sizes, strict=True)]

    def copy_of(self, state: Any) -> Any:
        """The same nest of dicts and lists with copies of its tensors, which the next call overwrites.

        Sharded tensors stay sharded; their parts lie in host memory.
        """
        with torch.no_grad():
            parts = {_identity(leaf): local_part(leaf) for leaf in tree_leaves(state) if isinstance(leaf, Tensor)}
            copies = {}
            for (identity, part), place in zip(parts.items(), self.places([*parts.values()]), strict=True):
                copies[identity] = place.view(part.dtype).view(part.shape).copy_(part, non_blocking=True)
            _wait_for_copies(parts.values())
            return tree_map_only(Tensor, lambda leaf: _like(leaf, copies[_identity(leaf)]), state)


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Tensors that are tied have the same."""
    part = local_part(tensor)
    return part.untyped_storage().data_ptr(), part.storage_offset(), part.shape, part.stride(), part.dtype


def _bytes_at(memory: Tensor, start: int, size: int) -> Tensor:
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(memory.numpy(), dtype=torch.uint8, offset=start, count=size)


def _like(tensor: Tensor, part: Tensor) -> Tensor:
    """The tensor with this part of it in host memory for its own."""
    shell = torch.empty_like(tensor, device="cpu")
    local_part(shell).set_(part)  # type: ignore[call-overload]
    return shell


def _wait_for_copies(tensors: Iterable[Tensor]) -> None:
    """Until copies of these tensors are done: until then, what they are made from and to may not change."""
    if any(tensor.is_cuda for tensor in tensors):
        torch.cuda.synchronize()


class WaitingRoom:
    """Where some tensors of this rank wait in host memory; they stay the objects that they are.

    Only the memory behind them is let go of and filled again, so that whoever holds them, FSDP2 and optimizers, need
    not be told.

    Args:
        tensors: gives the tensors at each call; sharded ones stand for this rank's part.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]]):
        self.tensors = tensors
        self.room = Room()
        self.places: list[Tensor] = []
        self.waiting: list[Tensor] = []  # whole storages as bytes

    def take(self, have_changed: bool = True) -> None:
        """Lets the tensors wait here and frees their device's memory; nothing may read them until they are back.

        Args:
            have_changed: whether they may differ from what they were when they last waited here.

        Raises:
            RuntimeError: the driver does not lock the pages, when they first wait here.
        """
        assert not self.waiting, "they wait already"
        storages = _storages(self.tensors())
        if have_changed or not self.places:
            self.places = self.room.places(storages)
            for place, data in zip(self.places, storages, strict=True):
                place.copy_(data, non_blocking=True)
            _wait_for_copies(storages)
        for data in storages:
            data.untyped_storage().resize_(0)
        self.waiting = storages

    def give_back(self) -> None:
        """Brings the tensors back to where they were; does nothing if they are there."""
        for place, data in zip(self.places if self.waiting else [], self.waiting, strict=True):
            data.untyped_storage().resize_(len(place))
            data.copy_(place, non_blocking=True)
        self.waiting = []


class WaitingRooms:
    """The rooms of all that waits, by its owner: a model or an optimizer."""

    def __init__(self) -> None:
        self.rooms: dict[Any, WaitingRoom] = {}

    def let_wait(self, owner: Any, tensors: Callable[[], Iterable[Tensor]]) -> None:
        """Has the owner's tensors wait from now on, except inside `left_by`."""
        self.rooms[owner] = WaitingRoom(tensors)
        self.rooms[owner].take()

    @contextmanager
    def left_by(self, *owners: Any, have_changed: bool) -> Iterator[None]:
        """Inside, the tensors of these owners are where they were before they waited; others' are left alone.

        Args:
            have_changed: whether they may differ afterwards, so that they must be copied again.
        """
        rooms = [self.rooms[owner] for owner in owners if owner in self.rooms]
        for room in rooms:
            room.give_back()
        try:
            yield
        finally:
            for room in rooms:
                room.take(have_changed)


def _storages(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The bytes of the tensors' whole storages, each once."""
    storages = {}
    for tensor in tensors:
        storage = local_part(tensor.detach()).untyped_storage()
        if storage.nbytes():
            storages[storage.data_ptr()] = storage
    return [torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage) for storage in storages.values()]


def _lock_pages(room: Tensor) -> None:
    """torch.empty's own page-locked memory is rounded up to a power of two, half of which may be waste.

    Raises:
        RuntimeError: the driver refuses.
    """
    runtime: Any = torch.cuda.cudart()
    error = int(runtime.cudaHostRegister(room.data_ptr(), room.numel(), 0))
    if error:
        raise RuntimeError(
            f"{room.numel() / 2**30:.1f} GiB of host memory cannot be page-locked for copies from a GPU (CUDA error "
            f"{error}): give the machine or its container more; offload_params, offload_optimizer and checkpoints ask "
            "for it"
        )
    release = weakref.finalize(room, runtime.cudaHostUnregister, room.data_ptr())
    release.atexit = False


def host_memory_metrics() -> dict[str, tuple[float, float]]:
    """What this process holds of its machine's memory and what all hold, as (sum, weight)."""
    memory = psutil.virtual_memory()
    return {
        "perf/max_rank_memory_gb": (psutil.Process().memory_info().rss / 2**30, 1.0),
        "perf/max_host_memory_share": (1 - memory.available / memory.total, 1.0),
    }

"""Host memory: tensors that wait in it while others use their device, and how much of it is in use."""

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import Tensor

from verl.optim import local_part

ALIGNMENT = 256
"""Bytes, of the places in host memory: what a GPU's copies are fastest at."""


class HostRoom:
    """Room in host memory for some tensors of this rank, which stay the objects they are.

    Only the memory behind them is let go of and filled again, so that whoever holds them, FSDP2 and optimizers, need
    not be told. The room is made when they first wait in it, is page-locked where they come from a GPU, so that copies
    run at the bus's speed, and is kept.

    Args:
        tensors: gives the tensors at each call; sharded ones stand for this rank's part.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]]):
        self.tensors = tensors
        self.room: Tensor | None = None
        self.waiting: list[Tensor] = []  # whole storages as bytes

    def take(self, have_changed: bool = True) -> None:
        """Lets the tensors wait here and frees their device's memory; nothing may read them until they are back.

        Args:
            have_changed: whether they may differ from what the room holds since they last waited here.
        """
        assert not self.waiting, "they wait already"
        self.waiting = _storages(self.tensors())
        if have_changed or self.room is None:
            for place, data in zip(self._places(), self.waiting, strict=True):
                place.copy_(data, non_blocking=True)
            if any(data.is_cuda for data in self.waiting):
                torch.cuda.synchronize()  # no copy may be under way when the memory becomes another's
        for data in self.waiting:
            data.untyped_storage().resize_(0)

    def give_back(self) -> None:
        """Brings the tensors back to where they were; does nothing if they are there."""
        for place, data in zip(self._places(), self.waiting, strict=True):
            data.untyped_storage().resize_(len(place))
            data.copy_(place, non_blocking=True)
        self.waiting = []

    def _places(self) -> list[Tensor]:
        """The waiting tensors' parts of the room."""
        if not self.waiting:
            return []
        sizes = [data.shape[0] for data in self.waiting]
        spaces = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
        if self.room is None:
            self.room = torch.empty(sum(spaces), dtype=torch.uint8)
            if any(data.is_cuda for data in self.waiting):
                _lock_pages(self.room)
        assert len(self.room) == sum(spaces), "the room was made for other tensors"
        return [part[:size] for part, size in zip(self.room.split(spaces), sizes, strict=True)]


class HostRooms:
    """The rooms of all that waits, by its owner: a model or an optimizer."""

    def __init__(self) -> None:
        self.rooms: dict[Any, HostRoom] = {}

    def let_wait(self, owner: Any, tensors: Callable[[], Iterable[Tensor]]) -> None:
        """Has the owner's tensors wait from now on, except inside `left_by`."""
        self.rooms[owner] = HostRoom(tensors)
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
    """torch.empty's own page-locked memory is rounded up to a power of two, half of which may be waste."""
    runtime: Any = torch.cuda.cudart()
    error = int(runtime.cudaHostRegister(room.data_ptr(), room.numel(), 0))
    if error:
        size = room.numel() / 2**30
        warnings.warn(
            f"{size:.1f} GiB of host memory cannot be page-locked (CUDA error {error}): what waits there is moved "
            "several times slower; raise the limit of locked memory (ulimit -l)",
            stacklevel=2,
        )
        return
    release = weakref.finalize(room, runtime.cudaHostUnregister, room.data_ptr())
    release.atexit = False


def host_memory_metrics() -> dict[str, tuple[float, float]]:
    """What this process holds of its machine's memory and what all hold, as (sum, weight)."""
    memory = psutil.virtual_memory()
    return {
        "perf/max_rank_memory_gb": (psutil.Process().memory_info().rss / 2**30, 1.0),
        "perf/max_host_memory_share": (1 - memory.available / memory.total, 1.0),
    }

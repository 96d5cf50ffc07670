"""torch's memory on a GPU: segments that grow, so that a pass over other numbers of tokens needs no new ones.

torch keeps freed memory in segments of the sizes that were asked for. Passes over responses of other lengths than
before ask for other sizes: hundreds of new segments, and the old ones stay, held but of no use.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from verl.model.internals import is_usable

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Environment variables by which a user sets torch's allocator."""
GROWING, FIXED = "expandable_segments:True", "expandable_segments:False"


def grow_segments() -> None:
    """Lets segments grow from here on, unless the environment sets the allocator."""
    if not _users_settings() and is_usable("growing memory"):
        torch._C._accelerator_setAllocatorSettings(GROWING)


@contextmanager
def fixed_segments() -> Iterator[None]:
    """Context whose tensors another process can map by CUDA IPC, which takes no segment that grows."""
    settings = _users_settings()
    grows = GROWING in settings if settings else is_usable("growing memory")
    if not grows:
        yield
        return
    torch._C._accelerator_setAllocatorSettings(FIXED)
    try:
        yield
    finally:
        torch._C._accelerator_setAllocatorSettings(GROWING)


def _users_settings() -> str:
    return ",".join(filter(None, map(os.environ.get, VARIABLES)))

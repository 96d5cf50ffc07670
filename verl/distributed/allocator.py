"""Expandable segments of torch's CUDA allocator: memory that passes over other numbers of tokens use again.

Without them torch keeps freed memory in segments of the sizes that were asked for (fragmentation). Passes over
responses of other lengths ask for other sizes: new segments, beside old ones that are held but of no use.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from verl.model.internals import is_usable

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Environment variables by which a user sets torch's allocator."""
EXPANDABLE, FIXED = "expandable_segments:True", "expandable_segments:False"
PART = "expandable segments"  # in internals.py


def expand_segments() -> None:
    """Makes segments expandable from here on, unless the environment sets the allocator."""
    if not _users_settings() and is_usable(PART):
        torch._C._accelerator_setAllocatorSettings(EXPANDABLE)


@contextmanager
def fixed_segments() -> Iterator[None]:
    """Context whose tensors another process can map by CUDA IPC, which takes no expandable segments."""
    settings = _users_settings()
    if not is_usable(PART) or (settings and EXPANDABLE not in settings):
        yield
        return
    torch._C._accelerator_setAllocatorSettings(FIXED)
    try:
        yield
    finally:
        torch._C._accelerator_setAllocatorSettings(EXPANDABLE)


def _users_settings() -> str:
    return ",".join(filter(None, map(os.environ.get, VARIABLES))).replace(" ", "")

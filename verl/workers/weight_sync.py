"""How new weights travel from the training ranks to the engines: the one place that differs between devices."""

from collections.abc import Sequence
from typing import Any

import ray
import torch
from torch import nn

from verl.fsdp import full_weights


def send_weights(model: nn.Module, engines: Sequence[Any], rank: int, dtype: torch.dtype) -> None:
    """Gathers the model's full weights over all ranks and loads them into every engine; all ranks must call it.

    On a CPU rank 0 hands them over through Ray's object store: one copy for all engines.
    """
    weights = [(name, tensor.detach().cpu()) for name, tensor in full_weights(model, dtype)]
    if rank == 0:
        shared = ray.put(weights)
        ray.get([engine.load_weights.remote(shared) for engine in engines])

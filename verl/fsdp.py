"""FSDP2 around a model: process group, sharding, host memory, schedule, gradient norm, full weights."""

import dataclasses
import datetime
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from verl.lora import merged_weights
from verl.model_families import decoder, vision_tower
from verl.optim import local_part

COLLECTIVE_TIMEOUT_S = 1800
START_TIMEOUT_S = 180
CLIP_EPS = 1e-6
"""What torch.nn.utils.clip_grad_norm_ adds to the norm that it divides by."""

DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
}


def open_store(host: str) -> tuple[dist.TCPStore, int]:
    """A rendezvous store on a port that the system picked, and that port: no gap in which another takes it."""
    timeout = datetime.timedelta(seconds=START_TIMEOUT_S)
    store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
    return store, store.port


def join_store(host: str, port: int) -> dist.TCPStore:
    """The store that rank 0 opened."""
    return dist.TCPStore(host, port, is_master=False, timeout=datetime.timedelta(seconds=START_TIMEOUT_S))


def init_mesh(
    store: dist.Store,
    rank: int,
    world_size: int,
    device: torch.device,
    start_timeout_s: float = START_TIMEOUT_S,
    with_host_memory: bool = False,
) -> DeviceMesh:
    """A mesh of all ranks over NCCL or gloo, with host memory over both, tried with one all-reduce.

    Raises:
        RuntimeError: the ranks do not find each other, or the all-reduce does not end, within `start_timeout_s`.
    """
    limit = datetime.timedelta(seconds=start_timeout_s)
    store.set_timeout(limit)
    try:
        mesh = _join(store, rank, world_size, device, limit, with_host_memory)
        total = torch.ones(1, device=device)
        work = dist.all_reduce(total, async_op=True)
        assert work is not None
        work.wait(limit)
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_S))
    except (RuntimeError, TimeoutError) as error:
        interfaces = "NCCL_SOCKET_IFNAME" if device.type == "cuda" else "GLOO_SOCKET_IFNAME"
        raise RuntimeError(
            f"rank {rank} of {world_size} cannot talk to the others: the first all-reduce did not end within "
            f"{start_timeout_s:g} s ({error}); look for a rank that failed before it or a firewall between nodes, or "
            f"set {interfaces} to the network that joins them (NCCL_DEBUG=INFO says more)"
        ) from error
    assert int(total) == world_size, f"all-reduce of ones over {world_size} ranks gave {int(total)}"
    return mesh


def _join(
    store: dist.Store,
    rank: int,
    world_size: int,
    device: torch.device,
    limit: datetime.timedelta,
    with_host_memory: bool,
) -> DeviceMesh:
    if device.type == "cuda":
        torch.cuda.init()  # the mesh would otherwise guess which GPU is this rank's
    backend = "gloo" if device.type != "cuda" else "cpu:gloo,cuda:nccl" if with_host_memory else "nccl"
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=limit,
    )
    return init_device_mesh(device.type, (world_size,), mesh_dim_names=("fsdp",))


def sharding_units(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that are gathered one at a time: each layer of the decoder, and the tower as a whole.

    A tower's blocks are many and small: to gather each costs the host more time than its work takes on a GPU.
    """
    tower = vision_tower(model)
    return [*decoder(model).layers] if tower is None else [tower, *decoder(model).layers]


def shard(
    model: nn.Module,
    mesh: DeviceMesh,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    is_in_host_memory: bool = False,
) -> None:
    """Shards the model in place, each of its units for itself and then the rest.

    With `is_in_host_memory` parameters, gradients and so the optimizer stay on the CPU, and each unit visits its
    device to compute.

    Args:
        model: a ResponseLogProbs or ResponseValues.
    """
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=True)
    # What reaches a unit has its type already; only the tower's rotary tables have a finer one, and shall keep it.
    unit_policy = dataclasses.replace(policy, cast_forward_inputs=False)
    offload = CPUOffloadPolicy() if is_in_host_memory and mesh.device_type == "cuda" else OffloadPolicy()
    pretrained: Any = model.model
    for unit in sharding_units(pretrained):
        fully_shard(unit, mesh=mesh, mp_policy=unit_policy, offload_policy=offload)
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload)
    if isinstance(offload, CPUOffloadPolicy):
        for buffer in model.buffers():  # only parameters visit the device by themselves
            buffer.data = buffer.data.to(mesh.device_type)


def lr_factor(
    step: int, num_steps: int, num_warmup_steps: int, scheduler_type: str = "constant", min_ratio: float = 0.0
) -> float:
    """Learning-rate factor of training step `step` (from 0): linear warm-up to 1, then constant or cosine.

    The first step already learns ((step + 1) / warm-up), and cosine stays at `min_ratio` after the last step.
    """
    if step < num_warmup_steps:
        return (step + 1) / num_warmup_steps
    if scheduler_type == "constant":
        return 1.0
    progress = min(1.0, (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps))
    return (1 + min_ratio) / 2 + (1 - min_ratio) / 2 * math.cos(math.pi * progress)


def clip_grad_norm(model: nn.Module, max_norm: float) -> float:
    """The L2 norm of all gradients over all ranks, in float32, after which they are scaled down to `max_norm`.

    torch's own takes each tensor's norm in the tensor's type, and each operation on sharded tensors by itself.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if not gradients:
        return 0.0
    parts = [local_part(gradient) for gradient in gradients]
    total = torch.stack(torch._foreach_norm(parts, dtype=torch.float32)).square().sum()
    if isinstance(gradients[0], DTensor):
        dist.all_reduce(total, group=gradients[0].device_mesh.get_group())
    norm = total.sqrt()
    torch._foreach_mul_(parts, (max_norm / (norm + CLIP_EPS)).clamp(max=1.0))
    return float(norm)


def whole(tensor: Tensor) -> Tensor:
    """The tensor put together from all ranks, on the device of its mesh; all ranks must call it."""
    if not isinstance(tensor, DTensor):
        return tensor
    there: Any = tensor.to(tensor.device_mesh.device_type)
    return there.full_tensor()


def full_weights(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Names and whole tensors of the model, adapters merged, gathered one at a time; all ranks must iterate."""
    for name, tensor in merged_weights(model, whole):
        yield name, tensor.to(dtype) if dtype is not None else tensor

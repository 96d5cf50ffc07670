"""FSDP2: process group, sharding, CPU offloading, LR warmup and schedule, gradient clipping, full weights."""

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

from verl.distributed.groups import COLLECTIVE_TIMEOUT_S, START_TIMEOUT_S, naming_network
from verl.distributed.optim import local_part
from verl.model.families import decoder, vision_encoder
from verl.model.lora import merged_weights

CLIP_EPS = 1e-6
"""Added to the norm in the clipping coefficient, as in torch.nn.utils.clip_grad_norm_."""

DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
}


def open_store(host: str) -> tuple[dist.TCPStore, int]:
    """A rendezvous store on a port chosen by the system, and the port; no process can take it in between."""
    timeout = datetime.timedelta(seconds=START_TIMEOUT_S)
    store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
    return store, store.port


def join_store(host: str, port: int) -> dist.TCPStore:
    """Connects to the store that rank 0 opened."""
    return dist.TCPStore(host, port, is_master=False, timeout=datetime.timedelta(seconds=START_TIMEOUT_S))


def init_mesh(
    store: dist.Store,
    rank: int,
    world_size: int,
    device: torch.device,
    start_timeout_s: float = START_TIMEOUT_S,
    with_cpu_backend: bool = False,
) -> DeviceMesh:
    """A device mesh of all ranks over NCCL or gloo, over both with CPU offloading, tested by one all-reduce.

    Raises:
        RuntimeError: the ranks do not find each other, or the all-reduce does not end, within `start_timeout_s`.
    """
    limit = datetime.timedelta(seconds=start_timeout_s)
    store.set_timeout(limit)
    with naming_network(rank, world_size, "the first all-reduce", device.type == "cuda", start_timeout_s):
        mesh = _join(store, rank, world_size, device, limit, with_cpu_backend)
        total = torch.ones(1, device=device)
        work = dist.all_reduce(total, async_op=True)
        assert work is not None
        work.wait(limit)
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_S))
    assert int(total) == world_size, f"all-reduce of ones over {world_size} ranks gave {int(total)}"
    return mesh


def _join(
    store: dist.Store,
    rank: int,
    world_size: int,
    device: torch.device,
    limit: datetime.timedelta,
    with_cpu_backend: bool,
) -> DeviceMesh:
    if device.type == "cuda":
        torch.cuda.init()  # the mesh would otherwise guess which GPU is this rank's
    backend = "gloo" if device.type != "cuda" else "cpu:gloo,cuda:nccl" if with_cpu_backend else "nccl"
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=limit,
    )
    return init_device_mesh(device.type, (world_size,), mesh_dim_names=("fsdp",))


def sharding_units(model: PreTrainedModel) -> list[nn.Module]:
    """FSDP units, gathered one at a time: each decoder layer, and the whole vision encoder.

    Encoder layers are many and small: a gather per layer costs the host more time than the layer costs the GPU.
    """
    encoder = vision_encoder(model)
    return [*decoder(model).layers] if encoder is None else [encoder, *decoder(model).layers]


def shard(
    model: nn.Module,
    mesh: DeviceMesh,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    cpu_offload: bool = False,
    is_moved: bool = False,
) -> None:
    """Shards the model in place: each FSDP unit, then the root with the rest.

    A single GPU that stores what it computes with has nothing to share or to cast, and its model stays as it is: FSDP
    would copy every parameter for every pass, which takes the host longer than a small pass takes the GPU.

    Args:
        model: a ResponseLogProbs or ResponseValues.
        cpu_offload: True keeps parameters, gradients and optimizer on the CPU (FSDP's CPUOffloadPolicy); each unit is
            copied to its device to compute.
        is_moved: True if the storages of the parameters will be freed and filled again (Offloader).
    """
    types = {parameter.dtype for parameter in model.parameters()}
    if mesh.device_type == "cuda" and mesh.size() == 1 and types == {param_dtype} and not (cpu_offload or is_moved):
        return
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=True)
    # Inputs of a unit have their type already; the vision encoder's float32 RoPE tables must not be cast.
    unit_policy = dataclasses.replace(policy, cast_forward_inputs=False)
    offload = CPUOffloadPolicy() if cpu_offload and mesh.device_type == "cuda" else OffloadPolicy()
    pretrained: Any = model.model
    for unit in sharding_units(pretrained):
        fully_shard(unit, mesh=mesh, mp_policy=unit_policy, offload_policy=offload)
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload)
    if isinstance(offload, CPUOffloadPolicy):
        for buffer in model.buffers():  # FSDP moves only parameters
            buffer.data = buffer.data.to(mesh.device_type)


def lr_factor(
    step: int, num_steps: int, num_warmup_steps: int, scheduler_type: str = "constant", min_ratio: float = 0.0
) -> float:
    """Learning-rate factor of training step `step` (from 0): linear LR warmup to 1, then constant or cosine decay.

    Warmup factors are (step + 1) / num_warmup_steps, above 0 at step 0; cosine stays at `min_ratio` after num_steps.
    """
    if step < num_warmup_steps:
        return (step + 1) / num_warmup_steps
    if scheduler_type == "constant":
        return 1.0
    progress = min(1.0, (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps))
    return (1 + min_ratio) / 2 + (1 - min_ratio) / 2 * math.cos(math.pi * progress)


def clip_grad_norm(model: nn.Module, max_norm: float) -> float:
    """Clips gradients to a global L2 norm of `max_norm` over all ranks, in float32; returns the norm before clipping.

    torch's clip_grad_norm_ computes norms in each tensor's type and dispatches every DTensor operation separately.
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


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of a DTensor, gathered on its mesh's device; collective."""
    if not isinstance(tensor, DTensor):
        return tensor
    there: Any = tensor.to(tensor.device_mesh.device_type)
    return there.full_tensor()


def full_weights(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Names and full tensors of the model, LoRA merged, gathered one at a time; collective."""
    for name, tensor in merged_weights(model, full_tensor):
        yield name, tensor.to(dtype) if dtype is not None else tensor

"""NVLink multicast, which stays off: a process that dies in it can leave the GPUs of a host unusable."""

import os
from collections.abc import Mapping
from typing import Any

WITHOUT_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0",
    "NVSHMEM_DISABLE_NVLS": "1",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
}
"""Variables that keep NCCL, NVSHMEM, torch and vLLM off it."""


def multicast_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables of WITHOUT_MULTICAST; what the environment sets stays."""
    return {name: environment.get(name, value) for name, value in WITHOUT_MULTICAST.items()}


def nccl_only(num_gpus: int) -> dict[str, Any]:
    """Arguments of a vLLM engine whose GPUs talk over NCCL alone; none for a single GPU.

    vLLM's own all-reduce shares memory of CUDA graphs by handles, which sleep mode frees, and its fused ones use
    multicast whatever the environment says.
    """
    if num_gpus == 1:
        return {}
    passes = {"fuse_allreduce_rms": False, "fuse_gemm_comms": False}
    return {"disable_custom_all_reduce": True, "compilation_config": {"pass_config": passes}}

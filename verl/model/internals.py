"""Uses of internals of vLLM, torch and the like, which any release may change, with the versions they are written for.

A part with a plain way asks `is_usable` and takes that way with another version. The others rely on the version check
at the start of each program (spatialthinker/versions.py).
"""

from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version


@dataclass(frozen=True)
class Part:
    """A use of internals in some files, written for packages with their versions."""

    written_for: tuple[str, ...]
    files: tuple[str, ...]
    uses: str
    instead: str = ""
    """The plain way with another version; empty when there is none."""
    key: str = ""
    """Its configuration key."""


PARTS = {
    "fast scheduler": Part(
        ("vllm==0.25.1",),
        ("verl/workers/decode_scheduler.py", "verl/workers/decode_batch.py", "verl/workers/rollout.py"),
        "subclass of Scheduler, lists and counters of Request, KVCacheManager's methods replaced, the engine's hasher",
        "vLLM's own scheduler and hasher",
        "worker.rollout.fast_scheduler",
    ),
    "shared-prefix attention": Part(
        ("vllm==0.25.1",),
        ("verl/workers/shared_prefix.py",),
        "subclasses of FlashAttention's backend, metadata and KV cache layout, merge_attn_states",
        "vLLM's own attention",
        "worker.rollout.shared_prompt",
    ),
    "fused layers": Part(
        ("liger-kernel==0.8.5", "transformers==5.17.0"),
        ("verl/model/fused_layers.py",),
        "Liger's table of models and ops.rope, RoPE functions and MLP forwards of transformers' models replaced",
        "the model's own layers",
        "worker.actor.model.use_fused_layers",
    ),
    "flash attention of groups": Part(
        ("torch==2.11.0",),
        ("verl/model/attention.py",),
        "torch.ops.torch_attn._varlen_attn and its backward pass",
        "scaled dot-product attention over padded tables",
    ),
    "flash attention for Hopper": Part(
        ("vllm==0.25.1",),
        ("verl/model/kernels/hopper.py",),
        "vllm_flash_attn: flash_attn_varlen_func with fa_version=3",
        "torch's flash attention",
    ),
    "flash attention backward for Hopper": Part(
        ("vllm==0.25.1", "nvidia-cutlass-dsl==4.5.2", "quack-kernels==0.5.0"),
        ("verl/model/kernels/hopper.py",),
        "vllm_flash_attn.cute.interface: _flash_attn_bwd and the sizes that its kernels are compiled for",
        "torch's backward pass",
    ),
    "expandable segments": Part(
        ("torch==2.11.0",),
        ("verl/distributed/allocator.py",),
        "torch._C._accelerator_setAllocatorSettings, by which memory for CUDA IPC lies in fixed segments",
        "segments of the sizes that were asked for",
    ),
    "linear attention": Part(
        ("fla-core==0.6.0", "transformers==5.17.0"),
        ("verl/model/linear_attention.py",),
        "chunk_gated_delta_rule and causal_conv1d; submodules of a gated delta net, whose forward pass is replaced",
        "a slow form in torch",
    ),
    "engine steps": Part(
        ("vllm==0.25.1",),
        ("verl/workers/rollout.py", "evaluation/engines/local.py"),
        "LLM.llm_engine, renderer and request_counter; set_random_seed in the engine's processes, and init_snapshot, "
        "requested_memory and device of a worker",
    ),
    "routing replay": Part(
        ("vllm==0.25.1", "transformers==5.17.0"),
        ("verl/workers/routing.py", "verl/model/experts.py"),
        "MoERunner and its kernels' forward_monolithic, routed_experts_capturer, routed_experts of outputs, flags of "
        "scheduler and runner; forward pass of a decoder layer with experts",
    ),
    "weight sync": Part(
        ("vllm==0.25.1", "torch==2.11.0"),
        ("verl/workers/rollout.py", "verl/workers/weight_sync.py"),
        "LLM.start_weight_update, update_weights and finish_weight_update, reload_weights, format of CUDA IPC handles",
    ),
    "model families": Part(
        ("transformers==5.17.0",),
        ("verl/model/families.py", "verl/model/attention.py", "verl/model/qwen_vl.py"),
        "vision_utils, submodules and get_image_features of each model, keywords passed to attention, smart_resize",
    ),
    "activation checkpointing": Part(
        ("transformers==5.17.0", "torch==2.11.0"),
        ("verl/model/checkpointing.py",),
        "GradientCheckpointingLayer._gradient_checkpointing_func, names of attention's operators",
    ),
    "optimizer steps": Part(
        ("torch==2.11.0",),
        ("verl/distributed/optim.py", "verl/distributed/fsdp.py"),
        "torch._foreach_*",
    ),
    "timeout of collectives": Part(
        ("torch==2.11.0",),
        ("verl/distributed/fsdp.py", "verl/distributed/groups.py"),
        "torch.distributed.distributed_c10d._set_pg_timeout",
    ),
    "CPU offload": Part(
        ("torch==2.11.0",),
        ("verl/distributed/cpu_offload.py",),
        "torch.utils._pytree; storages resized under FSDP2 and optimizers",
    ),
    "checkpoints of other trainers": Part(
        ("torch==2.11.0",),
        ("verl/export/rank_pickle.py",),
        "torch._utils and torch.serialization._get_layout, which pickles name",
    ),
    "object store in the memory benchmark": Part(
        ("ray==2.60.0",),
        ("verl/bench/step_memory.py",),
        "ray._private.internal_api.memory_summary",
    ),
    "toy model": Part(
        ("transformers==5.17.0",),
        ("scripts/toy/model.py", "scripts/toy/training.py"),
        "modules of transformers.models, vision_utils",
    ),
}
"""Name -> part, those with a plain way first."""


@cache
def is_usable(name: str) -> bool:
    """True when the packages of a part have its versions; False, after one line of warning, when one has another."""
    part = PARTS[name]
    for package, _, wanted in (requirement.partition("==") for requirement in part.written_for):
        installed = _installed_version(package)
        if installed != wanted:
            key = f"{part.key}: " if part.key else ""
            print(  # noqa: T201
                f"Warning: {key}the {name} is written for {package} {wanted}, and {installed} is installed; it is not "
                f"used, but {part.instead}",
                flush=True,
            )
            return False
    return True


def _installed_version(package: str) -> str:
    for distribution in (package, f"{package}-cpu"):  # vLLM has a distribution for CPUs
        with suppress(PackageNotFoundError):
            return version(distribution).partition("+")[0]
    return "none"

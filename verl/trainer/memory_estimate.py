"""Memory estimate of a run by phase, from model shape and batch sizes alone.

Letters: N parameters, W ranks, L layers, D hidden size, I intermediate size, P prompt and R response tokens,
T packed tokens of a micro-batch, n responses per prompt; b bytes of a number in some type.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from verl.config.auto import without_auto
from verl.config.records import Config
from verl.model.flops import count_linear

GB = 1024**3
NUM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
PIXEL_BYTES = 4  # float32
BATCH_COPIES = 3  # of a batch: in driver, object store and rank
GPU_ALLOWANCE_GB = 8.0
"""Overhead per GPU beside a phase's tensors: CUDA contexts of rank and sleeping engine with NCCL buffers (5.5 GiB
measured), and allocator fragmentation; together 4.7 to 9.0 GiB at Qwen2.5-VL-3B's size on one and on four GPUs."""
LOGIT_CHUNK_GB = 1.0  # one chunk of logits; twice, for a matmul output beside it
PROCESS_GB = {"driver": 1.0, "rank": 1.2, "engine": 2.5, "scoring": 0.7}  # interpreter, libraries, tokenizer


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model for the estimate; unless noted, in parameters.

    Attributes:
        parameters, vision_parameters: of the whole model, and of its vision encoder (0 without one).
        largest_block: largest FSDP unit: a decoder layer. The vision encoder is gathered as a whole too, but before
            any decoder layer saves activations.
        root: FSDP's root unit, outside decoder layers and vision encoder: embeddings, output head, norm.
        layers, hidden, intermediate: L, D, I of the decoder.
        kv_width: elements of keys and values of one token in one layer; in the mean where some have linear attention.
        vision_depth, vision_hidden, patch_numbers, patches_per_token: of the vision encoder; elements of a patch.
        adapters: trained with LoRA; 0: estimated from the other sizes.
    """

    parameters: int
    vision_parameters: int
    largest_block: int
    root: int
    layers: int
    hidden: int
    intermediate: int
    kv_width: int
    vision_depth: int = 0
    vision_hidden: int = 0
    patch_numbers: int = 0
    patches_per_token: int = 1
    adapters: int = 0


@dataclass(frozen=True)
class DataShape:
    """Sizes of the data for the estimate: bytes of encoded images and raw frames, and patches, per prompt."""

    mean_image_bytes: float
    mean_patches: float
    max_patches: int


@dataclass(frozen=True)
class Phase:
    """Memory of one phase of a step, in GiB: tensors on each rank's device, and host memory of each machine."""

    name: str
    device_gb: float
    host_gb: float


def estimate_memory(config: Config, model: ModelShape, data: DataShape) -> list[Phase]:
    """Memory of each phase of a run; a GPU needs GPU_ALLOWANCE_GB on top. A model that stays unsharded needs less.

    device, resident: policy Nb/W + reference Nb/W + optimizer Nb/W times 2 (adamw) or 3 (adamw_bf16: moments and
        rest of the bits), b of worker.actor.fsdp.torch_dtype; gradients and states only of what is trained, and no
        reference model with LoRA; the same for a critic. Offloaded tensors leave the device during rollout and
        count as host memory; with fsdp.enable_cpu_offload they never lie on it as a whole.
    device, load: resident + Nb, since a rank loads the full model before sharding it.
    device, rollout: resident + engine Nb / tensor_parallel_size + KV cache of max_num_batched_tokens; the engine then
        takes more up to gpu_memory_utilization.
    device, log-probs: resident + gathered FSDP units + one layer's activations T (8D + 4I) b + logits.
    device, update: the same + gradients Nb/W + saved activations T L D b (activation checkpointing; L times one
        layer's without) + those of the vision encoder + unsharded gradients of the gathered unit.
    host, always: processes + encoded images of the batch, BATCH_COPIES times + tokens and log-probs of the batch +
        the copy of a checkpoint that is written asynchronously.
    host, load: + Nb for each rank of the machine. host, log-probs and update: + all patches of the batch.
    """
    config = without_auto(config)
    actor, ranks, per_machine = config.worker.actor, config.num_ranks, config.trainer.n_gpus_per_node
    stored, computed = NUM_BYTES[actor.fsdp.torch_dtype], NUM_BYTES[actor.fsdp.mp_param_dtype]
    whole = model.parameters * stored
    trained = trained_parameters(config, model) * stored
    policy, reference = whole / ranks, whole / ranks * has_reference(config)
    states = _states_per_weight(actor) * trained / ranks
    critic_resident, critic_offloaded = _critic_bytes(config, model)
    ref, critic = config.worker.ref, config.worker.critic
    streams_policy = actor.fsdp.enable_cpu_offload
    streamed = (policy + states) * streams_policy + reference * ref.fsdp.enable_cpu_offload
    streamed += critic_resident * critic.fsdp.enable_cpu_offload
    resident = policy + states + reference + critic_resident
    on_device = resident - streamed
    offloaded = _offloaded_bytes(actor, policy, states) + critic_offloaded
    offloaded += reference * (ref.offload.offload_params or ref.fsdp.enable_cpu_offload)
    gathered = (2 * model.largest_block + model.root) * computed
    logits = 2 * LOGIT_CHUNK_GB * GB
    engine, per_token = engine_bytes(config, model)
    cache = per_token * config.worker.rollout.max_num_batched_tokens
    forward = layer_bytes(model, _micro_tokens(config, actor.micro_batch_size_per_device_for_experience), computed)
    tokens = _micro_tokens(config, actor.micro_batch_size_per_device_for_update)
    update = _saved_activation_bytes(config, model, data, tokens, computed)
    update += 0 if streams_policy else trained / ranks
    update += (model.largest_block + model.root) * (computed + NUM_BYTES[actor.fsdp.mp_reduce_dtype])
    batch, prompts = _batch_bytes(config, data), config.data.rollout_batch_size / config.trainer.nnodes
    patches = prompts * data.mean_patches * model.patch_numbers * PIXEL_BYTES  # on the ranks of one machine
    processes = GB * (
        PROCESS_GB["driver"]
        + config.worker.reward.num_processes * PROCESS_GB["scoring"]
        + per_machine * (PROCESS_GB["rank"] + PROCESS_GB["engine"])
    )
    phases = [
        ("load", on_device + whole * (not streams_policy), processes + per_machine * whole),
        ("rollout", resident - offloaded + engine + cache, processes + batch),
        ("log-probs", on_device + gathered + forward + logits, processes + batch + patches),
        ("update", on_device + gathered + update + logits, processes + batch + patches),
    ]
    offloaded *= per_machine
    copied = per_machine * _checkpoint_bytes(config, policy, states, trained / ranks, critic_resident)
    phases = [(name, device, host + copied * (name != "load")) for name, device, host in phases]
    return [Phase(name, device / GB, (host + offloaded) / GB) for name, device, host in phases]


def has_reference(config: Config) -> bool:
    """True with a reference model of its own; with LoRA the base model is it."""
    return not config.algorithm.disable_kl and not config.worker.actor.model.lora.rank


def engine_bytes(config: Config, model: ModelShape) -> tuple[float, float]:
    """Bytes of an engine's weights on one of its GPUs, and of the keys and values of one token."""
    rollout = config.worker.rollout
    weights = model.parameters * NUM_BYTES[rollout.dtype] / rollout.tensor_parallel_size
    return weights, model.layers * model.kv_width * NUM_BYTES[rollout.dtype]


def _checkpoint_bytes(config: Config, policy: float, states: float, trained: float, critic_resident: float) -> float:
    """Bytes of one rank's shard of a checkpoint; of a policy with LoRA only the adapters."""
    trainer, with_adapters = config.trainer, config.worker.actor.model.lora.rank > 0
    if trainer.save_freq <= 0:
        return 0.0
    critic = critic_resident / (1 + trainer.save_model_only * _states_per_weight(config.worker.critic))
    return (trained if with_adapters else policy) + states * (not trainer.save_model_only) + critic


def _states_per_weight(role: Any) -> int:
    """Optimizer states per parameter: two moments, and with adamw_bf16 the rest of a bf16 weight."""
    return 3 if (role.optim.strategy, role.fsdp.torch_dtype) == ("adamw_bf16", "bf16") else 2


def _critic_bytes(config: Config, model: ModelShape) -> tuple[float, float]:
    """Bytes per rank of a critic of the policy's size (weights, states), and how many of them are offloaded."""
    critic = config.worker.critic
    if config.algorithm.adv_estimator != "gae":
        return 0.0, 0.0
    weights = model.parameters * NUM_BYTES[critic.fsdp.torch_dtype] / config.num_ranks
    states = _states_per_weight(critic) * weights
    return weights + states, _offloaded_bytes(critic, weights, states)


def _offloaded_bytes(role: Any, weights: float, states: float) -> float:
    """Bytes of weights and optimizer states that leave the device while the role has nothing to do."""
    is_all = role.fsdp.enable_cpu_offload
    return weights * (role.offload.offload_params or is_all) + states * (role.offload.offload_optimizer or is_all)


def trained_parameters(config: Config, model: ModelShape) -> int:
    """Trainable parameters: all, all but the vision encoder's, or LoRA's r (9D + 3I + kv_width) per layer."""
    settings = config.worker.actor.model
    if model.adapters:
        return model.adapters
    if settings.lora.rank:
        return settings.lora.rank * model.layers * (9 * model.hidden + 3 * model.intermediate + model.kv_width)
    return model.parameters - (model.vision_parameters if settings.freeze_vision_tower else 0)


def _micro_tokens(config: Config, num_sequences: int) -> int:
    """Token budget T of a micro-batch: num_sequences of full length."""
    return num_sequences * (config.data.max_prompt_length + config.data.max_response_length)


def layer_bytes(model: ModelShape, tokens: int, num_bytes: int) -> float:
    """Activations of one layer: 8D (two norms, q, k, v, output, two residuals) + 4I (gate, up, their product)."""
    return float(tokens) * (8 * model.hidden + 4 * model.intermediate) * num_bytes


def _saved_activation_bytes(config: Config, model: ModelShape, data: DataShape, tokens: int, num_bytes: int) -> float:
    """Activations of a micro-batch saved for the backward pass, with those of the vision encoder."""
    settings, sizes = config.worker.actor.model, config.data
    inside = layer_bytes(model, tokens, num_bytes)
    group_tokens = sizes.max_prompt_length + config.worker.rollout.n * sizes.max_response_length
    patches = 0 if settings.freeze_vision_tower else max(1, tokens // group_tokens) * data.max_patches
    vision = patches * model.vision_depth * model.vision_hidden * num_bytes
    if not settings.enable_gradient_checkpointing:
        return model.layers * inside + 12 * vision
    return tokens * model.layers * model.hidden * num_bytes + inside + vision + settings.activation_budget_gb * GB


def _batch_bytes(config: Config, data: DataShape) -> float:
    """Bytes of a batch: images once per prompt; per response token id, mask, old and reference log-probs."""
    prompts = config.data.rollout_batch_size
    per_token = 8 + 1 + 4 * (1 if config.algorithm.disable_kl else 2)
    tokens = prompts * config.worker.rollout.n * config.data.max_response_length * per_token
    return BATCH_COPIES * (prompts * data.mean_image_bytes + tokens)


def measure_data(grids: Sequence[Sequence[Sequence[int]]], image_bytes: Sequence[int]) -> DataShape:
    """The data shape from the grids of images and videos of all prompts, and the bytes of some."""
    patches = [sum(frames * rows * columns for frames, rows, columns in images) for images in grids]
    return DataShape(sum(image_bytes) / len(image_bytes), sum(patches) / len(patches), max(patches))


def count_parameters(module: Any) -> int:
    """Number of parameters of a torch module."""
    return sum(parameter.numel() for parameter in module.parameters())


def _activation_width(text: Any) -> int:
    """I; with K experts of width I of each token K (D / 2 + I), for two hidden vectors beside the four of I."""
    if not getattr(text, "num_experts", 0):
        return text.intermediate_size
    shared = getattr(text, "shared_expert_intermediate_size", 0)
    return text.num_experts_per_tok * (text.hidden_size // 2 + text.moe_intermediate_size) + shared


def measure_model(model: Any) -> ModelShape:
    """The shape of a transformers model, which may be on the `meta` device."""
    parameters = count_parameters(model)
    text, vision = model.config.get_text_config(), getattr(model.config, "vision_config", None)
    encoder = getattr(model.model, "visual", None)
    vision_parameters = count_parameters(encoder) if encoder is not None else 0
    blocks = [count_parameters(layer) for layer in getattr(model.model, "language_model", model.model).layers]
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    num_full = text.num_hidden_layers - count_linear(text)
    shape: dict[str, int] = {
        "parameters": parameters,
        "vision_parameters": vision_parameters,
        "largest_block": max(blocks),
        "root": parameters - vision_parameters - sum(blocks),
        "layers": text.num_hidden_layers,
        "hidden": text.hidden_size,
        "intermediate": _activation_width(text),
        "kv_width": 2 * text.num_key_value_heads * head_dim * num_full // text.num_hidden_layers,
    }
    if vision is not None:
        shape |= {
            "vision_depth": vision.depth,
            "vision_hidden": getattr(vision, "embed_dim", None) or vision.hidden_size,
            "patch_numbers": vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
            "patches_per_token": vision.spatial_merge_size**2,
        }
    return ModelShape(**shape)

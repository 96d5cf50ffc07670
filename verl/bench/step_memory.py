"""Memory of one step's batch: images, response tokens, the driver's own memory and Ray's object store."""

import ctypes
import gc
import logging
import re
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import ray
import torch

from verl.data.dataset import Prompt, collate_prompts
from verl.distributed.single_controller import Dispatch, ResourcePool, WorkerGroup, WorkerSpec, register
from verl.model.packing import balanced_order
from verl.protocol import DataProto

ROOT = Path(__file__).resolve().parents[2]
MB = 1e6
PROMPT_TOKENS = 640
NUM_RANKS = 2
SENT_TENSORS = ["prompt_ids", "prompt_mask", "prompt_position_ids", "responses", "response_mask"]


class Rank:
    """Answers prompts at random, and holds groups while a gate is closed."""

    def __init__(self, rank: int, world_size: int):
        self.rank = rank
        self.generator = np.random.default_rng(rank)

    @register(Dispatch.DP_COMPUTE_PROTO)
    def generate(self, prompts: DataProto) -> DataProto:
        """Full-length responses [G, n, R] and their mask."""
        shape = (len(prompts), prompts.meta_info["n"], prompts.meta_info["response_tokens"])
        responses = torch.from_numpy(self.generator.integers(0, 150_000, shape))
        mask = torch.ones(shape, dtype=torch.bool)
        return DataProto.from_dict(tensors={"responses": responses, "response_mask": mask})

    @register(Dispatch.DP_COMPUTE_METRIC)
    def load_groups(self, groups: DataProto) -> int:
        """Bytes of the images that arrived; keeps them until the driver has looked at the store."""
        gate = Path(groups.meta_info["gate"])
        (gate / str(self.rank)).touch()
        while gate.joinpath("closed").exists():
            time.sleep(0.1)
        return sum(len(image) for row in groups.non_tensor_batch["images"] for image in row)


def make_prompts(count: int, image_bytes: int) -> list[Prompt]:
    """Prompts with one image of noise each."""
    generator = np.random.default_rng(0)
    ids = torch.arange(PROMPT_TOKENS)
    return [
        Prompt(ids.tolist(), ids, ids.expand(3, -1), [generator.bytes(image_bytes)], "problem", "truth", str(row))
        for row in range(count)
    ]


def store_bytes() -> float:
    """Bytes in the object store, from Ray's own summary."""
    from ray._private.internal_api import memory_summary

    summary = memory_summary(ray.get_runtime_context().gcs_address, stats_only=True)
    match = re.search(r"Plasma memory usage ([\d.]+) MiB", summary)
    return float(match[1]) * 1024**2 if match else 0.0


def private_bytes() -> int:
    """Memory of this process alone, without the object store that it maps, after the unused went back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared


def settled_store_bytes() -> float:
    """Bytes in the object store once nothing is being freed any more."""
    before, now = -1.0, store_bytes()
    while before != now:
        time.sleep(1.0)
        before, now = now, store_bytes()
    return now


def measure(ranks: WorkerGroup, num_prompts: int, samples: int, response_tokens: int, image_kb: int) -> list[float]:
    """Images, tokens, driver and object store of one step, in MB."""
    driver_before, store_before = private_bytes(), settled_store_bytes()
    prompts = collate_prompts(make_prompts(num_prompts, image_kb * 1000), 0)
    request = prompts.select([], ["raw_prompt_ids", "images"])
    request.meta_info = {"n": samples, "response_tokens": response_tokens}
    groups = prompts.select().union(ranks.generate(request))
    groups = groups[balanced_order([1] * num_prompts, num_prompts, NUM_RANKS)]
    sent = groups.select(SENT_TENSORS, ["images"])
    with tempfile.TemporaryDirectory() as gate:
        closed = Path(gate, "closed")
        closed.touch()
        sent.meta_info["gate"] = gate
        wait = ranks.start("load_groups", sent)
        while len(list(Path(gate).iterdir())) <= NUM_RANKS:
            time.sleep(0.1)
        driver, store = private_bytes() - driver_before, settled_store_bytes() - store_before
        closed.unlink()
        assert sum(wait()) == num_prompts * image_kb * 1000
    rows = [row for batch in (prompts, groups) for row in batch.non_tensor_batch["images"]]
    images = {id(image): len(image) for row in rows for image in row}
    tokens = sum(groups.batch[key].numel() * groups.batch[key].element_size() for key in SENT_TENSORS[-2:])
    return [value / MB for value in (sum(images.values()), tokens, driver, store)]


def measure_alone(num_prompts: int, samples: int, response_tokens: int, image_kb: int) -> list[float]:
    """One line, in this process: what was loaded at a first, small step is not the batch's."""
    ray.init("local", num_cpus=NUM_RANKS, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    spec = WorkerSpec(cls=Rank, kwargs={}, name="rank", num_cpus=1, env={"PYTHONPATH": str(ROOT)})
    ranks = WorkerGroup(ResourcePool(NUM_RANKS, 1, use_gpu=False), spec)
    measure(ranks, 32, 4, 512, 192)
    sizes = measure(ranks, num_prompts, samples, response_tokens, image_kb)
    ray.shutdown()
    return sizes

"""On GPUs: what waits in host memory between passes computes what it would compute if it had stayed."""

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.e2e.training import make_data
from tests.gpu import ALWAYS, ON_GPU, RELEASED, ROLES, counts
from tests.ranks import leave
from tests.updates import distance
from verl.config_loading import load_config
from verl.dataset import RLHFDataset, collate_prompts
from verl.fsdp import full_weights, join_store, open_store, whole
from verl.protocol import DataProto
from verl.trainer.main import WITHOUT_MULTICAST
from verl.workers.fsdp_worker import FSDPWorker

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
NUM_GROUPS, NUM_SAMPLES, WIDTH = 4, 3, 24
SMALL = [
    "data.rollout_batch_size=4",
    "worker.actor.global_batch_size=4",
    "worker.actor.micro_batch_size_per_device_for_update=4",
    "worker.actor.optim.lr=1e-4",
    "worker.critic.global_batch_size=4",
    "worker.critic.optim.strategy=adamw",
    "worker.critic.fsdp.torch_dtype=fp32",
    "worker.critic.fsdp.mp_param_dtype=fp32",
]
WHOLE, ADAPTERS = ["algorithm.adv_estimator=gae"], ["worker.actor.model.lora.rank=4"]
BETWEEN_PASSES = [f"worker.{role}.offload.offload_params=true" for role in ROLES]
BETWEEN_PASSES += [f"worker.{role}.offload.offload_optimizer=true" for role in ("actor", "critic")]
POLICY, REFERENCE, CRITIC = {"policy", "policy's moments"}, {"reference"}, {"critic", "critic's moments"}
CASES: dict[str, tuple[list[str], set[str]]] = {
    "on the device": (WHOLE, set()),
    "between passes": ([*WHOLE, *BETWEEN_PASSES], POLICY | REFERENCE | CRITIC),
    "always": ([*WHOLE, *ALWAYS], POLICY | REFERENCE | CRITIC),
    "always and between passes": ([*WHOLE, *ALWAYS, *BETWEEN_PASSES], POLICY | REFERENCE | CRITIC),
    "as released": ([*WHOLE, *RELEASED], POLICY | REFERENCE),
    "adapters on the device": (ADAPTERS, set()),
    "adapters between passes": ([*ADAPTERS, *BETWEEN_PASSES], POLICY | REFERENCE),
    "adapters always": ([*ADAPTERS, *ALWAYS], POLICY | REFERENCE),
}
"""What is chosen, and what then waits in host memory."""


def make_groups(data: Path, processor: Any, max_prompt_length: int) -> DataProto:
    """Prompts with their images, made-up responses of uneven lengths, and their advantages."""
    rows = RLHFDataset(f"{data}@val", processor, max_prompt_length=max_prompt_length)
    groups = collate_prompts([rows[i] for i in range(NUM_GROUPS)], processor.tokenizer.pad_token_id)
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_GROUPS, NUM_SAMPLES, WIDTH)
    lengths = torch.randint(1, WIDTH + 1, shape[:2], generator=generator)
    groups.batch["responses"] = torch.randint(20, 600, shape, generator=generator)
    groups.batch["response_mask"] = (torch.arange(WIDTH) < lengths.unsqueeze(-1)).long()
    groups.batch["advantages"] = torch.randn(shape[:2], generator=generator)
    return groups


def moments(optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """The first ones, whole: linear in the gradients."""
    return torch.cat([whole(state["exp_avg"]).cpu().flatten() for state in optimizer.state.values()])


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([weight.detach().cpu().flatten() for _, weight in full_weights(model)])


def waiting(worker: FSDPWorker) -> list[str]:
    """What lies in host memory now."""
    parts = {"policy": worker.policy.parameters(), "policy's moments": _states(worker.optimizer)}
    if worker.reference is not None:
        parts["reference"] = worker.reference.model.parameters()
    if worker.critic is not None:
        assert worker.critic.optimizer is not None
        parts |= {"critic": worker.critic.model.parameters(), "critic's moments": _states(worker.critic.optimizer)}
    places = {name: {tensor.device.type for tensor in tensors} for name, tensors in parts.items()}
    assert all(len(of_part) == 1 for of_part in places.values())
    return [name for name, of_part in places.items() if of_part == {"cpu"}]


def _states(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]


def train(worker: FSDPWorker, groups: DataProto, folder: Path) -> dict[str, Any]:
    """What is seen in a step of every pass, a checkpoint, another step, and once more from the checkpoint on."""
    worker.load_groups(groups)
    batch = groups.select(["response_mask", "advantages"], [])
    seen: dict[str, Any] = {}

    def update(step: int) -> None:
        batch.meta_info |= {"step": step, "kl_coef": 0.1}
        worker.update_actor(batch)

    seen["log_probs"] = worker.compute_log_probs(batch).batch["old_log_probs"]
    seen["reference"] = batch.batch["ref_log_probs"] = worker.compute_ref_log_probs(batch).batch["ref_log_probs"]
    if worker.critic is not None:
        assert worker.critic.optimizer is not None
        batch.batch["values"] = worker.compute_values(batch).batch["values"]  # zeros: the head is new
        batch.batch["returns"] = batch.batch["values"] + batch.batch["advantages"].unsqueeze(-1)
        batch.meta_info["step"] = 1
        worker.update_critic(batch)
        seen["values"] = worker.compute_values(batch).batch["values"]
        seen["critic's moments"] = moments(worker.critic.optimizer)
    update(1)
    seen["moments"], stored = moments(worker.optimizer), weights(worker.policy.model)
    worker.save(str(folder))
    while (fault := worker.save_fault()) is None:
        time.sleep(0.05)
    assert fault == ""
    update(2)
    seen["moments after"] = moments(worker.optimizer)
    worker.restore(str(folder))
    assert torch.equal(moments(worker.optimizer), seen["moments"])
    assert torch.equal(weights(worker.policy.model), stored)
    update(2)
    seen["moments again"] = moments(worker.optimizer)
    seen["log_probs after"] = worker.compute_log_probs(batch).batch["old_log_probs"]
    return seen | {"waiting": waiting(worker)}


def run_cases(rank: int, num_ranks: int, data: Path, ports: dict[str, int], folder: Path) -> None:
    """Every case one after the other, in one process of each rank."""
    torch.set_num_threads(1)
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    files = [f"data.train_files={data}@train", f"data.val_files={data}@val"]
    ranks = [f"trainer.n_gpus_per_node={num_ranks}", f"trainer.device={DEVICE}"]
    seen = {}
    for case, (choices, _) in CASES.items():
        config = load_config(["config=configs/toy_cpu.yaml", *files, *ON_GPU, *SMALL, *ranks, *choices])
        worker = FSDPWorker(rank, num_ranks, config, DEVICE, 10)
        worker.store = join_store("127.0.0.1", ports[case])
        worker.load("127.0.0.1", ports[case])
        groups = make_groups(data, worker.processor, config.data.max_prompt_length)
        seen[case] = train(worker, groups.chunk(num_ranks)[rank], folder / case)
        dist.barrier()
        if case != list(CASES)[-1]:
            dist.destroy_process_group()
    torch.save(seen, folder / f"{rank}.pt")
    leave()


@pytest.mark.parametrize("num_ranks", counts(1, 2))
def test_host_memory_changes_where_tensors_wait_and_nothing_else(tmp_path, monkeypatch, num_ranks):
    for name, value in WITHOUT_MULTICAST.items():
        monkeypatch.setenv(name, value)
    make_data(tmp_path / "rows", num_train=8, num_val=8)
    stores = {case: open_store("127.0.0.1") for case in CASES}
    ports = {case: port for case, (_, port) in stores.items()}
    mp.spawn(run_cases, (num_ranks, tmp_path / "rows", ports, tmp_path), nprocs=num_ranks)
    for rank in range(num_ranks):
        seen = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for case, (choices, waits) in CASES.items():
            where = set(seen[case].pop("waiting"))
            alone = seen["adapters on the device" if choices[0] == ADAPTERS[0] else "on the device"]
            apart = {name: distance(value, alone[name]) for name, value in seen[case].items()}
            again = distance(seen[case]["moments again"], seen[case]["moments after"])
            print(f"rank {rank} of {num_ranks}, {case}: apart {apart}; after a checkpoint {again}", file=sys.stderr)
            assert all(value < 1e-5 for value in (*apart.values(), again))
            assert distance(seen[case]["moments after"], seen[case]["moments"]) > 1e-2
            assert where == waits or DEVICE == "cpu"

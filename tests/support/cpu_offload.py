"""Training ranks whose models and optimizers wait in host memory between passes, or lie there always.

They are set beside ranks whose parts stay on their device.
"""

import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tests.support.ranks import leave
from tests.support.training import make_data
from tests.support.updates import distance
from verl.config.loading import load_config
from verl.data.dataset import RLHFDataset, collate_prompts
from verl.distributed.fsdp import full_tensor, full_weights, join_store, open_store
from verl.distributed.optim import local_part, state_tensors
from verl.protocol import DataProto
from verl.workers.fsdp_worker import FSDPWorker

NUM_GROUPS, NUM_SAMPLES, WIDTH = 4, 3, 24
SMALL = [
    "data.rollout_batch_size=4",
    "worker.actor.global_batch_size=2",
    "worker.actor.micro_batch_size_per_device_for_update=4",
    "worker.actor.optim.lr=1e-4",
    "worker.critic.global_batch_size=4",
    "worker.critic.optim.strategy=adamw",
    "worker.critic.fsdp.torch_dtype=fp32",
    "worker.critic.fsdp.mp_param_dtype=fp32",
    "worker.reward.score_function=r1v_scene",
]
ROLES = ("actor", "critic", "ref")
WHOLE, ADAPTERS = "algorithm.adv_estimator=gae", "worker.actor.model.lora.rank=4"
BETWEEN_PASSES = [f"worker.{role}.offload.offload_params=true" for role in ROLES]
BETWEEN_PASSES += [f"worker.{role}.offload.offload_optimizer=true" for role in ("actor", "critic")]
ALWAYS = [f"worker.{role}.fsdp.enable_cpu_offload=true" for role in ROLES]
RELEASED = ["worker.actor.offload.offload_params=true", "worker.actor.offload.offload_optimizer=true"]
RELEASED += ["worker.ref.fsdp.enable_cpu_offload=true"]
"""Parts that the released recipe keeps in host memory between passes, and always."""
POLICY, REFERENCE, CRITIC = {"policy", "policy's states"}, {"reference"}, {"critic", "critic's states"}
ALL = POLICY | REFERENCE | CRITIC
CASES: dict[str, tuple[list[str], set[str], set[str]]] = {
    "on the device": ([WHOLE], set(), set()),
    "between passes": ([WHOLE, *BETWEEN_PASSES], ALL, set()),
    "always": ([WHOLE, *ALWAYS], set(), ALL),
    "always and between passes": ([WHOLE, *ALWAYS, *BETWEEN_PASSES], set(), ALL),
    "as released": ([WHOLE, *RELEASED], POLICY, REFERENCE),
    "adapters on the device": ([ADAPTERS], set(), set()),
    "adapters between passes": ([ADAPTERS, *BETWEEN_PASSES], POLICY | REFERENCE, set()),
    "adapters always": ([ADAPTERS, *ALWAYS], set(), POLICY | REFERENCE),
}
"""Choices; the parts that are then in host memory between passes; those that always are, beside a GPU."""


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


def moments(worker: FSDPWorker, owner: Any) -> torch.Tensor:
    """The first ones of the optimizer, whole: linear in the gradients."""
    with worker._on_device(owner.model, owner.optimizer):
        return torch.cat([full_tensor(state["exp_avg"]).cpu().flatten() for state in owner.optimizer.state.values()])


def weights(worker: FSDPWorker) -> torch.Tensor:
    with worker._on_device(worker.policy):
        return torch.cat([weight.detach().cpu().flatten() for _, weight in full_weights(worker.policy.model)])


def places(worker: FSDPWorker) -> dict[str, list[str]]:
    """Places of the worker's parts now: on a kind of device, or nowhere but in its pinned buffer."""
    parts: dict[str, tuple[Any, Iterable[torch.Tensor]]] = {
        "policy": (worker.policy, worker.policy.parameters()),
        "policy's states": (worker.policy, state_tensors(worker.optimizer)),
    }
    if worker.reference is not None:
        parts["reference"] = worker.reference.model, worker.reference.model.parameters()
    if worker.critic is not None:
        model, optimizer = worker.critic.model, worker.critic.optimizer
        assert optimizer is not None
        parts |= {"critic": (model, model.parameters()), "critic's states": (model, state_tensors(optimizer))}
    owned = {name: list(of_part) for name, (_, of_part) in parts.items()}
    for name, (model, _) in parts.items():
        # What a pass has gathered would be a plain tensor, and kept for as long as nothing lets go of it.
        assert not isinstance(model, FSDPModule) or all(isinstance(tensor, DTensor) for tensor in owned[name]), name
    own = {name: [local_part(tensor.detach()) for tensor in of_part] for name, of_part in owned.items()}
    return {name: sorted({_place(part) for part in of_part if part.numel()}) for name, of_part in own.items()}


def _place(tensor: torch.Tensor) -> str:
    return tensor.device.type if tensor.untyped_storage().nbytes() else "waiting"


def train(worker: FSDPWorker, groups: DataProto, folder: Path) -> dict[str, Any]:
    """Values of a step of every pass, a checkpoint, another step, and once more from the checkpoint on.

    The last step reads old log-probs without those of the first of its two updates, the one before it all of them.
    """
    worker.load_groups(groups)
    batch = groups.select(["response_mask", "advantages"], [])
    seen: dict[str, Any] = {}

    def update(step: int) -> None:
        batch.meta_info |= {"step": step, "kl_coef": 0.1}
        worker.update_actor(batch)

    seen["log_probs"] = worker.compute_log_probs(batch).batch["old_log_probs"]
    seen["reference"] = batch.batch["ref_log_probs"] = worker.compute_ref_log_probs(batch).batch["ref_log_probs"]
    if worker.critic is not None:
        batch.batch["values"] = worker.compute_values(batch).batch["values"]  # zeros: the head is new
        batch.batch["returns"] = batch.batch["values"] + batch.batch["advantages"].unsqueeze(-1)
        batch.meta_info["step"] = 1
        worker.update_critic(batch)
        seen["values"] = worker.compute_values(batch).batch["values"]
        seen["critic's moments"] = moments(worker, worker.critic)
    update(1)
    seen["moments"], stored = moments(worker, worker.actor), weights(worker)
    worker.save(str(folder))
    while (fault := worker.save_fault()) is None:
        time.sleep(0.05)
    assert fault == ""
    old = worker.compute_log_probs(batch).batch["old_log_probs"]
    batch.meta_info["from_second_update"] = True
    partial = worker.compute_log_probs(batch).batch["old_log_probs"]
    batch.meta_info["from_second_update"] = False
    size = NUM_GROUPS // 2 // worker.world_size
    assert partial[:size].isnan().all() and distance(partial[size:], old[size:]) < 1e-5
    batch.batch["old_log_probs"] = old
    update(2)
    seen["moments after"] = moments(worker, worker.actor)
    worker.restore(str(folder))
    assert torch.equal(moments(worker, worker.actor), seen["moments"])
    assert torch.equal(weights(worker), stored)
    batch.batch["old_log_probs"] = partial
    update(2)
    seen["moments again"] = moments(worker, worker.actor)
    seen["log_probs after"] = worker.compute_log_probs(batch).batch["old_log_probs"]
    return seen | {"places": places(worker)}


def run_cases(
    rank: int, num_ranks: int, names: Sequence[str], data: Path, ports: dict[str, int], folder: Path, device: str
) -> None:
    """The cases one after the other, in one process of each rank."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    files = [f"data.train_files={data}@train", f"data.val_files={data}@val"]
    ranks = [f"trainer.n_gpus_per_node={num_ranks}", f"trainer.device={device}"]
    seen = {}
    for number, name in enumerate(names):
        if number:
            dist.destroy_process_group()
        config = load_config(["config=configs/toy_cpu.yaml", *files, *SMALL, *ranks, *CASES[name][0]])
        worker = FSDPWorker(rank, num_ranks, config, device, 10)
        worker.store = join_store("127.0.0.1", ports[name])
        worker.load("127.0.0.1", ports[name])
        groups = make_groups(data, worker.processor, config.data.max_prompt_length)
        seen[name] = train(worker, groups.chunk(num_ranks)[rank], folder / name)
        dist.barrier()
    torch.save(seen, folder / f"{rank}.pt")
    leave()


def check_host_memory(folder: Path, num_ranks: int, device: str, names: Sequence[str] = tuple(CASES)) -> None:
    """Passes if each case computes what the one of its kind on the device does, and waits where it should."""
    make_data(folder / "rows", num_train=8, num_val=8)
    stores = {name: open_store("127.0.0.1") for name in names}
    ports = {name: port for name, (_, port) in stores.items()}
    mp.spawn(run_cases, (num_ranks, names, folder / "rows", ports, folder, device), nprocs=num_ranks)
    for rank in range(num_ranks):
        seen = torch.load(folder / f"{rank}.pt", weights_only=True)
        for name, of_case in seen.items():
            choices, between, always = CASES[name]
            where = of_case.pop("places")
            alone = seen["adapters on the device" if ADAPTERS in choices else "on the device"]
            apart = {key: distance(value, alone[key]) for key, value in of_case.items()}
            again = distance(of_case["moments again"], of_case["moments after"])
            print(f"rank {rank} of {num_ranks}, {name}: apart {apart}; after a checkpoint {again}", file=sys.stderr)
            assert all(value < 1e-5 for value in (*apart.values(), again)), name
            assert distance(of_case["moments after"], of_case["moments"]) > 1e-2
            for part, place in where.items():
                assert place == ["waiting" if part in between else "cpu" if part in always else device], (name, part)

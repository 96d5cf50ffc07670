"""Updates of small models on made-up groups, the same on any number of ranks."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from tests.support.ranks import run_ranks
from tests.support.tiny_qwen import (
    FAMILIES,
    IMAGE_TOKEN,
    VISION_END,
    VISION_FAMILIES,
    VISION_START,
    patch_dim,
    tiny_model,
)
from verl.config.records import AdapterConfig
from verl.distributed.checkpoint import ShardWriter, load_shards
from verl.distributed.fsdp import full_tensor, full_weights, shard
from verl.distributed.optim import allocate_states
from verl.export.stored_weights import read_weights
from verl.model.checkpointing import CHECKPOINTING
from verl.model.fused_layers import fuse_layers
from verl.model.lora import adapters_off, add_adapters
from verl.model.packing import balanced_order
from verl.model.qwen_vl import (
    ResponseLogProbs,
    ResponseValues,
    attend_packed,
    expand_image_tokens,
    load_model,
    mrope_positions,
)
from verl.workers.actor import Actor, Groups, PolicyBatch, UpdateSettings
from verl.workers.critic import Critic, ValueSettings

TOY = "toy"
"""The family of the warmed-up model that the repository holds."""
TOY_MODEL = Path(__file__).parents[2] / "configs" / "toy_model"
TOY_TOKENS = (6, 3, 4)
"""Image, start and end of vision."""
NUM_GROUPS, NUM_SAMPLES, WIDTH, GRID = 4, 3, 9, (1, 4, 4)
NUM_IMAGES = (1, 2, 0, 1)


def make_groups(family: str = "qwen2_5_vl") -> tuple[Groups, torch.Tensor, torch.Tensor]:
    """Four groups of uneven lengths with advantages and reference log-probs; images as in NUM_IMAGES, if any."""
    image, start, end = TOY_TOKENS if family == TOY else (IMAGE_TOKEN, VISION_START, VISION_END)
    lowest = 20 if family == TOY else 0  # below are the toy's special tokens
    generator = torch.Generator().manual_seed(3)
    prompts, positions, responses, images = [], [], [], []
    for group in range(NUM_GROUPS):
        text = torch.randint(lowest, 80, (3 + group,), generator=generator).tolist()
        grids = [GRID] * (NUM_IMAGES[group] if family in (*VISION_FAMILIES, TOY) else 0)
        ids = text + [start, image, end] * len(grids) + text[:2]
        ids = expand_image_tokens(ids, grids, image, 2)
        prompts.append(torch.tensor(ids))
        positions.append(mrope_positions(ids, grids, image, 2))
        lengths = torch.randint(1, WIDTH + 1, (NUM_SAMPLES,), generator=generator).tolist()
        responses.append([torch.randint(lowest, 80, (length,), generator=generator) for length in lengths])
        num_before = sum(map(len, images))
        images.append(list(range(num_before, num_before + len(grids))))
    num_images = sum(map(len, images))
    pixels = [torch.randn(16, patch_dim(family), generator=generator) for _ in range(num_images)]
    grids = [GRID] * num_images
    groups = Groups(prompts, positions, responses, images, pixels, grids, NUM_SAMPLES, WIDTH)
    advantages = torch.randn(NUM_GROUPS, NUM_SAMPLES, generator=generator)
    reference = -3 - torch.rand(NUM_GROUPS, NUM_SAMPLES, WIDTH, generator=generator)
    return groups, advantages, reference


def share_of(groups: Groups, order: list[int]) -> Groups:
    """Some of the groups; images stay, for groups name them by number."""
    return Groups(
        *[[getattr(groups, key)[g] for g in order] for key in ("prompts", "positions", "responses", "images")],
        groups.pixels,
        groups.grids,
        groups.num_samples,
        groups.width,
    )


SMALL_NORM = 1e-2
"""Below that of any gradient here, so that the norm over all ranks shows in the moments."""
CUT = {"max_grad_norm": 1e9, "ppo_epochs": 1, "max_response_length": 20, "temperature": 0.9}
CHOICES = {
    "default": {},
    "seq": {"loss_avg_mode": "seq"},
    "gspo": {"loss_type": "gspo", "loss_avg_mode": "seq"},
    "gspo_token": {"loss_type": "gspo_token"},
    "cispo": {"loss_type": "cispo", "loss_avg_mode": "fixed_length"},
    "sapo": {"loss_type": "sapo"},
    "full": {"kl_penalty": "full"},
}


def settings(mini_batch: int, max_tokens: int, shared_prompt: bool, choice: str = "default") -> UpdateSettings:
    base = UpdateSettings(
        num_groups_per_mini_batch=mini_batch,
        max_tokens=max_tokens,
        shared_prompt=shared_prompt,
        loss_avg_mode="token",
        loss_type="default",
        clip_ratio_low=0.2,
        clip_ratio_high=0.3,
        clip_ratio_dual=3.0,
        tau_positive=1.0,
        tau_negative=1.05,
        tis_imp_ratio_cap=1.1,
        kl_penalty="low_var_kl",
        kl_coef=0.1,
        **CUT,
    )
    return replace(base, **CHOICES[choice])


def scorer(
    checkpointing: bool = False, family: str = "qwen2_5_vl", seed: int = 0, wrapper=ResponseLogProbs
) -> ResponseLogProbs:
    if family == TOY:
        model = load_model(str(TOY_MODEL), torch.float32)
    else:
        model = tiny_model(seed, family=family)
        attend_packed(model)
    if checkpointing:
        model.gradient_checkpointing_enable(CHECKPOINTING)
    return wrapper(model)


def device_of(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


def change(model, learner, update) -> tuple[torch.Tensor, dict]:
    """Gradient of one mini-batch as the change that plain SGD with lr 1 makes, and the metrics."""
    before = torch.cat([w.flatten() for _, w in full_weights(model)])
    learner.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    metrics = update(learner)
    return before - torch.cat([w.flatten() for _, w in full_weights(model)]), metrics


def one_update(model, groups, advantages, reference, chosen: UpdateSettings, old=None, rollout=None, other=None):
    """Of the policy; `other` is the reference model where the divergence is computed in full."""
    batch = PolicyBatch(advantages, old, None if other is not None else reference, rollout)
    actor = Actor(model, device_of(model))
    other = Actor(other, device_of(model)) if other is not None else None
    return change(model, actor, lambda actor: actor.update(groups, batch, chosen, other))


def chosen_update(model, groups, advantages, reference, chosen: UpdateSettings, other=None):
    """An update off the policy, so that ratios, weights and clips matter: old and engine's are made up."""
    old = (reference + 0.4 * advantages.unsqueeze(-1)).clamp(max=-0.01)
    other = other or (scorer(seed=1) if chosen.kl_penalty == "full" else None)
    return one_update(model, groups, advantages, reference, chosen, old, old - 0.05, other)


def one_value_update(model, groups, advantages, reference, max_tokens=10_000, mini_batch=4, mode="seq"):
    chosen = ValueSettings(
        num_groups_per_mini_batch=mini_batch,
        max_tokens=max_tokens,
        shared_prompt=True,
        loss_avg_mode=mode,
        cliprange_value=0.5,
        **CUT,
    )
    returns = advantages.unsqueeze(-1) + reference
    return change(
        model,
        Critic(model, device_of(model)),
        lambda critic: critic.update(groups, returns / 2, returns, chosen),
    )


CHOICES_OVER_RANKS = ("gspo", "cispo", "full")  # one per way of averaging, and a pass of the reference inside
CASES = [("qwen2_5_vl", 2, 0), *((family, NUM_GROUPS, 0) for family in FAMILIES), ("qwen3_vl", NUM_GROUPS, 4)]
"""Family, mini-batch and rank of adapters."""


def part_of(parts, rank: int, num_ranks: int, mini_batch: int = NUM_GROUPS):
    """A rank's share of groups, advantages and reference log-probs, and which groups these are."""
    groups, advantages, reference = parts
    tokens = [len(p) + sum(map(len, r)) for p, r in zip(groups.prompts, groups.responses, strict=True)]
    size = NUM_GROUPS // num_ranks
    order = balanced_order(tokens, mini_batch, num_ranks)[rank * size : (rank + 1) * size]
    return (share_of(groups, order), advantages[order], reference[order]), order


def case_update(family, mini_batch, lora_rank, prepare, share, max_tokens, num_ranks, recomputes=False):
    """The gradient of an update; with adapters, after a pass of the reference, which must not disturb it."""
    model = scorer(recomputes, family)
    if lora_rank:
        add_adapters(model.model, AdapterConfig(lora_rank, 8), torch.float32, seed=1)
    prepare(model)
    groups, advantages, reference = share
    if lora_rank:
        with adapters_off(model):
            reference, _ = Actor(model, torch.device("cpu")).compute_log_probs(groups, max_tokens, True, 0.9)
    gradient, _ = one_update(model, groups, advantages, reference, settings(mini_batch // num_ranks, max_tokens, True))
    return gradient


def updates_of_a_rank(mesh: DeviceMesh | None, rank: int, num_ranks: int) -> dict[Any, torch.Tensor]:
    """The gradient of every case, choice and of the critic; without a mesh nothing is sharded.

    Ranks cut their groups into different micro-batches, and odd ones compute activations again.
    """

    def prepare(model: torch.nn.Module) -> None:
        if mesh is not None:
            shard(model, mesh, torch.float32, torch.float32)

    max_tokens = 25 if rank else 10_000
    gradients: dict[Any, torch.Tensor] = {}
    for case in CASES:
        family, mini_batch, _ = case
        if mini_batch % num_ranks == 0:
            share, _ = part_of(make_groups(family), rank, num_ranks, mini_batch)
            gradients[case] = case_update(*case, prepare, share, max_tokens, num_ranks, rank % 2 == 1)
    share, _ = part_of(make_groups(), rank, num_ranks)
    size = NUM_GROUPS // num_ranks
    for choice in CHOICES_OVER_RANKS:
        model, other = scorer(), scorer(seed=1) if choice == "full" else None
        for sharded in filter(None, (model, other)):
            prepare(sharded)
        gradients[choice], _ = chosen_update(model, *share, settings(size, max_tokens, True, choice), other)
    model = scorer(wrapper=ResponseValues)
    prepare(model)
    gradients["critic"], _ = one_value_update(model, *share, max_tokens=max_tokens, mini_batch=size)
    return gradients


def toy_policy(mesh: DeviceMesh, rank: int, dtype: torch.dtype, family: str = TOY) -> ResponseLogProbs:
    """The toy model, or one of a family, as a worker shards it: passes in `dtype`, weights and sums in float32."""
    model = scorer(family=family)
    if mesh.device_type == "cuda":
        fuse_layers(model.model)
    if rank % 2:
        model.model.gradient_checkpointing_enable(CHECKPOINTING)
    model.to(mesh.device_type)
    shard(model, mesh, dtype, torch.float32)
    return model


def toy_passes(mesh: DeviceMesh, rank: int, num_ranks: int) -> dict[str, dict[str, Any]]:
    """Log-probs of a rank's groups of NUM_GROUPS, and the gradient of all ranks, in float32 and bf16."""
    share, order = part_of(make_groups(TOY), rank, num_ranks)
    max_tokens = 60 if rank else 10_000
    passes = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = toy_policy(mesh, rank, dtype)
        log_probs, _ = Actor(model, device_of(model)).compute_log_probs(share[0], max_tokens, True, 0.9)
        chosen = settings(NUM_GROUPS // num_ranks, max_tokens, True)
        gradient, _ = one_update(model, *share, chosen)
        passes[str(dtype)] = {"groups": order, "log_probs": log_probs, "gradient": gradient.cpu()}
    return passes


def join_passes(of_ranks: list[dict[str, dict[str, Any]]]) -> dict[tuple[str, str], torch.Tensor]:
    """Log-probs of all groups in their order, and the gradient, by type and name."""
    joined = {}
    for dtype in of_ranks[0]:
        parts = [passes[dtype] for passes in of_ranks]
        order = torch.tensor([group for part in parts for group in part["groups"]])
        joined[dtype, "log_probs"] = torch.cat([part["log_probs"] for part in parts])[order.argsort()]
        joined[dtype, "gradient"] = parts[0]["gradient"]
    return joined


def toy_training(
    mesh: DeviceMesh, rank: int, num_ranks: int, read_from: Path | None, write_to: Path | None, family: str = TOY
) -> dict[str, Any]:
    """State that a trainer holds after it has read a checkpoint, or made a first update, and after another update.

    The checkpoint that it writes lies between the two.
    """
    model = toy_policy(mesh, rank, torch.float32, family)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    actor = Actor(model, device_of(model), optimizer)
    (groups, advantages, reference), _ = part_of(make_groups(family), rank, num_ranks)
    chosen = settings(NUM_GROUPS // num_ranks, 60 if rank else 10_000, True)
    chosen = replace(chosen, max_grad_norm=SMALL_NORM)

    def update() -> None:
        actor.update(groups, PolicyBatch(advantages, None, reference), chosen)

    if read_from is not None:
        allocate_states(optimizer)
        load_shards(read_from, model.model, optimizer)
    else:
        update()
    held = {"stored": state_of(model, optimizer)}
    if write_to is not None:
        writer = ShardWriter()
        writer.start(write_to, model.model, optimizer)
        assert writer.fault(blocking=True) == ""
    update()
    return held | {"updated": state_of(model, optimizer)}


def state_of(model: ResponseLogProbs, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Weights and moments, whole."""
    state = {name: weight.cpu().clone() for name, weight in full_weights(model.model)}
    for number, parameter in enumerate(model.parameters()):
        for name in ("exp_avg", "exp_avg_sq"):
            state[f"{number}/{name}"] = full_tensor(optimizer.state[parameter][name]).cpu().clone()
    return state


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def check_passes(folder: Path, num_ranks: int, device: str) -> None:
    """Passes if log-probs and gradients do not depend on ranks: in float32 to 1e-5, in bf16 to bf16's own error."""
    alone, together = (join_passes(run_ranks(toy_passes, number, folder, device=device)) for number in (1, num_ranks))
    half, exact = str(torch.bfloat16), str(torch.float32)
    for name in ("log_probs", "gradient"):
        in_float32 = distance(together[exact, name], alone[exact, name])
        errors = [distance(passes[half, name], alone[exact, name]) for passes in (alone, together)]
        print(
            f"{name} of {num_ranks} ranks against one on {device}: float32 {in_float32:.1e}; "
            f"bf16 against float32 {errors[1]:.1e}, one rank's {errors[0]:.1e}",
            file=sys.stderr,
        )
        assert in_float32 < 1e-5
        assert errors[1] < 1.5 * errors[0] + 1e-3


def check_checkpoints(folder: Path, counts: tuple[int, ...], device: str, family: str = TOY) -> None:
    """Passes if a training that goes on with other numbers of ranks holds what the one before it stored.

    The first of `counts` ranks trains, each next reads what the one before wrote; the merger reads all the same.
    """
    first: dict[str, Any] = {}
    for number, num_ranks in enumerate(counts):
        read_from = folder / str(number - 1) if number else None
        write_to = folder / str(number)
        held = run_ranks(toy_training, num_ranks, folder, read_from, write_to, family, device=device)[0]
        merged = read_weights(folder / str(number))
        stored = merged.load(sorted(merged.entries))
        first = first or held
        for name, value in first["stored"].items():
            assert torch.equal(held["stored"][name], value), name
        for name, value in stored.items():
            assert torch.equal(value, first["stored"][name]), name
        apart, moved = (distance(moments(held[key]), moments(first["updated"])) for key in ("updated", "stored"))
        print(f"{num_ranks} ranks on {device} after {counts[:number]}: next update {apart:.1e} apart", file=sys.stderr)
        assert apart < 1e-5 < moved


def moments(state: dict[str, torch.Tensor]) -> torch.Tensor:
    """The optimizer's first ones, linear in the gradients: weights follow signs, of which some are rounding's."""
    return torch.cat([value.flatten() for name, value in state.items() if name.endswith("/exp_avg")])

"""The actor on one rank: log-probs and policy updates; the base class of actor and critic.

Letters: G local groups, n samples, R padded response tokens, N response tokens of one forward pass.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from verl.algos.divergences import compute_kl
from verl.algos.losses import average_denominator, average_weights, compute_policy_loss, compute_rollout_weights
from verl.distributed.fsdp import clip_grad_norm
from verl.model.checkpointing import set_checkpointing
from verl.model.experts import take_agreement, weigh_balance
from verl.model.lora import adapters_off
from verl.model.packing import PackedBatch, Piece, pack, plan_micro_batches, split_to_count, to_device
from verl.model.qwen_vl import Grid, ResponseLogProbs, ResponseValues
from verl.protocol import DataProto


@dataclass
class Groups:
    """A rank's share of a batch, unpadded: per group one prompt with its images and videos, and n responses.

    Attributes:
        prompts, positions: per group [P] and [3, P].
        responses: per group and sample [R].
        images: per group the indices of its images and videos in `pixels` and `grids`.
        pixels: per image or video its patches [patches, patch size].
        grids: per image or video frames, rows and columns.
        num_samples, width: n and padded R of output tensors.
        experts: per group the experts [P + sum of R, layers, K] to replay; None without routing replay.
        kept: [G, n], False for responses that no loss may see; None keeps all.
        entropies: [G, n, R] of the policy that sampled, from passes that compute them anyway; NaN where none has, None
            before the first.
    """

    prompts: list[Tensor]
    positions: list[Tensor]
    responses: list[list[Tensor]]
    images: list[list[int]]
    pixels: list[Tensor]
    grids: list[Grid]
    num_samples: int
    width: int
    experts: list[Tensor] | None = None
    kept: Tensor | None = None
    entropies: Tensor | None = None

    @classmethod
    def from_proto(cls, data: DataProto, pixels: list[Tensor], grids: list[Grid]) -> "Groups":
        """The groups of a padded batch; `pixels` and `grids` are of its images and videos, as in_order has them."""
        batch = data.batch
        prompt_mask, response_mask = batch["prompt_mask"].bool(), batch["response_mask"].bool()
        lengths = response_mask.sum(-1)
        images, cursor = [], 0
        columns = [data.non_tensor_batch[key] for key in ("images", "videos") if key in data.non_tensor_batch]
        for row in zip(*columns, strict=True):
            count = sum(map(len, row))
            images.append(list(range(cursor, cursor + count)))
            cursor += count
        return cls(
            prompts=[ids[mask] for ids, mask in zip(batch["prompt_ids"], prompt_mask, strict=True)],
            positions=[p[:, mask] for p, mask in zip(batch["prompt_position_ids"], prompt_mask, strict=True)],
            responses=[
                [row[: int(length)] for row, length in zip(rows, row_lengths, strict=True)]
                for rows, row_lengths in zip(batch["responses"], lengths, strict=True)
            ],
            images=images,
            pixels=pixels,
            grids=grids,
            num_samples=batch["responses"].shape[1],
            width=batch["responses"].shape[2],
            experts=[*data.non_tensor_batch["experts"]] if "experts" in data.non_tensor_batch else None,
        )

    def __len__(self) -> int:
        return len(self.prompts)

    def plan(self, max_tokens: int, shared_prompt: bool, groups: Sequence[int] | None = None) -> list[list[Piece]]:
        """Micro-batches of some groups (default all), equally many on every rank."""
        batches = plan_micro_batches(
            [len(prompt) for prompt in self.prompts],
            [[len(response) for response in rows] for rows in self.responses],
            max_tokens,
            shared_prompt,
            groups,
        )
        count = torch.tensor(len(batches))
        if dist.is_initialized():
            device = "cuda" if dist.get_backend() == "nccl" else "cpu"
            count = count.to(device)
            dist.all_reduce(count, dist.ReduceOp.MAX)
        return [self._without_dropped(pieces) for pieces in split_to_count(batches, int(count))]

    def _without_dropped(self, pieces: list[Piece]) -> list[Piece]:
        if self.kept is None:
            return pieces
        rest = [Piece(each.group, tuple(i for i in each.samples if self.kept[each.group, i])) for each in pieces]
        return [piece for piece in rest if piece.samples]

    def count(self, groups: Sequence[int]) -> tuple[int, int]:
        """Tokens and responses of some groups, without dropped ones."""
        lengths = [
            len(row)
            for group in groups
            for sample, row in enumerate(self.responses[group])
            if self.kept is None or self.kept[group, sample]
        ]
        return sum(lengths), len(lengths)

    def pack(self, pieces: list[Piece]) -> PackedBatch:
        """The packed row of a micro-batch; for an empty one a dummy response, so that this rank joins collectives."""
        if not pieces:
            dummy = [[torch.zeros(1, dtype=torch.long)]]
            return pack([Piece(0, (0,))], self.prompts, self.positions, dummy, self.images)
        return pack(pieces, self.prompts, self.positions, self.responses, self.images, self.experts)

    def lengths(self, pieces: list[Piece]) -> Tensor:
        """Lengths [S] of the pieces' responses, in tokens."""
        return torch.tensor([len(self.responses[piece.group][i]) for piece in pieces for i in piece.samples])

    def mean_entropies(self) -> Tensor:
        """Mean entropies [G, n] of the responses' tokens, in float64; NaN where no pass had them."""
        lengths = torch.tensor([[len(response) for response in rows] for rows in self.responses])  # [G, n]
        if self.entropies is None:
            return torch.full(lengths.shape, math.nan, dtype=torch.double)
        is_token = torch.arange(self.width) < lengths.unsqueeze(-1)  # [G, n, R]
        return self.entropies.double().masked_fill(~is_token, 0.0).sum(-1) / lengths

    def gather(self, padded: Tensor, pieces: list[Piece]) -> Tensor:
        """Gathers values [N] of the pieces' response tokens from padded [G, n, R]."""
        rows = [
            padded[piece.group, sample, : len(self.responses[piece.group][sample])]
            for piece in pieces
            for sample in piece.samples
        ]
        return torch.cat(rows)

    def scatter(self, padded: Tensor, values: Tensor, pieces: list[Piece]) -> None:
        """Scatters values [N] of the pieces' response tokens into padded [G, n, R]."""
        cursor = 0
        for piece in pieces:
            for sample in piece.samples:
                length = len(self.responses[piece.group][sample])
                padded[piece.group, sample, :length] = values[cursor : cursor + length]
                cursor += length


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Mini-batch, micro-batch and gradient settings of an update; fields are named as their config keys."""

    num_groups_per_mini_batch: int
    max_tokens: int
    shared_prompt: bool
    ppo_epochs: int
    max_grad_norm: float
    loss_avg_mode: str
    max_response_length: int
    temperature: float


@dataclass(frozen=True, kw_only=True)
class UpdateSettings(StepSettings):
    """Settings of a policy update; fields are named as their config keys.

    kl_coef is 0 without a KL term in the loss.
    """

    loss_type: str
    clip_ratio_low: float
    clip_ratio_high: float
    clip_ratio_dual: float
    tau_positive: float
    tau_negative: float
    tis_imp_ratio_cap: float | None
    kl_penalty: str
    kl_coef: float


@dataclass
class PolicyBatch:
    """Padded inputs of a policy update.

    Attributes:
        advantages: [G, n], or [G, n, R] where tokens differ.
        old_log_probs: [G, n, R]; None when all groups are on-policy.
        ref_log_probs: [G, n, R]; None without a KL term in the loss, and with the full KL.
        rollout_log_probs: [G, n, R] by the engine; None without truncated importance sampling.
        num_on_policy: leading groups, of the first update, whose current policy is the one that sampled them: their
            importance sampling ratio is 1 by definition, and their old log-probs are not read.
    """

    advantages: Tensor
    old_log_probs: Tensor | None = None
    ref_log_probs: Tensor | None = None
    rollout_log_probs: Tensor | None = None
    num_on_policy: int = 0


@dataclass
class MetricSums:
    """Sums and weights of metrics, for exact token means over micro-batches and ranks."""

    sums: dict[str, Any] = field(default_factory=lambda: defaultdict(float))
    weights: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, name: str, total: Tensor | float, weight: float) -> None:
        """Adds a sum; one on a GPU stays there, since reading it would sync with the GPU."""
        self.sums[name] = self.sums[name] + (total.detach().double() if isinstance(total, Tensor) else total)
        self.weights[name] += weight

    def as_pairs(self) -> dict[str, tuple[float, float]]:
        """Name -> (sum, weight)."""
        return {name: (float(self.sums[name]), self.weights[name]) for name in self.sums}


class Learner:
    """Base of actor and critic: forward passes, gradient accumulation and optimizer steps of one sharded model."""

    name: str
    """Prefix of metric names."""

    def __init__(
        self,
        model: ResponseLogProbs | ResponseValues,
        device: torch.device,
        optimizer: torch.optim.Optimizer | None = None,
        images_once: bool = True,
        activation_budget_gb: float | None = None,
    ):
        self.model = model
        self.device = device
        self.optimizer = optimizer
        self.images_once = images_once
        self.activation_budget_gb = activation_budget_gb  # None: checkpointing as the model was configured
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.num_skipped_in_a_row = 0
        self.load_balancing_coef = 0.0

    def forward(self, groups: Groups, pieces: list[Piece], *args: Any, **kwargs: Any) -> Any:
        """Model outputs [N] for the response tokens of a micro-batch."""
        batch = groups.pack(pieces)
        shown = list(dict.fromkeys(batch.image_ids)) if self.images_once else batch.image_ids
        if not shown and groups.pixels:  # a dummy: FSDP gathers the vision encoder on all ranks
            shown = [0]
        pixel_values = torch.cat([to_device(groups.pixels[i], self.device) for i in shown]) if shown else None
        grids = [groups.grids[i] for i in shown]
        if self.activation_budget_gb is not None and torch.is_grad_enabled():
            num_patches = 0 if pixel_values is None else len(pixel_values)
            set_checkpointing(self.model.model, len(batch.input_ids), num_patches, self.activation_budget_gb * 1024**3)
        return self.model(
            batch.to(self.device),
            pixel_values,
            grids,
            *args,
            **kwargs,
        )

    def learn(
        self,
        groups: Groups,
        settings: StepSettings,
        metrics: MetricSums,
        micro_losses: Callable[[list[Piece]], Tensor],
    ) -> None:
        """One optimizer step per mini-batch and epoch, with gradient accumulation over micro-batches.

        The loss is a weighted token sum, divided once by the denominator of the mini-batch over all ranks, so the
        gradient is independent of micro-batch size and number of ranks.

        Args:
            micro_losses: returns losses [N] of a micro-batch; for an empty one any tensor that depends on all
                parameters.
        """
        self.model.train()
        num_skipped = 0
        for _ in range(settings.ppo_epochs):
            for start in range(0, len(groups), settings.num_groups_per_mini_batch):
                mini_batch = range(start, min(start + settings.num_groups_per_mini_batch, len(groups)))
                denominator = self._denominator(groups, mini_batch, settings)
                plan = groups.plan(settings.max_tokens, settings.shared_prompt, mini_batch)
                for pieces in plan:
                    if self.load_balancing_coef:  # a mean over the passes of a mini-batch, as FSDP takes over ranks
                        weigh_balance(self.model.model, self.load_balancing_coef * bool(pieces) / len(plan))
                    losses = micro_losses(pieces)
                    weights = (
                        average_weights(settings.loss_avg_mode, groups.lengths(pieces)) if pieces else 0.0 * losses
                    )
                    loss = (losses * to_device(weights.to(losses.dtype), self.device)).sum()
                    (loss * (self.world_size / denominator)).backward()
                num_skipped += not self._step(settings.max_grad_norm, metrics)
        metrics.add(f"{self.name}/skipped_steps", num_skipped, 1)
        metrics.add(f"{self.name}/skipped_in_a_row", self.num_skipped_in_a_row, 1)

    def _denominator(self, groups: Groups, mini_batch: range, settings: StepSettings) -> float:
        """Denominator of the mini-batch's loss over all ranks."""
        totals = torch.tensor(groups.count(mini_batch), dtype=torch.float)
        if self.world_size > 1:
            totals = totals.to(self.device)
            dist.all_reduce(totals)
        num_tokens, num_responses = totals.tolist()
        if not num_responses:
            return 1.0  # all are dropped, and the loss is 0
        return average_denominator(settings.loss_avg_mode, num_tokens, num_responses, settings.max_response_length)

    def _step(self, max_grad_norm: float, metrics: MetricSums) -> bool:
        """Gradient clipping and optimizer step; returns False when a gradient that is not finite skips the step."""
        assert self.optimizer is not None
        norm = clip_grad_norm(self.model, max_grad_norm)
        is_finite = math.isfinite(norm)
        if is_finite:
            self.optimizer.step()
            metrics.add(f"{self.name}/grad_norm", norm, 1)
        self.num_skipped_in_a_row = 0 if is_finite else self.num_skipped_in_a_row + 1
        self.optimizer.zero_grad(set_to_none=True)
        return is_finite


class Actor(Learner):
    """Log-probs and updates of the policy, or log-probs of the reference policy."""

    name = "actor"
    disables_adapters = False
    """Flag: this is the reference of a LoRA policy: the same model with its adapters disabled."""

    @torch.no_grad()
    def compute_log_probs(
        self, groups: Groups, max_tokens: int, shared_prompt: bool, temperature: float, start: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [G, n, R] of all responses, 0 where padded; NaN in groups before `start`."""
        self.model.eval()
        shape = (len(groups), groups.num_samples, groups.width)
        log_probs, entropies = torch.zeros(shape), torch.zeros(shape)
        for values in (log_probs, entropies):
            values[:start] = math.nan
        batches = groups.plan(max_tokens, shared_prompt, range(start, len(groups)))
        parts = [self.forward(groups, pieces, temperature) for pieces in batches]  # all before the first GPU sync
        for pieces, (values, entropy) in zip(batches, parts, strict=True):
            if pieces:
                groups.scatter(log_probs, values.float().cpu(), pieces)
                groups.scatter(entropies, entropy.float().cpu(), pieces)
        return log_probs, entropies

    @torch.no_grad()
    def compute_full_kl(
        self, reference: "Actor", groups: Groups, max_tokens: int, shared_prompt: bool, temperature: float
    ) -> Tensor:
        """Full KL [G, n, R] of this policy from the reference, 0 where padded."""
        self.model.eval()
        kl = torch.zeros((len(groups), groups.num_samples, groups.width))
        for pieces in groups.plan(max_tokens, shared_prompt):
            values = self.forward(groups, pieces, temperature, reference.distributions(groups, pieces))[2]
            if pieces:
                groups.scatter(kl, values.float().cpu(), pieces)
        return kl

    @torch.no_grad()
    def distributions(self, groups: Groups, pieces: list[Piece]) -> tuple[Tensor, Tensor]:
        """Hidden states [N, D] and output embedding [V, D], which determine the full distributions."""
        is_training = self.model.training  # with LoRA this is the policy, whose checkpointing needs training mode
        self.model.eval()
        with adapters_off(self.model) if self.disables_adapters else nullcontext():
            states = self.forward(groups, pieces, 1.0, with_states=True)
        self.model.train(is_training)
        return states

    def update(
        self,
        groups: Groups,
        batch: PolicyBatch,
        settings: UpdateSettings,
        reference: "Actor | None" = None,
    ) -> dict[str, tuple[float, float]]:
        """One optimizer step per mini-batch and epoch; metrics as (sum, weight).

        Args:
            reference: for the full KL as a term of the loss.
        """
        metrics = MetricSums()
        if groups.experts is not None and batch.rollout_log_probs is not None:
            self._compare_replay(groups, batch.rollout_log_probs, settings, metrics)
        sampled: list[tuple[list[Piece], Tensor]] = []  # entropies [N] of the on-policy passes

        def micro_losses(pieces: list[Piece]) -> Tensor:
            losses, entropy = self._losses(groups, pieces, batch, settings, metrics, reference)
            if pieces and pieces[0].group < batch.num_on_policy:
                sampled.append((pieces, entropy))
            return losses

        self.learn(groups, settings, metrics, micro_losses)
        self._keep_entropies(groups, sampled)
        if groups.experts is not None:
            metrics.add("actor/routing_agreement", *take_agreement(self.model.model))
        return metrics.as_pairs()

    def _keep_entropies(self, groups: Groups, sampled: list[tuple[list[Piece], Tensor]]) -> None:
        """Keeps entropies [N] of passes of the policy that sampled, after all passes: reading syncs with the GPU."""
        if groups.entropies is None:
            groups.entropies = torch.full((len(groups), groups.num_samples, groups.width), math.nan)
        for pieces, entropy in sampled:
            groups.scatter(groups.entropies, entropy.float().cpu(), pieces)

    @torch.no_grad()
    def _compare_replay(
        self, groups: Groups, rollout_log_probs: Tensor, settings: UpdateSettings, metrics: MetricSums
    ) -> None:
        """Mean distance of log-probs from the engine's in the first group of a micro-batch, with replay and without.

        Of one group of each rank: the two passes train nothing, and over a whole micro-batch took 0.9 of 36 s.
        """
        self.model.eval()
        pieces = groups.plan(settings.max_tokens, settings.shared_prompt)[0][:1]
        for name, experts in (("replayed", groups.experts), ("own_routing", None)):
            log_probs = self.forward(dataclasses.replace(groups, experts=experts), pieces, settings.temperature)[0]
            if pieces:
                gap = (log_probs - to_device(groups.gather(rollout_log_probs, pieces), self.device)).abs()
                metrics.add(f"actor/engine_gap/{name}", gap.sum(), len(gap))

    def _losses(
        self,
        groups: Groups,
        pieces: list[Piece],
        batch: PolicyBatch,
        settings: UpdateSettings,
        metrics: MetricSums,
        reference: "Actor | None",
    ) -> tuple[Tensor, Tensor]:
        """Losses [N] and entropies [N] of the micro-batch's response tokens."""
        distributions = reference.distributions(groups, pieces) if reference is not None else None
        log_probs, entropy, *full_kl = self.forward(groups, pieces, settings.temperature, distributions)
        if not pieces:
            return log_probs, entropy

        def values(padded: Tensor) -> Tensor:
            return to_device(groups.gather(padded, pieces), self.device)

        advantages = batch.advantages
        if advantages.dim() == 2:
            advantages = advantages.unsqueeze(-1).expand(-1, -1, groups.width)
        old = log_probs.detach()
        if batch.old_log_probs is not None and pieces[0].group >= batch.num_on_policy:
            old = values(batch.old_log_probs)
        losses, details = compute_policy_loss(
            settings.loss_type,
            log_probs,
            old,
            values(advantages),
            to_device(groups.lengths(pieces), self.device),
            settings.clip_ratio_low,
            settings.clip_ratio_high,
            settings.clip_ratio_dual,
            settings.tau_positive,
            settings.tau_negative,
        )
        if batch.rollout_log_probs is not None and settings.tis_imp_ratio_cap is not None:
            weights, extra = compute_rollout_weights(old, values(batch.rollout_log_probs), settings.tis_imp_ratio_cap)
            losses, details = losses * weights, details | extra
        details = {"pg_loss": losses, "entropy_loss": entropy} | details
        if batch.ref_log_probs is not None:
            full_kl = [compute_kl(log_probs, values(batch.ref_log_probs), settings.kl_penalty)]
        for kl in full_kl:
            details["kl_loss"] = kl
            losses = losses + settings.kl_coef * kl
        for name, tokens in details.items():
            metrics.add(f"actor/{name}", tokens.sum(), len(losses))
        return losses, entropy

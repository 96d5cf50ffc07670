"""The policy on one rank: log-probs of its groups, and clipped policy updates on them.

Letters: G local groups, n samples, R padded response tokens, N response tokens of one forward pass.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from verl.batching import PackedBatch, Piece, pack, plan_micro_batches, split_to_count
from verl.core_algos import compute_kl, compute_policy_loss
from verl.fsdp import clip_grad_norm
from verl.protocol import DataProto
from verl.qwen_vl import ResponseLogProbs, keep_activations


@dataclass
class Groups:
    """A rank's share of a batch, unpadded: one prompt and its images per group, n responses each.

    Attributes:
        prompts, positions: per group [P] and [3, P].
        responses: per group and sample [R].
        images: per group the numbers of its images in `pixels` and `grids`.
        pixels: per image its patches [patches, patch size]; every image once.
        grids: per image (frames, rows, columns).
        num_samples, width: n and padded R of the tensors that come back.
    """

    prompts: list[Tensor]
    positions: list[Tensor]
    responses: list[list[Tensor]]
    images: list[list[int]]
    pixels: list[Tensor]
    grids: list[Tensor]
    num_samples: int
    width: int

    @classmethod
    def from_proto(cls, data: DataProto, pixels: list[Tensor], grids: list[Tensor]) -> "Groups":
        """The groups of a batch whose images, in order, have the given patches."""
        batch = data.batch
        prompt_mask, response_mask = batch["prompt_mask"].bool(), batch["response_mask"].bool()
        lengths = response_mask.sum(-1)
        images, cursor = [], 0
        for row in data.non_tensor_batch["images"]:
            images.append(list(range(cursor, cursor + len(row))))
            cursor += len(row)
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
        )

    def __len__(self) -> int:
        return len(self.prompts)

    def plan(self, max_tokens: int, shared_prompt: bool, groups: Sequence[int] | None = None) -> list[list[Piece]]:
        """Micro-batches over some groups (all by default), the same number on every rank."""
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
        return split_to_count(batches, int(count))

    def pack(self, pieces: list[Piece]) -> PackedBatch:
        """The packed row of a micro-batch; of an empty one, a stand-in that keeps this rank in step."""
        stand_in = [Piece(0, (0,))]
        return pack(pieces or stand_in, self.prompts, self.positions, self.responses, self.images)

    def gather(self, padded: Tensor, pieces: list[Piece]) -> Tensor:
        """[N] values of the pieces' response tokens out of a padded [G, n, R]."""
        rows = [
            padded[piece.group, sample, : len(self.responses[piece.group][sample])]
            for piece in pieces
            for sample in piece.samples
        ]
        return torch.cat(rows)

    def scatter(self, padded: Tensor, values: Tensor, pieces: list[Piece]) -> None:
        """Writes [N] values of the pieces' response tokens into a padded [G, n, R]."""
        cursor = 0
        for piece in pieces:
            for sample in piece.samples:
                length = len(self.responses[piece.group][sample])
                padded[piece.group, sample, :length] = values[cursor : cursor + length]
                cursor += length


@dataclass(frozen=True)
class UpdateSettings:
    """What a policy update needs to know; every field is the config key of the same name."""

    num_groups_per_mini_batch: int
    max_tokens: int
    shared_prompt: bool
    ppo_epochs: int
    clip_ratio_low: float
    clip_ratio_high: float
    clip_ratio_dual: float
    max_grad_norm: float
    kl_penalty: str
    kl_coef: float
    temperature: float


@dataclass
class MetricSums:
    """Sums and weights of metrics, so that means over tokens stay exact over micro-batches and ranks."""

    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    weights: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, name: str, total: Tensor | float, weight: float) -> None:
        self.sums[name] += float(total)
        self.weights[name] += weight

    def as_pairs(self) -> dict[str, tuple[float, float]]:
        """Name -> (sum, weight)."""
        return {name: (self.sums[name], self.weights[name]) for name in self.sums}


class Actor:
    """Log-probs and updates of one sharded model over this rank's groups."""

    def __init__(
        self,
        model: ResponseLogProbs,
        device: torch.device,
        optimizer: torch.optim.Optimizer | None = None,
        images_once: bool = True,
        activation_budget_gb: float | None = None,
    ):
        self.model = model
        self.device = device
        self.optimizer = optimizer
        self.images_once = images_once
        self.activation_budget_gb = activation_budget_gb  # None: layers keep what they were told to
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.num_skipped_steps = 0

    def _forward(self, groups: Groups, pieces: list[Piece], temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [N] of a micro-batch."""
        batch = groups.pack(pieces)
        shown = list(dict.fromkeys(batch.image_ids)) if self.images_once else batch.image_ids
        if not shown and groups.pixels:  # the tower's parameters are gathered by all ranks together
            shown = [0]
        pixel_values = torch.cat([groups.pixels[i] for i in shown]) if shown else None
        grids = torch.stack([groups.grids[i] for i in shown]) if shown else None
        if self.activation_budget_gb is not None and torch.is_grad_enabled():
            num_patches = 0 if pixel_values is None else len(pixel_values)
            keep_activations(self.model.model, len(batch.input_ids), num_patches, self.activation_budget_gb * 1024**3)
        return self.model(
            batch.to(self.device),
            pixel_values.to(self.device) if pixel_values is not None else None,
            grids.to(self.device) if grids is not None else None,
            temperature,
        )

    @torch.no_grad()
    def compute_log_probs(
        self, groups: Groups, max_tokens: int, shared_prompt: bool, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [G, n, R] of all responses, 0 where padded."""
        self.model.eval()
        shape = (len(groups), groups.num_samples, groups.width)
        log_probs, entropies = torch.zeros(shape), torch.zeros(shape)
        for pieces in groups.plan(max_tokens, shared_prompt):
            values, entropy = self._forward(groups, pieces, temperature)
            if pieces:
                groups.scatter(log_probs, values.float().cpu(), pieces)
                groups.scatter(entropies, entropy.float().cpu(), pieces)
        return log_probs, entropies

    def update(
        self,
        groups: Groups,
        advantages: Tensor,
        old_log_probs: Tensor | None,
        ref_log_probs: Tensor | None,
        settings: UpdateSettings,
    ) -> dict[str, tuple[float, float]]:
        """One optimizer step per mini-batch and epoch; metrics as (sum, weight).

        The loss of a mini-batch is the sum over its response tokens divided by their number over all ranks, so that
        neither micro-batches nor ranks change the gradient.

        Args:
            advantages: [G, n].
            old_log_probs: [G, n, R]; None when the sampled policy is the current one for the only update, where
                the ratio is 1 by definition.
            ref_log_probs: [G, n, R]; None without a KL term.
        """
        self.model.train()
        metrics = MetricSums()
        for _ in range(settings.ppo_epochs):
            for mini_batch in self._mini_batches(len(groups), settings.num_groups_per_mini_batch):
                num_tokens = self._total_tokens(groups, mini_batch)
                plan = groups.plan(settings.max_tokens, settings.shared_prompt, mini_batch)
                for pieces in plan:
                    loss = self._micro_loss(
                        groups, pieces, advantages, old_log_probs, ref_log_probs, settings, metrics
                    )
                    (loss * (self.world_size / num_tokens)).backward()
                self._step(settings.max_grad_norm, metrics)
        return metrics.as_pairs()

    @staticmethod
    def _mini_batches(num_groups: int, size: int) -> Iterator[range]:
        for start in range(0, num_groups, size):
            yield range(start, min(start + size, num_groups))

    def _total_tokens(self, groups: Groups, mini_batch: range) -> float:
        """Response tokens of the mini-batch over all ranks."""
        total = torch.tensor(float(sum(len(row) for g in mini_batch for row in groups.responses[g])))
        if self.world_size > 1:
            total = total.to(self.device)
            dist.all_reduce(total)
        return float(total)

    def _micro_loss(
        self,
        groups: Groups,
        pieces: list[Piece],
        advantages: Tensor,
        old_log_probs: Tensor | None,
        ref_log_probs: Tensor | None,
        settings: UpdateSettings,
        metrics: MetricSums,
    ) -> Tensor:
        """Sum of the loss over the micro-batch's response tokens."""
        log_probs, entropy = self._forward(groups, pieces, settings.temperature)
        if not pieces:
            return log_probs.sum() * 0.0

        def values(padded: Tensor) -> Tensor:
            return groups.gather(padded, pieces).to(self.device)

        advantage = values(advantages.unsqueeze(-1).expand(-1, -1, groups.width))
        old = values(old_log_probs) if old_log_probs is not None else log_probs.detach()
        losses, details = compute_policy_loss(
            log_probs, old, advantage, settings.clip_ratio_low, settings.clip_ratio_high, settings.clip_ratio_dual
        )
        num_tokens = len(losses)
        metrics.add("actor/pg_loss", losses.detach().sum(), num_tokens)
        metrics.add("actor/entropy_loss", entropy.sum(), num_tokens)
        for name, tokens in details.items():
            metrics.add(f"actor/{name}", tokens.sum(), num_tokens)
        loss = losses.sum()
        if ref_log_probs is not None:
            kl = compute_kl(log_probs, values(ref_log_probs), settings.kl_penalty)
            metrics.add("actor/kl_loss", kl.detach().sum(), num_tokens)
            loss = loss + settings.kl_coef * kl.sum()
        return loss

    def _step(self, max_grad_norm: float, metrics: MetricSums) -> None:
        """Clips and applies the gradient; a non-finite one is skipped and counted."""
        assert self.optimizer is not None
        norm = clip_grad_norm(self.model, max_grad_norm)
        finite = norm == norm and norm not in (float("inf"), float("-inf"))
        if finite:
            self.optimizer.step()
            metrics.add("actor/grad_norm", norm, 1)
        else:
            self.num_skipped_steps += 1
        metrics.add("actor/skipped_steps", 0.0 if finite else 1.0, 1)
        self.optimizer.zero_grad(set_to_none=True)


def image_patches(images: Sequence[Any], image_processor: Any, **size: int) -> tuple[list[Tensor], list[Tensor]]:
    """Patches and grid of each image, by the model's own image processor."""
    if not images:
        return [], []
    out = image_processor(images=list(images), return_tensors="pt", **size)
    lengths = out["image_grid_thw"].prod(-1).tolist()
    return list(out["pixel_values"].split(lengths)), list(out["image_grid_thw"])

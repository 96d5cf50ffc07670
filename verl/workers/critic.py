"""The critic on one rank: values of response tokens, and value updates towards returns.

Letters as in actor.py: G local groups, n samples, R padded response tokens, N response tokens of one forward pass.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from verl.algos.losses import compute_value_loss
from verl.model.packing import Piece, to_device
from verl.workers.actor import Groups, Learner, MetricSums, StepSettings


@dataclass(frozen=True, kw_only=True)
class ValueSettings(StepSettings):
    """Settings of a critic update; fields are named as their config keys."""

    cliprange_value: float


class Critic(Learner):
    """Values and updates of one sharded value model over this rank's groups."""

    name = "critic"

    @torch.no_grad()
    def compute_values(self, groups: Groups, max_tokens: int, shared_prompt: bool) -> Tensor:
        """Values [G, n, R] before each response token, 0 where padded."""
        self.model.eval()
        values = torch.zeros((len(groups), groups.num_samples, groups.width))
        for pieces in groups.plan(max_tokens, shared_prompt):
            part = self.forward(groups, pieces)
            if pieces:
                groups.scatter(values, part.cpu(), pieces)
        return values

    def update(
        self, groups: Groups, old_values: Tensor, returns: Tensor, settings: ValueSettings
    ) -> dict[str, tuple[float, float]]:
        """One optimizer step per mini-batch and epoch; metrics as (sum, weight).

        Args:
            old_values, returns: [G, n, R].
        """
        metrics = MetricSums()

        def micro_losses(pieces: list[Piece]) -> Tensor:
            values = self.forward(groups, pieces)
            if not pieces:
                return values
            old, target = (to_device(groups.gather(padded, pieces), self.device) for padded in (old_values, returns))
            losses, details = compute_value_loss(values, old, target, settings.cliprange_value)
            for name, tokens in ({"vf_loss": losses} | details).items():
                metrics.add(f"critic/{name}", tokens.sum(), len(losses))
            return losses

        self.learn(groups, settings, metrics, micro_losses)
        return metrics.as_pairs()

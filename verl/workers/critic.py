"""The critic on one rank: values of its groups' response tokens, and updates towards their returns.

Letters as in actor.py: G local groups, n samples, R padded response tokens, N response tokens of one forward pass.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from verl.batching import Piece, send
from verl.losses import compute_value_loss
from verl.workers.actor import Groups, Learner, MetricSums, StepSettings


@dataclass(frozen=True, kw_only=True)
class ValueSettings(StepSettings):
    """What an update of the critic needs to know; every field is the config key of the same name."""

    cliprange_value: float


class Critic(Learner):
    """Values and updates of one sharded value model over this rank's groups."""

    name = "critic"

    @torch.no_grad()
    def compute_values(self, groups: Groups, max_tokens: int, shared_prompt: bool) -> Tensor:
        """[G, n, R] what reward is expected before each response token, 0 where padded."""
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
            old, target = (send(groups.gather(padded, pieces), self.device) for padded in (old_values, returns))
            losses, details = compute_value_loss(values, old, target, settings.cliprange_value)
            for name, tokens in ({"vf_loss": losses} | details).items():
                metrics.add(f"critic/{name}", tokens.sum(), len(losses))
            return losses

        self.learn(groups, settings, metrics, micro_losses)
        return metrics.as_pairs()

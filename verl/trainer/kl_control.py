"""KL control: where the divergence from the reference acts, and its weight over the run."""

from typing import Any

from verl.algos.divergences import FULL_KL, adapt_kl_coef, compute_kl
from verl.config.records import Config


class KLControl:
    """The KL term of a run; `coef` is its weight now, fixed or adaptive.

    Letters: G groups, n samples, R response tokens.
    """

    def __init__(self, config: Config):
        self.algorithm = config.algorithm
        self.num_responses = config.data.rollout_batch_size * config.worker.rollout.n
        self.coef = config.algorithm.kl_coef

    @property
    def is_estimated(self) -> bool:
        """True when the divergence is estimated from the reference's log-probs of the sampled tokens."""
        return not self.algorithm.disable_kl and self.algorithm.kl_penalty != FULL_KL

    @property
    def is_in_reward(self) -> bool:
        """True when the divergence is taken off the rewards."""
        return not self.algorithm.disable_kl and not self.algorithm.use_kl_loss

    @property
    def is_in_loss(self) -> bool:
        """True when the divergence is a term of the loss."""
        return not self.algorithm.disable_kl and self.algorithm.use_kl_loss

    @property
    def loss_keys(self) -> list[str]:
        """Columns that the loss reads for its KL term."""
        return ["ref_log_probs"] if self.is_in_loss else []

    def penalize(self, batch: Any) -> dict[str, float]:
        """Adds `rewards` [G, n]: scores minus `penalties` [G, n, R] = coef x KL, where the KL acts there; metrics."""
        batch["rewards"] = batch["scores"]
        if not self.is_in_reward:
            return {}
        mask = batch["response_mask"]
        if "kl" in batch.keys():
            kls = batch["kl"]
        else:
            kls = compute_kl(batch["old_log_probs"], batch["ref_log_probs"], self.algorithm.kl_penalty)
        kls = kls.masked_fill(~mask.bool(), 0.0)
        batch["penalties"] = self.coef * kls
        batch["rewards"] = batch["scores"] - batch["penalties"].sum(-1)
        kl = float((kls.sum(-1) / mask.sum(-1))[~batch["scores"].isnan()].nanmean())
        metrics = {"actor/kl_penalty": kl, "actor/kl_coef": self.coef}
        self._adapt(kl)
        return metrics

    def follow_loss(self, metrics: dict[str, float]) -> dict[str, float]:
        """The weight that the update's KL term had, as a metric; an adaptive weight moves afterwards."""
        if not self.is_in_loss:
            return {}
        used = {"actor/kl_coef": self.coef}
        if "actor/kl_loss" in metrics:  # the full divergence is not measured where it weighs nothing
            self._adapt(metrics["actor/kl_loss"])
        return used

    def _adapt(self, kl: float) -> None:
        algorithm = self.algorithm
        if algorithm.kl_type == "adaptive":
            self.coef = adapt_kl_coef(self.coef, kl, algorithm.kl_target, algorithm.kl_horizon, self.num_responses)

"""Rollout batches of training steps: prompts, responses and scores, with online filtering (dynamic sampling).

Letters: G groups (prompts of a step), n samples, P padded prompt tokens.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from verl.config.records import Config, RolloutConfig
from verl.data.dataset import DataError, RLHFDataset, collate_prompts
from verl.data.mixture import build_order
from verl.model.packing import balanced_order
from verl.protocol import DataProto
from verl.protocol.row_values import as_objects
from verl.reward import PendingRewards, RewardManager

GREEDY = {"n": 1, "temperature": 0.0, "top_p": 1.0, "top_k": -1}
PROMPT_KEYS = ("prompt_ids", "prompt_mask", "prompt_position_ids")
SCORE = "score/"  # prefix of a group's score tensors
TEXTS = "texts"  # of a group's n responses
AGE = "age"  # steps since a group was sampled
SURPLUS_FILE = "surplus_groups.pt"

Generate = Callable[[DataProto, dict[str, Any], int], DataProto]


@dataclass
class Rollout:
    """A step's groups, ordered so that every rank has an equal, balanced share of every mini-batch.

    Attributes:
        groups: G prompts with their responses.
        metrics: of online filtering, and once there are scores of the calls of coroutine rewards.
    """

    groups: DataProto
    metrics: dict[str, float]
    _pending: list[PendingRewards]
    _order: list[int]

    def scores(self) -> dict[str, Tensor]:
        """Scores [G, n] by reward key; waits for the scoring processes."""
        if self._pending:
            since = time.monotonic()
            scores = _join_scores([pending.result(since) for pending in self._pending])
            self.metrics |= count_calls(self._pending)
            return {key: values[self._order] for key, values in scores.items()}
        known = {key for key in self.groups.batch.keys() if key.startswith(SCORE)}
        return {key.removeprefix(SCORE): self.groups.batch[key] for key in sorted(known)}

    def texts(self) -> list[str]:
        """Decoded responses [G * n], once the scores are there."""
        if not self._pending:
            return [text for texts in self.groups.non_tensor_batch[TEXTS] for text in texts]
        n = self.groups.batch["responses"].shape[1]
        texts = [text for pending in self._pending for text in pending.texts]
        return [text for group in self._order for text in texts[group * n : (group + 1) * n]]


@dataclass(frozen=True)
class Position:
    """Dataloader position: mini-batches drawn so far, and surplus groups that no step has used yet."""

    num_drawn: int = 0
    surplus: DataProto | None = None

    def write_surplus(self, folder: Path) -> None:
        """Writes surplus groups, if any, without their prompts."""
        if self.surplus is not None and len(self.surplus):
            sampled = [key for key in self.surplus.batch.keys() if key not in PROMPT_KEYS]
            self.surplus.select(sampled, ["experts"], []).save_to_disk(str(folder / SURPLUS_FILE))


class BatchMaker:
    """Makes the rollout batch of each step.

    Online filtering keeps groups with filter_low < mean of filter_key over responses < filter_high and samples until
    a step is full: dynamic sampling of DAPO, https://arxiv.org/abs/2503.14476, section 3.2. Surplus groups start the
    next step and are saved in checkpoints. While they fill a step nothing is sampled, so that all of them come from
    the last step that sampled: none is older than the ceiling of call size / rollout_batch_size, in steps.

    Args:
        config: of the run.
        train_set: prompts.
        reward: scores responses.
        pad_token_id: of the tokenizer.
        num_ranks: that share a step.
    """

    def __init__(
        self, config: Config, train_set: RLHFDataset, reward: RewardManager, pad_token_id: int, num_ranks: int
    ):
        self.config, self.train_set, self.reward = config, train_set, reward
        self.pad_token_id, self.num_ranks = pad_token_id, num_ranks
        data = config.data
        size = data.mini_rollout_batch_size or data.rollout_batch_size
        self.order = build_order(train_set, size, data.shuffle, data.seed)
        self.position = Position()
        self.step = 0  # told to the reward
        self._prefetched: tuple[int, list[int], DataProto] | None = None
        self._decoder = ThreadPoolExecutor(1)
        self._decoded: dict[int, Future[list[int]]] = {}

    def upcoming(self) -> DataProto | None:
        """The first prompts of the next step; `make` later passes the same object to the engine.

        None if they cannot be read: `make` says why, when the step before is complete.
        """
        number = self.position.num_drawn
        try:
            if self._prefetched is None or self._prefetched[0] != number:
                rows = self._rows(number)
                self._prefetched = (number, rows, self._prompts(rows))
        except DataError:
            return None
        return self._prefetched[2]

    def _rows(self, number: int) -> list[int]:
        """Rows of a batch that can all be decoded; the next batch is decoded meanwhile."""
        for ahead in (number, number + 1):
            if ahead not in self._decoded:
                self._decoded[ahead] = self._decoder.submit(self._readable, ahead)
        return self._decoded[number].result()

    def _readable(self, number: int) -> list[int]:
        parts = [self.train_set.readable(rows, spares) for rows, spares in self.order.parts(number)]
        return self.order.mix(number, parts)

    def make(self, generate: Generate) -> Rollout:
        """The groups of the next step.

        Args:
            generate: prompts, sampling settings and a seed -> the prompts with their responses.

        Raises:
            DataError: too few groups were kept after trainer.max_try_make_batch calls.
        """
        size = self.config.data.rollout_batch_size
        self._num_drawn = self.position.num_drawn
        if self.config.algorithm.online_filtering:
            groups, metrics = self._draw_filtered(generate, size)
            surplus = groups[size:]
            surplus.batch[AGE] = surplus.batch[AGE] + 1
            self.position = Position(self._num_drawn, surplus)
            return self._balanced(groups[:size], metrics, [])
        parts, pending = [], []
        for _ in range(size // self.order.batch_size):
            parts.append(self._sample(generate))
            pending.append(self.reward.submit(parts[-1], self.step))
        self.position = Position(self._num_drawn)
        return self._balanced(join_groups(parts), {}, pending)

    def _draw_filtered(self, generate: Generate, size: int) -> tuple[DataProto, dict[str, float]]:
        limit = self.config.trainer.max_try_make_batch
        kept = [self.position.surplus] if self.position.surplus is not None else []
        num_old = num_kept = sum(map(len, kept))
        means: list[Tensor] = []
        self._filtered: list[PendingRewards] = []
        while num_kept < size:
            if len(means) == limit:
                raise DataError(self._filtering_fault(num_kept, torch.cat(means)))
            groups, mean = self._sample_filtered(generate)
            kept.append(groups)
            means.append(mean)
            num_kept += len(groups)
        groups = join_groups(kept)
        ages = groups.batch[AGE][:size].float()
        metrics = {"attempts": len(means), "surplus": num_kept - size, "mean_age": ages.mean(), "max_age": ages.max()}
        if means:
            sampled = torch.cat(means)
            metrics["kept_share"] = (num_kept - num_old) / len(sampled)
            metrics[f"{self.config.algorithm.filter_key}_of_all"] = sampled.nanmean()
        named = {f"online_filtering/{name}": float(value) for name, value in metrics.items()}
        return groups, named | count_calls(self._filtered)

    def _sample_filtered(self, generate: Generate) -> tuple[DataProto, Tensor]:
        """The kept groups of the next prompts, with their scores and age 0, and the mean of filter_key of all."""
        algorithm = self.config.algorithm
        groups = self._sample(generate)
        pending = self.reward.submit(groups, self.step)
        scores = pending.result()
        self._filtered.append(pending)
        groups.non_tensor_batch[TEXTS] = group_texts(pending.texts, len(groups))
        mean = scores[algorithm.filter_key].nanmean(dim=-1)  # NaN, which is not kept, where all are dropped
        for key, values in scores.items():
            groups.batch[SCORE + key] = values
        groups.batch[AGE] = torch.zeros(len(groups), dtype=torch.long)
        return groups[(mean > algorithm.filter_low) & (mean < algorithm.filter_high)], mean

    def _filtering_fault(self, num_kept: int, means: Tensor) -> str:
        algorithm = self.config.algorithm
        return (
            f"online filtering kept {num_kept} groups of the {len(means)} sampled in "
            f"{self.config.trainer.max_try_make_batch} attempts, and a step needs data.rollout_batch_size="
            f"{self.config.data.rollout_batch_size}: the mean of algorithm.filter_key={algorithm.filter_key} was "
            f"{float(means.nanmean()):.3f} and must lie between algorithm.filter_low={algorithm.filter_low} and "
            f"algorithm.filter_high={algorithm.filter_high}; widen them, raise worker.rollout.n, or raise "
            "trainer.max_try_make_batch"
        )

    def _sample(self, generate: Generate) -> DataProto:
        """The next prompts with responses and, for remax, rewards of greedy responses as `baselines`."""
        prefetched, self._prefetched = self._prefetched, None
        if prefetched is not None and prefetched[0] == self._num_drawn:
            _, rows, prompts = prefetched
        else:
            rows = self._rows(self._num_drawn)
            prompts = self._prompts(rows)
        self._decoded.pop(self._num_drawn, None)
        self._num_drawn += 1
        greedy = None
        if self.config.algorithm.adv_estimator == "remax":
            greedy = self.reward.submit(generate(prompts, GREEDY, self._num_drawn), self.step)
        sampling = train_sampling(self.config.worker.rollout)
        groups = generate(prompts, sampling, self._num_drawn)
        groups.batch["row"] = torch.tensor(rows)
        if greedy is not None:
            groups.batch["baselines"] = greedy.result()["overall"][:, 0]
        return groups

    def _prompts(self, rows: list[int]) -> DataProto:
        return collate_prompts([self.train_set[row] for row in rows], self.pad_token_id)

    def _balanced(self, groups: DataProto, metrics: dict[str, float], pending: list[PendingRewards]) -> Rollout:
        tokens = groups.batch["prompt_mask"].sum(-1) + groups.batch["response_mask"].sum((-1, -2))
        worker = self.config.worker
        size = worker.actor.global_batch_size
        if self.config.algorithm.adv_estimator == "gae":
            # Mini-batches of both are then the same on any number of ranks.
            size = math.gcd(size, worker.critic.global_batch_size)
        order = balanced_order(tokens.tolist(), size, self.num_ranks)
        return Rollout(groups[order], metrics, pending, order)

    def restore(self, folder: Path, num_drawn: int) -> None:
        """Restores the position of a checkpoint."""
        path = folder / SURPLUS_FILE
        surplus = None
        if path.is_file():
            sampled = DataProto.load_from_disk(str(path))
            if AGE not in sampled.batch.keys():  # of a checkpoint written before ages were kept
                sampled.batch[AGE] = torch.ones(len(sampled), dtype=torch.long)
            surplus = self._prompts(sampled.batch["row"].tolist()).union(sampled)
            surplus.non_tensor_batch[TEXTS] = group_texts(self.reward.decode(surplus), len(surplus))
        self.position = Position(num_drawn, surplus)


def group_texts(texts: list[str], num_groups: int) -> np.ndarray:
    """Texts [G * n] as an array of G lists."""
    n = len(texts) // num_groups
    return as_objects([texts[start * n : (start + 1) * n] for start in range(num_groups)])


def train_sampling(rollout: RolloutConfig) -> dict[str, Any]:
    """Sampling parameters of training rollouts."""
    return {key: getattr(rollout, key) for key in ("n", "temperature", "top_p", "top_k", "ignore_eos")}


def join_groups(parts: list[DataProto]) -> DataProto:
    """Concatenates groups: prompts padded to the longest, missing scores 0."""
    width = max(part.batch["prompt_ids"].shape[-1] for part in parts)
    keys = dict.fromkeys(key for part in parts for key in part.batch.keys() if key.startswith(SCORE))
    joined = []
    for part in parts:
        tensors = dict(part.batch.items())
        for key in PROMPT_KEYS:
            tensors[key] = pad(tensors[key], (width - tensors[key].shape[-1], 0))
        missing = {key: torch.zeros(tensors["responses"].shape[:2]) for key in keys if key not in tensors}
        joined.append(DataProto.from_dict(tensors | missing, dict(part.non_tensor_batch)))
    return DataProto.concat(joined)


def count_calls(pending: list[PendingRewards]) -> dict[str, float]:
    """Metrics of the calls of coroutine rewards, summed over batches; none without such rewards."""
    names = dict.fromkeys(name for part in pending for name in part.counts)
    return {f"reward_calls/{name}": sum(part.counts.get(name, 0.0) for part in pending) for name in names}


def scale_advantages(advantages: Tensor, sources: Sequence[str], scales: Mapping[str, float]) -> Tensor:
    """Advantages [G, ...] times the scale of each group's source."""
    factors = torch.tensor([scales.get(source, 1.0) for source in sources])
    return advantages * factors.reshape(-1, *[1] * (advantages.dim() - 1))


def add_scores(batch: Any, overall: Tensor) -> None:
    """Adds `scores` [G, n], and `kept` [G, n] where responses are dropped, whose score is NaN."""
    batch["scores"] = overall
    if overall.isnan().any():
        batch["kept"] = ~overall.isnan()


def _join_scores(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    keys = dict.fromkeys(key for part in parts for key in part)
    return {key: torch.cat([part.get(key, torch.zeros_like(part["overall"])) for part in parts]) for key in keys}

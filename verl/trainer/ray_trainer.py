"""The training loop: rollout, reward, old and reference policy, advantage, update, validation, checkpoint.

Letters: G groups (prompts of a step), n samples, R response tokens.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from verl import checkpoint
from verl.batching import balanced_order
from verl.config import Config, ConfigError, config_to_dict
from verl.core_algos import compute_grpo_advantages
from verl.dataset import BatchOrder, RLHFDataset, collate_prompts
from verl.protocol import DataProto, pad_dataproto_to_divisor, unpad_dataproto
from verl.reward import RewardManager
from verl.single_controller import WorkerGroup
from verl.trainer.metrics import compute_data_metrics, compute_memory_metrics, compute_timing_metrics, reduce_metrics
from verl.trainer.tracking import Tracker

GROUP_KEYS = ("prompt_ids", "prompt_mask", "prompt_position_ids", "responses", "response_mask")


@dataclass
class Validation:
    """Scores of one validation: means by metric name, and one record per sample."""

    metrics: dict[str, float]
    records: list[dict[str, Any]]


class GRPOTrainer:
    """Group-relative policy optimisation over worker groups.

    Args:
        config: of the run, checked.
        actor: group of training ranks.
        rollout: group of engines.
        reward: scores responses.
        train_set, val_set: prompts.
        pad_token_id: of the tokenizer.
        tracker: takes the metrics of each step.
    """

    def __init__(
        self,
        config: Config,
        actor: WorkerGroup,
        rollout: WorkerGroup,
        reward: RewardManager,
        train_set: RLHFDataset,
        val_set: RLHFDataset,
        pad_token_id: int,
        tracker: Tracker,
    ):
        self.config, self.actor, self.rollout, self.reward = config, actor, rollout, reward
        self.train_set, self.val_set, self.pad_token_id, self.tracker = train_set, val_set, pad_token_id, tracker
        data = config.data
        self.order = BatchOrder(len(train_set), data.rollout_batch_size, data.shuffle, data.seed)
        self.num_steps = count_steps(config, len(train_set))
        self.root = Path(config.trainer.save_checkpoint_path)
        self.global_step = 0
        self.timing: dict[str, float] = {}

    def fit(self) -> None:
        """Trains from the newest checkpoint, or from the start, to the last step."""
        trainer = self.config.trainer
        self._resume()
        if trainer.val_before_train and self.global_step == 0 or trainer.val_only:
            self._log_validation()
        if trainer.val_only:
            return
        progress = tqdm(total=self.num_steps, initial=self.global_step, desc="Training", unit="step")
        while self.global_step < self.num_steps:
            self.global_step += 1
            self.timing = {}
            with self._timer("step"):
                metrics = self._step(self._prompts(self.order.rows(self.global_step - 1)))
                if self._is_due(trainer.val_freq):
                    with self._timer("validation"):
                        metrics |= self._validate()
                if self._is_due(trainer.save_freq):
                    with self._timer("save_checkpoint"):
                        self._save()
            metrics |= compute_timing_metrics(self.timing, metrics, self.config.num_ranks)
            self.tracker.log(metrics | compute_memory_metrics(), self.global_step)
            progress.update()
            progress.set_postfix(reward=f"{metrics['reward/overall']:.3f}", s=f"{self.timing['step']:.0f}")
        progress.close()

    def _step(self, prompts: DataProto) -> dict[str, Any]:
        """One training step on G prompts; its metrics."""
        with self._timer("gen"), self._engines_awake():
            groups = self._balanced(self._generate(prompts, self._train_sampling(), seed=self.global_step))
        pending = self.reward.submit(groups)
        with self._timer("load"):
            self.actor.load_groups(groups.select(list(GROUP_KEYS), ["images"]))
        carrier = groups.select(["response_mask"], [])
        if not self._is_single_update:
            with self._timer("old"):
                groups.union(self.actor.compute_log_probs(carrier))
        if not self.config.algorithm.disable_kl:
            with self._timer("ref"):
                groups.union(self.actor.compute_ref_log_probs(carrier))
        with self._timer("reward"):
            scores = pending.result()
        groups.batch["scores"] = scores["overall"]
        groups.batch["advantages"] = compute_grpo_advantages(scores["overall"])
        with self._timer("update_actor"):
            keys = [key for key in ("advantages", "old_log_probs", "ref_log_probs") if key in groups.batch.keys()]
            update = groups.select(keys, [])
            update.meta_info["step"] = self.global_step
            actor_metrics = self.actor.update_actor(update)
        metrics = {f"reward/{key}": float(value.mean()) for key, value in scores.items()}
        metrics |= compute_data_metrics(
            groups, self.config.data.max_prompt_length, self.config.data.max_response_length
        )
        return metrics | reduce_metrics(actor_metrics)

    @property
    def _is_single_update(self) -> bool:
        """Whether a step updates once, so that the sampled policy is the current one and the ratio 1."""
        actor = self.config.worker.actor
        return actor.ppo_epochs == 1 and actor.global_batch_size == self.config.data.rollout_batch_size

    def _prompts(self, rows: list[int]) -> DataProto:
        return collate_prompts([self.train_set[row] for row in rows], self.pad_token_id)

    def _train_sampling(self) -> dict[str, Any]:
        rollout = self.config.worker.rollout
        return {key: getattr(rollout, key) for key in ("n", "temperature", "top_p", "top_k", "ignore_eos")}

    def _generate(self, prompts: DataProto, sampling: dict[str, Any], seed: int) -> DataProto:
        """The prompts with n responses each; the engines are awake."""
        request = prompts.select([], ["raw_prompt_ids", "images"])
        request.meta_info = {"sampling": sampling, "seed": self.config.worker.rollout.seed * 1_000_003 + seed}
        request, num_padded = pad_dataproto_to_divisor(request, len(self.rollout))
        responses = unpad_dataproto(self.rollout.generate(request), num_padded)
        return prompts.select().union(responses)

    @contextmanager
    def _engines_awake(self) -> Iterator[None]:
        """Engines that hold the newest weights; asleep they keep none, so that they are sent every time."""
        with self._timer("weight_sync"):
            self.rollout.wake_up(["weights"])
            self.actor.send_weights(self.rollout.actors)
            self.rollout.wake_up(["kv_cache"])
        yield
        with self._timer("sleep"):
            self.rollout.sleep()

    def _balanced(self, groups: DataProto) -> DataProto:
        """The groups in an order that gives every rank an equal part of every mini-batch."""
        tokens = groups.batch["prompt_mask"].sum(-1) + groups.batch["response_mask"].sum((-1, -2))
        order = balanced_order(tokens.tolist(), self.config.worker.actor.global_batch_size, len(self.actor))
        return groups[order]

    def _is_due(self, frequency: int) -> bool:
        """Whether something happens at this step: every `frequency` steps if positive, and always at the last."""
        return self.global_step == self.num_steps or frequency > 0 and self.global_step % frequency == 0

    def _validate(self) -> dict[str, float]:
        """Means of the validation rewards; the samples go to a file and to the tracker."""
        validation = self.evaluate()
        path = self.root / f"validation_step_{self.global_step}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in validation.records))
        shown = validation.records[: self.config.trainer.val_generations_to_log]
        self.tracker.log_generations(shown, self.global_step)
        return validation.metrics

    def _log_validation(self) -> None:
        self.timing = {}
        with self._timer("validation"):
            metrics = self._validate()
        self.tracker.log(metrics | {"timing_s/validation": self.timing["validation"]}, self.global_step)

    def evaluate(self) -> Validation:
        """Scores of the current policy on the validation prompts."""
        sampling = self._train_sampling() | {"n": 1} | self.config.worker.rollout.val_override_config
        size = self.config.data.val_batch_size
        size = len(self.val_set) if size < 0 else size
        totals: dict[str, list[float]] = {}
        records = []
        answered = []
        with self._engines_awake():
            for start in range(0, len(self.val_set), size):
                rows = range(start, min(start + size, len(self.val_set)))
                prompts = collate_prompts([self.val_set[row] for row in rows], self.pad_token_id)
                groups = self._generate(prompts, sampling, seed=0)
                answered.append((groups, self.reward.submit(groups)))
        for groups, pending in answered:
            scores = pending.result()
            for key, values in scores.items():
                totals.setdefault(key, []).extend(values.flatten().tolist())
            records += self._records(groups, pending.texts, scores)
        metrics = {f"val/{key}_reward": sum(values) / len(records) for key, values in totals.items()}
        metrics["val/reward_score"] = metrics["val/overall_reward"]
        return Validation(metrics, records)

    @staticmethod
    def _records(groups: DataProto, texts: list[str], scores: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
        num_samples = scores["overall"].shape[1]
        flat = {key: values.flatten().tolist() for key, values in scores.items()}
        lengths = groups.batch["response_mask"].sum(-1).flatten().tolist()
        return [
            {key: str(groups.non_tensor_batch[key][i // num_samples]) for key in ("uid", "problem", "ground_truth")}
            | {"sample": i % num_samples, "response": text, "response_length": lengths[i]}
            | {"score": {key: values[i] for key, values in flat.items()}}
            for i, text in enumerate(texts)
        ]

    def _save(self) -> None:
        """Writes a checkpoint that is complete or absent, then removes old ones."""
        folder = checkpoint.begin(self.root, self.global_step)
        self.actor.save(str(folder))
        state = {"global_step": self.global_step, "config": config_to_dict(self.config)}
        checkpoint.finish(folder, state)
        checkpoint.prune(self.root, self.config.trainer.save_limit)

    def _resume(self) -> None:
        """Loads the given or the newest complete checkpoint, if there is one."""
        trainer = self.config.trainer
        folder = Path(trainer.load_checkpoint_path) if trainer.load_checkpoint_path else None
        if folder is not None:
            try:
                checkpoint.check(folder)
            except ValueError as error:
                raise ConfigError([f"trainer.load_checkpoint_path: {error}"]) from error
        elif trainer.find_last_checkpoint:
            folder = checkpoint.find_latest(self.root)
        if folder is None:
            return
        self.global_step = checkpoint.read_trainer_state(folder)["global_step"]
        self.actor.restore(str(folder))
        self.tracker.resume(self.global_step)
        print(f"Resumed step {self.global_step} of {self.num_steps} from {folder}", flush=True)  # noqa: T201

    @contextmanager
    def _timer(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.timing[name] = self.timing.get(name, 0.0) + time.perf_counter() - start


def count_steps(config: Config, num_rows: int) -> int:
    """Training steps of the run: max_steps, else the whole batches of all epochs."""
    trainer = config.trainer
    return trainer.max_steps or num_rows // config.data.rollout_batch_size * trainer.total_epochs

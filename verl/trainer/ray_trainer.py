"""The GRPO training loop: rollout, reward, old and reference log-probs, advantages, update, validation, checkpoint.

Letters: G groups (prompts of a step), n samples, R response tokens.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from verl.algos.advantages import compute_advantages
from verl.algos.divergences import FULL_KL, adapt_kl_coef, compute_kl
from verl.config.loading import config_to_dict
from verl.config.records import Config
from verl.data.dataset import RLHFDataset, collate_prompts
from verl.distributed import checkpoint
from verl.distributed.single_controller import WorkerError, WorkerGroup
from verl.protocol import DataProto, pad_dataproto_to_divisor, unpad_dataproto
from verl.reward import RewardManager
from verl.trainer.batches import BatchMaker, train_sampling
from verl.trainer.interrupt import Interrupt
from verl.trainer.metrics import compute_data_metrics, compute_memory_metrics, compute_timing_metrics, reduce_metrics
from verl.trainer.saver import CheckpointSaver
from verl.trainer.tracking import Tracker
from verl.trainer.validation import Validation, collect_scores

GROUP_KEYS = ("prompt_ids", "prompt_mask", "prompt_position_ids", "responses", "response_mask")


class DivergenceError(RuntimeError):
    """Training diverged; the message has the reason and the keys to change."""


class MemoryLimitError(RuntimeError):
    """Host memory of a machine is nearly full."""


class GRPOTrainer:
    """Trainer over worker groups: GRPO, and the other advantage estimators of verl.algos.advantages.

    Args:
        config: checked.
        actor: group of training ranks.
        rollout: group of engines.
        reward: scores responses.
        train_set, val_set: prompts.
        pad_token_id: of the tokenizer.
        tracker: logs metrics.
        start: folder of a complete checkpoint to resume from.
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
        start: Path | None = None,
    ):
        self.config, self.actor, self.rollout, self.reward = config, actor, rollout, reward
        self.train_set, self.val_set, self.pad_token_id, self.tracker = train_set, val_set, pad_token_id, tracker
        self.batches = BatchMaker(config, train_set, reward, pad_token_id, len(actor))
        self.kl_coef = config.algorithm.kl_coef
        self.num_steps = count_steps(config, len(train_set))
        self.root = Path(config.trainer.save_checkpoint_path)
        self.saver = CheckpointSaver(self.root, [actor], config.trainer)
        self.finish_rendering: Callable[[], Any] = lambda: None
        self.interrupt = Interrupt()
        self.start = start
        self.global_step = 0
        self.trained_step = 0
        self.trained_position, self.trained_kl_coef = self.batches.position, self.kl_coef
        self.unlogged: dict[str, Any] = {}
        self.timing: dict[str, float] = {}

    def fit(self) -> None:
        """Trains to the last step, from a checkpoint if there is one.

        An interrupt, or an error outside the workers, saves the last update first.
        """
        self._resume()
        with self.interrupt.handling_signals():
            try:
                self._train()
            except WorkerError:
                raise
            except BaseException:
                self._save_unsaved_update()
                raise
            self.saver.finish_pending()

    def _train(self) -> None:
        trainer = self.config.trainer
        if trainer.val_before_train and self.global_step == 0 or trainer.val_only:
            self._log_validation()
        if trainer.val_only:
            return
        progress = tqdm(total=self.num_steps, initial=self.global_step, desc="Training", unit="step")
        while self.global_step < self.num_steps:
            self.global_step += 1
            with self._timer("step"):
                metrics = self._step()
                if self._is_due(trainer.val_freq):
                    with self._timer("validation"), self.interrupt.interruptible():
                        metrics |= self._validate()
            reward, seconds = metrics["reward/overall"], self.timing["step"]
            self._log_step()
            # After logging, so that every checkpointed step is logged even if the run is killed.
            if self._is_due(trainer.save_freq):
                self._save(metrics.get("val/reward_score"))
            self.saver.finish_pending(blocking=False)
            self._check_memory(metrics)
            progress.update()
            # Not the loss, which is 0 for on-policy updates.
            grad_norm = metrics.get("actor/grad_norm", 0.0)
            progress.set_postfix(reward=f"{reward:.3f}", grad=f"{grad_norm:.2g}", s=f"{seconds:.0f}")
        progress.close()

    def _log_step(self) -> None:
        """Logs the metrics of the last update; later timings count for the next step."""
        metrics, self.unlogged = self.unlogged, {}
        metrics |= compute_timing_metrics(self.timing, metrics, self.config.num_ranks)
        metrics |= compute_memory_metrics()
        metrics["checkpoint/failed_saves"] = self.saver.num_failed
        self.tracker.log(metrics, self.trained_step)
        self.timing = {}

    def _check_memory(self, metrics: dict[str, Any]) -> None:
        """Ends the run while it can still save, before the OOM killer ends a process."""
        share, limit = metrics["perf/max_host_memory_share"], self.config.trainer.max_host_memory_share
        if share > limit:
            raise MemoryLimitError(
                f"step {self.global_step}: {share:.0%} of a machine's memory is in use, over "
                f"trainer.max_host_memory_share={limit:g} (a rank holds up to "
                f"{metrics['perf/max_rank_memory_gb']:.1f} GiB, the driver {metrics['perf/driver_memory_gb']:.1f}); "
                "lower data.rollout_batch_size or data.max_pixels, or free memory; the same command goes on"
            )

    def _step(self) -> dict[str, Any]:
        """Runs one training step and returns its metrics."""
        with self.interrupt.interruptible():
            groups, scores, metrics = self._make_experience()
        self._render_ahead()
        with self._timer("adv"):
            metrics |= self._compute_advantages(groups, scores["overall"])
        metrics |= self._update(groups)
        self.trained_step = self.global_step
        self.trained_position, self.trained_kl_coef = self.batches.position, self.kl_coef
        metrics |= {f"reward/{key}": float(value.mean()) for key, value in scores.items()}
        data = self.config.data
        metrics |= compute_data_metrics(groups, data.max_prompt_length, data.max_response_length)
        self.unlogged = metrics
        self._check_skipped(metrics)
        return metrics

    def _make_experience(self) -> tuple[DataProto, dict[str, torch.Tensor], dict[str, float]]:
        """Rollouts with log-probs and values, their scores, and filtering metrics; the policy is unchanged."""
        with self._timer("gen"), self._engines_awake():
            rollout = self.batches.make(self._generate)
        with self._timer("load"):
            self.actor.load_groups(rollout.groups.select(list(GROUP_KEYS), ["images"]))
        self._add_log_probs_and_values(rollout.groups)
        with self._timer("reward"):
            return rollout.groups, rollout.scores(), rollout.metrics

    def _add_log_probs_and_values(self, groups: DataProto) -> None:
        """Adds old and reference log-probs, full KL and values, as far as the update needs them."""
        algorithm = self.config.algorithm
        carrier = groups.select(["response_mask"], [])
        if self.num_old_prompts:
            carrier.meta_info["from_second_update"] = self.num_old_prompts < self.config.data.rollout_batch_size
            with self._timer("old"):
                groups.union(self.actor.compute_log_probs(carrier))
        if self._is_kl_estimated:
            with self._timer("ref"):
                groups.union(self.actor.compute_ref_log_probs(carrier))
        elif self._is_kl_in_reward:
            with self._timer("ref"):
                groups.union(self.actor.compute_full_kl(carrier))
        if algorithm.adv_estimator == "gae":
            with self._timer("values"):
                groups.union(self.actor.compute_values(carrier))

    def _compute_advantages(self, groups: DataProto, scores: torch.Tensor) -> dict[str, float]:
        """Adds `scores`, `rewards` [G, n], `advantages` and `returns`; returns the KL penalty's metrics."""
        algorithm, batch = self.config.algorithm, groups.batch
        mask = batch["response_mask"]
        metrics, penalties = {}, None
        batch["scores"] = batch["rewards"] = scores
        if self._is_kl_in_reward:
            if "kl" in batch.keys():
                kls = batch["kl"]
            else:
                kls = compute_kl(batch["old_log_probs"], batch["ref_log_probs"], algorithm.kl_penalty)
            kls = kls.masked_fill(~mask.bool(), 0.0)
            penalties = self.kl_coef * kls
            batch["rewards"] = scores - penalties.sum(-1)
            kl = float((kls.sum(-1) / mask.sum(-1)).mean())
            metrics = {"actor/kl_penalty": kl, "actor/kl_coef": self.kl_coef}
            self._adapt_kl_coef(kl)
        batch["advantages"], batch["returns"] = compute_advantages(
            algorithm.adv_estimator,
            scores,
            mask,
            algorithm.gamma,
            algorithm.lam,
            penalties,
            batch.get("baselines"),
            batch.get("values"),
        )
        return metrics

    def _update(self, groups: DataProto) -> dict[str, float]:
        """Updates the critic, if there is one, and after critic_warmup steps the policy; returns metrics."""
        algorithm, batch, metrics = self.config.algorithm, groups.batch, {}
        is_kl_loss = not algorithm.disable_kl and algorithm.use_kl_loss
        if algorithm.adv_estimator == "gae":
            with self._timer("update_critic"):
                update = groups.select(["values", "returns"], [])
                update.meta_info["step"] = self.global_step
                metrics |= reduce_metrics(self.actor.update_critic(update))
        if self.global_step >= self.config.trainer.critic_warmup:
            with self._timer("update_actor"):
                keys = ["advantages", "old_log_probs", "rollout_log_probs"] + ["ref_log_probs"] * is_kl_loss
                update = groups.select([key for key in keys if key in batch.keys()], [])
                update.meta_info |= {"step": self.global_step, "kl_coef": self.kl_coef if is_kl_loss else 0.0}
                metrics |= reduce_metrics(self.actor.update_actor(update))
            if is_kl_loss:
                metrics["actor/kl_coef"] = self.kl_coef
                self._adapt_kl_coef(metrics["actor/kl_loss"])
        return metrics

    def _adapt_kl_coef(self, kl: float) -> None:
        algorithm = self.config.algorithm
        if algorithm.kl_type == "adaptive":
            num_responses = self.config.data.rollout_batch_size * self.config.worker.rollout.n
            target, horizon = algorithm.kl_target, algorithm.kl_horizon
            self.kl_coef = adapt_kl_coef(self.kl_coef, kl, target, horizon, num_responses)

    def _check_skipped(self, metrics: dict[str, float]) -> None:
        """Prints skipped optimizer steps, and raises DivergenceError after too many in a row."""
        limit = self.config.trainer.max_skipped_updates
        for role in ("actor", "critic"):
            if not metrics.get(f"{role}/skipped_steps"):
                continue
            in_a_row = int(metrics[f"{role}/skipped_in_a_row"])
            fault = (
                f"step {self.global_step}: {int(metrics[f'{role}/skipped_steps'])} optimizer steps of the {role} were "
                f"left out because their gradient was not finite, {in_a_row} in a row by now"
            )
            if 0 < limit <= in_a_row:
                raise DivergenceError(
                    f"{fault}; the limit is trainer.max_skipped_updates={limit}. Lower worker.{role}.optim.lr or "
                    "check the rewards, and start the run again: it goes on from its last checkpoint"
                )
            print(fault[0].upper() + fault[1:], flush=True)  # noqa: T201

    @property
    def num_old_prompts(self) -> int:
        """Prompts of a step whose old log-probs are computed before its updates.

        The first update is on-policy (importance sampling ratio 1) and needs none. All are computed when a KL penalty
        in the reward reads them, or with ppo_epochs > 1, whose later epochs are off-policy.
        """
        actor, num_prompts = self.config.worker.actor, self.config.data.rollout_batch_size
        reads_all = self._is_kl_in_reward and self._is_kl_estimated or actor.ppo_epochs > 1
        return num_prompts if reads_all else num_prompts - actor.global_batch_size

    @property
    def _is_kl_estimated(self) -> bool:
        return not self.config.algorithm.disable_kl and self.config.algorithm.kl_penalty != FULL_KL

    @property
    def _is_kl_in_reward(self) -> bool:
        return not self.config.algorithm.disable_kl and not self.config.algorithm.use_kl_loss

    def _generate(self, prompts: DataProto, sampling: dict[str, Any], seed: int) -> DataProto:
        """Prompts with n responses each; the engines must be awake."""
        request, num_padded = self._request(prompts)
        request.meta_info = {
            "sampling": sampling,
            "seed": self.config.worker.rollout.seed * 1_000_003 + seed,
            "log_probs": self.config.worker.actor.tis_imp_ratio_cap is not None,
        }
        responses = unpad_dataproto(self.rollout.generate(request), num_padded)
        return prompts.select().union(responses)

    def _render_ahead(self) -> None:
        """Starts preprocessing of the next step's prompts in the engines, which sleep while the ranks train."""
        if self.global_step < self.num_steps:
            self.finish_rendering = self.rollout.start("render_ahead", self._request(self.batches.upcoming())[0])

    def _request(self, prompts: DataProto) -> tuple[DataProto, int]:
        """Engine inputs, padded to a multiple of the number of engines, and the number of padding rows."""
        return pad_dataproto_to_divisor(prompts.select([], ["raw_prompt_ids", "images"]), len(self.rollout))

    @contextmanager
    def _engines_awake(self) -> Iterator[None]:
        """Context with the engines awake and their weights synced; sleep mode discards weights, so each time."""
        self.finish_rendering()
        with self._timer("weight_sync"):
            self.rollout.wake_up(["weights"])
            self.actor.send_weights(self.rollout.actors)
            self.rollout.wake_up(["kv_cache"])
        yield
        with self._timer("sleep"):
            self.rollout.sleep()

    def _is_due(self, frequency: int) -> bool:
        """True every `frequency` steps if positive, and always at the last step."""
        return self.global_step == self.num_steps or frequency > 0 and self.global_step % frequency == 0

    def _validate(self) -> dict[str, float]:
        """Validates the policy and logs samples; returns mean rewards."""
        validation = self.evaluate()
        self.tracker.log_records(f"validation_step_{self.global_step}", validation.records)
        images = {prompt.row_id: prompt.images for prompt in self.val_set}
        shown = validation.records[: self.config.trainer.val_generations_to_log]
        shown = [record | {"images": images[record["uid"]]} for record in shown]
        self.tracker.log_generations(shown, self.global_step)
        return validation.metrics

    def _log_validation(self) -> None:
        with self._timer("validation"), self.interrupt.interruptible():
            metrics = self._validate()
        self.tracker.log(metrics | {"timing_s/validation": self.timing["validation"]}, self.global_step)
        self.timing = {}

    def evaluate(self) -> Validation:
        """Scores of the current policy on the validation prompts."""
        rollout = self.config.worker.rollout
        sampling = train_sampling(rollout) | {"n": 1} | rollout.val_override_config
        size = self.config.data.val_batch_size
        size = len(self.val_set) if size < 0 else size
        answered = []
        with self._engines_awake():
            for start in range(0, len(self.val_set), size):
                rows = range(start, min(start + size, len(self.val_set)))
                prompts = collate_prompts([self.val_set[row] for row in rows], self.pad_token_id)
                groups = self._generate(prompts, sampling, seed=0)
                answered.append((groups, self.reward.submit(groups)))
        return collect_scores(answered)

    def _save(self, score: float | None = None) -> None:
        """Starts the checkpoint of the last trained step; `score` is of a validation at that step."""
        with self._timer("save_checkpoint"):
            state = {"config": config_to_dict(self.config), "kl_coef": self.trained_kl_coef}
            state |= {"num_drawn": self.trained_position.num_drawn}
            self.saver.save(self.trained_step, state, score, self.trained_position.write_surplus)

    def _save_unsaved_update(self) -> None:
        """Logs and saves the last update if it is not saved yet, when a run ends early."""
        if self.unlogged:
            self.timing.setdefault("step", sum(self.timing.values()))
            self._log_step()
        if self.trained_step > self.saver.saved_step:
            self.saver.finish_pending()
            if self.trained_step > self.saver.saved_step:
                self._save()
        self.saver.finish_pending()

    def _resume(self) -> None:
        """Resumes from the start checkpoint, if there is one."""
        if self.start is None:
            return
        state = checkpoint.read_trainer_state(self.start)
        self.global_step = self.trained_step = self.saver.saved_step = state["global_step"]
        self.saver.best = state.get("best")
        self.batches.restore(self.start, state["num_drawn"])
        if self.config.algorithm.kl_type == "adaptive":
            self.kl_coef = state["kl_coef"]
        self.trained_position, self.trained_kl_coef = self.batches.position, self.kl_coef
        model_only = state.get("model_only", False)
        self.actor.restore(str(self.start), model_only)
        self.tracker.resume(self.global_step)
        note = "; it holds no optimizer, which starts anew" if model_only else ""
        if self.global_step >= self.num_steps:
            note += "; nothing is left to train: raise trainer.max_steps or trainer.total_epochs to go on"
        print(f"Resumed step {self.global_step} of {self.num_steps} from {self.start}{note}", flush=True)  # noqa: T201

    @contextmanager
    def _timer(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.timing[name] = self.timing.get(name, 0.0) + time.perf_counter() - start


def count_steps(config: Config, num_rows: int) -> int:
    """Training steps of the run: max_steps, or else the full batches of all epochs."""
    trainer, size = config.trainer, config.data.rollout_batch_size
    drawn = config.data.mini_rollout_batch_size or size
    return trainer.max_steps or num_rows // drawn * drawn // size * trainer.total_epochs

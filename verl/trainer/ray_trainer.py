"""The training loop. A step in the data's order: rollout, old and reference log-probs, reward, advantage, update.

Letters: G groups (prompts of a step), n samples, R response tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from verl.algos.advantages import compute_advantages
from verl.config.loading import config_to_dict
from verl.config.records import Config
from verl.config.sources import list_sources, name_source
from verl.data.dataset import RLHFDataset
from verl.distributed.single_controller import WorkerError, WorkerGroup
from verl.protocol import DataProto
from verl.reward import RewardManager
from verl.trainer.batches import BatchMaker, Rollout, add_scores, scale_advantages
from verl.trainer.checks import Checks, share_signs
from verl.trainer.engines import Engines
from verl.trainer.guards import check_memory, check_skipped
from verl.trainer.interrupt import Interrupt
from verl.trainer.kl_control import KLControl
from verl.trainer.metrics import (
    PhaseTimer,
    compute_data_metrics,
    compute_memory_metrics,
    compute_reward_metrics,
    compute_timing_metrics,
    reduce_metrics,
)
from verl.trainer.recording.answered import Answered
from verl.trainer.recording.recorder import Recorder
from verl.trainer.saver import CheckpointSaver, TrainState, restore
from verl.trainer.tracking import Tracker
from verl.trainer.validation import Validation, validate

UPDATE_KEYS = ["advantages", "old_log_probs", "rollout_log_probs", "kept"]
GROUP_COLUMNS = ["images", "videos", "experts"]
GROUP_KEYS = ("prompt_ids", "prompt_mask", "prompt_position_ids", "responses", "response_mask")


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
        identity: fingerprints of the data and models, kept in checkpoints.
        recorder: records rollouts; None records none.
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
        identity: dict[str, str | None] | None = None,
        recorder: Recorder | None = None,
    ):
        self.recorder = recorder or Recorder()
        self.checks = Checks(self.recorder.folder if self.recorder.is_on else None, self.recorder.append)
        self.config, self.actor, self.reward, self.tracker = config, actor, reward, tracker
        self.val_set, self.pad_token_id, self.start = val_set, pad_token_id, start
        self.timer = PhaseTimer()
        self.engines = Engines(config.worker, rollout, actor, self.timer)
        self.batches = BatchMaker(config, train_set, reward, pad_token_id, len(actor))
        self.kl = KLControl(config)
        self.saver = CheckpointSaver(Path(config.trainer.save_checkpoint_path), [actor], config.trainer, identity)
        self.interrupt = Interrupt(self._describe_loss)
        self.num_steps = count_steps(config, len(train_set))
        self.step = 0
        self.trained = TrainState(0, self.batches.position, self.kl.coef)
        self.unlogged: dict[str, Any] = {}
        self.progress: dict[str, str] = {}

    def fit(self) -> None:
        """Trains to the last step, from a checkpoint if there is one."""
        settings = self.config.trainer
        self._resume()
        with self._saving_the_last_update():
            self._validate_before()
            for step in self._remaining_steps():
                self.step = step
                with self.timer("step"):
                    metrics = self.train_step()
                    if self._is_due(settings.val_freq):
                        metrics |= self._validate()
                self._log_step()
                if self._is_due(settings.save_freq):  # after logging: every saved step is logged even after a kill
                    self._save(metrics.get("val/reward_score"))
                self._check_health(metrics)

    def train_step(self) -> dict[str, Any]:
        """Runs one training step and returns its metrics; until the update an interrupt does no harm."""
        actor, timer, algorithm = self.actor, self.timer, self.config.algorithm
        has_critic = algorithm.adv_estimator == "gae"
        with self.interrupt.interruptible():
            with timer("gen"), self.engines.awake():  # weights are synced
                rollout = self.batches.make(self.engines.generate)  # prompts -> responses [G, n, R]; scoring starts
            groups, metrics = rollout.groups, rollout.metrics
            with timer("load"):
                actor.load_groups(groups.select(list(GROUP_KEYS), GROUP_COLUMNS))
            request = self._request(groups)
            if num_old_prompts(self.config):
                with timer("old"):
                    groups.union(actor.compute_log_probs(request))  # old_log_probs [G, n, R]
            if self.kl.is_estimated:
                with timer("ref"):
                    groups.union(actor.compute_ref_log_probs(request))  # ref_log_probs [G, n, R]
            elif self.kl.is_in_reward:
                with timer("ref"):
                    groups.union(actor.compute_full_kl(request))  # kl [G, n, R]
            if has_critic:
                with timer("values"):
                    groups.union(actor.compute_values(request))  # values [G, n, R]
            with timer("reward"):
                scores = self._score(rollout)  # reward parts, each [G, n]
        if self.step < self.num_steps:
            self.engines.render_ahead(self.batches.upcoming())  # the engines sleep while the ranks train

        with timer("adv"):
            batch = groups.batch
            add_scores(batch, scores["overall"])
            metrics |= self.kl.penalize(batch)  # rewards [G, n]: scores minus penalties [G, n, R]
            self._add_advantages(groups)  # [G, n], or [G, n, R] by token
        if has_critic:
            with timer("update_critic"):
                metrics |= reduce_metrics(actor.update_critic(self._select(groups, ["values", "returns", "kept"])))
        if self.step >= self.config.trainer.critic_warmup:
            with timer("update_actor"):
                metrics |= reduce_metrics(actor.update_actor(self._select(groups, UPDATE_KEYS + self.kl.loss_keys)))
            metrics |= self.kl.follow_loss(metrics)
        if self.recorder.is_on:
            groups.union(actor.mean_entropies(request))  # entropy_mean [G, n], kept from the passes
        return self._finish_step(groups, scores, metrics)

    def _score(self, rollout: Rollout) -> dict[str, Any]:
        """Waits for the reward parts, each [G, n]; the recorder then begins to read the responses."""
        scores = rollout.scores()
        if self.recorder.is_on:
            self.recorder.read("train", self.step, [Answered(rollout.groups, rollout.texts(), scores)])
        return scores

    @contextmanager
    def _saving_the_last_update(self) -> Iterator[None]:
        """Context of a run: an interrupt, or an error while all ranks are whole, saves the last update first.

        Raises:
            CheckpointError: the last update could not be saved.
        """
        with self.interrupt.handling_signals():
            try:
                yield
            except WorkerError as error:
                if error.role == "rollout" or error.has_ended:  # an engine's death leaves the ranks whole
                    self._save_unsaved_update()
                raise
            except BaseException:
                self._save_unsaved_update()
                raise
            self._save_unsaved_update()  # once more if the last checkpoint has failed
            self.saver.check_saved(self.trained.step)

    def _remaining_steps(self) -> Iterator[int]:
        """Numbers of the steps that are left, with a progress bar; none with val_only."""
        if self.config.trainer.val_only:
            return
        with tqdm(total=self.num_steps, initial=self.step, desc="Training", unit="step") as progress:
            for step in range(self.step + 1, self.num_steps + 1):
                self.batches.step = step
                yield step
                progress.update()
                progress.set_postfix(self.progress)

    def _request(self, groups: DataProto) -> DataProto:
        """Input of the passes without gradients; the ranks hold the groups themselves."""
        request = groups.select(["response_mask"], [])
        request.meta_info["from_second_update"] = num_old_prompts(self.config) < self.config.data.rollout_batch_size
        return request

    def _select(self, groups: DataProto, keys: list[str]) -> DataProto:
        """An update's columns, as far as there are such, with the step and the weight of the KL term."""
        update = groups.select(keys, [])
        update.meta_info |= {"step": self.step, "kl_coef": self.kl.coef if self.kl.is_in_loss else 0.0}
        return update

    def _add_advantages(self, groups: DataProto) -> None:
        """Adds `advantages`, scaled for each source, and `returns`."""
        batch, algorithm = groups.batch, self.config.algorithm
        more = (algorithm.gamma, algorithm.lam, *map(batch.get, ("penalties", "baselines", "values")))
        advantages, batch["returns"] = compute_advantages(
            algorithm.adv_estimator, batch["scores"], batch["response_mask"], *more
        )
        sources = list_sources(self.config.data.train_files)
        scales = {name_source(source): source.advantage_scale for source in sources if source.advantage_scale != 1}
        names = list(groups.non_tensor_batch.get("source", ()))
        batch["advantages"] = scale_advantages(advantages, names, scales) if scales else advantages

    def _finish_step(self, groups: DataProto, scores: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
        """Notes that the policy has been updated and returns all metrics of the step.

        Raises:
            DivergenceError: too many updates in a row had a gradient that was not finite.
        """
        self.trained = TrainState(self.step, self.batches.position, self.kl.coef)
        data = self.config.data
        metrics |= compute_reward_metrics(scores, list(groups.non_tensor_batch.get("source", ())))
        metrics |= compute_data_metrics(groups, data.max_prompt_length, data.max_response_length)
        self.recorder.write()
        signs = share_signs(self.recorder.read_last)
        metrics |= self.checks.run(self.step, scores, metrics, signs) | self.recorder.metrics()
        self.unlogged = metrics
        check_skipped(metrics, self.config.trainer.max_skipped_updates, self.step)
        return metrics

    def _log_step(self) -> None:
        """Logs the metrics of the last update; later timings count for the next step."""
        metrics, self.unlogged = self.unlogged, {}
        metrics |= compute_timing_metrics(self.timer.seconds, metrics, self.config.num_ranks)
        metrics |= compute_memory_metrics()
        metrics["checkpoint/failed_saves"] = self.saver.num_failed
        reward, seconds = metrics.get("reward/overall", 0.0), self.timer.seconds["step"]
        # Not the loss, which is 0 for on-policy updates.
        grad_norm = metrics.get("actor/grad_norm", 0.0)
        self.progress = {"reward": f"{reward:.3f}", "grad": f"{grad_norm:.2g}", "s": f"{seconds:.0f}"}
        self.tracker.log(metrics, self.trained.step)
        self.timer.reset()

    def _check_health(self, metrics: dict[str, Any]) -> None:
        """Raises when the running checkpoint has failed, or when a machine's memory is nearly full."""
        self.saver.finish_pending(blocking=False)
        check_memory(metrics, self.config.trainer.max_host_memory_share, self.step)

    def _is_due(self, frequency: int) -> bool:
        """True every `frequency` steps if positive, and always at the last step."""
        return self.step == self.num_steps or frequency > 0 and self.step % frequency == 0

    def evaluate(self) -> Validation:
        """Scores of the current policy on the validation prompts."""
        with self.engines.awake():
            generate = partial(self.engines.generate, for_training=False)
            return validate(self.config, self.val_set, self.pad_token_id, generate, self.reward, self.step)

    def _validate(self) -> dict[str, float]:
        """Validates the policy and logs samples; returns mean rewards."""
        with self.timer("validation"), self.interrupt.interruptible():
            validation = self.evaluate()
            self.tracker.log_records(f"validation_step_{self.step}", validation.records)
            self.recorder.read("val", self.step, validation.answered)
            self.recorder.write()
            self.tracker.log_generations(self._samples_to_show(validation), self.step)
            return validation.metrics

    def _samples_to_show(self, validation: Validation) -> list[dict[str, Any]]:
        """The first records, with their images."""
        prompts = (self.val_set.read(index, has_videos=False) for index in range(len(self.val_set)))
        images = {prompt.row_id: prompt.images for prompt in prompts}
        shown = validation.records[: self.config.trainer.val_generations_to_log]
        return [record | {"images": images[record["uid"]]} for record in shown]

    def _validate_before(self) -> None:
        """Validates before the first step, or instead of training."""
        settings = self.config.trainer
        if not (settings.val_before_train and self.step == 0 or settings.val_only):
            return
        metrics = self._validate()
        self.tracker.log(metrics | {"timing_s/validation": self.timer.seconds["validation"]}, self.step)
        self.timer.reset()

    def _save(self, score: float | None = None) -> None:
        """Starts the checkpoint of the last trained step; `score` is of a validation at that step."""
        with self.timer("save_checkpoint"):
            self.saver.save(self.trained, config_to_dict(self.config), score)

    def _save_unsaved_update(self) -> None:
        """Logs and saves the last update if it is not saved yet, when a run ends early."""
        if self.unlogged:
            self.timer.seconds.setdefault("step", sum(self.timer.seconds.values()))
            self._log_step()
        if self.trained.step > self.saver.saved_step:
            self.saver.finish_pending()
            if self.trained.step > self.saver.saved_step:
                self._save()
        self.saver.finish_pending()

    def _describe_loss(self) -> str:
        """Words on what a run that ends at once loses."""
        saved, trained = self.saver.saved_step, self.trained.step
        lost = f"steps {saved + 1} to {trained} are not saved and lost" if trained > saved else "no whole step is lost"
        return f"{lost}; the same command {f'goes on after step {saved}' if saved else 'begins again'}"

    def _resume(self) -> None:
        """Resumes from the start checkpoint, if there is one."""
        if self.start is None:
            if not self.config.trainer.val_only:
                self.saver.begin(None)
                self.recorder.begin(-1)  # a validation before the first step is of step 0
            return
        state, note = restore(self.start, self.saver, self.batches, self.actor)
        if self.config.algorithm.kl_type == "adaptive":
            self.kl.coef = state.kl_coef
        self.step = state.step
        self.trained = TrainState(state.step, state.position, self.kl.coef)
        if self.config.trainer.val_only:
            self.tracker.resume(max(self.step, self.num_steps))  # later steps stay as they are
        else:
            self.saver.begin(self.start)
            self.tracker.resume(self.step)
            self.recorder.begin(self.step)
            self.checks.begin(self.step)
        if self.step >= self.num_steps:
            note += "; nothing is left to train: raise trainer.max_steps or trainer.total_epochs to go on"
        print(f"Resumed step {self.step} of {self.num_steps} from {self.start}{note}", flush=True)  # noqa: T201


def num_old_prompts(config: Config) -> int:
    """Prompts of a step whose old log-probs are computed before its updates.

    The first update is on-policy (importance sampling ratio 1) and needs none. All are computed when a KL penalty in
    the reward reads them, or with ppo_epochs > 1, whose later epochs are off-policy.
    """
    kl, actor, num_prompts = KLControl(config), config.worker.actor, config.data.rollout_batch_size
    reads_all = kl.is_in_reward and kl.is_estimated or actor.ppo_epochs > 1
    return num_prompts if reads_all else num_prompts - actor.global_batch_size


def count_steps(config: Config, num_rows: int) -> int:
    """Training steps of the run: max_steps, or else the full batches of all epochs."""
    trainer, size = config.trainer, config.data.rollout_batch_size
    drawn = config.data.mini_rollout_batch_size or size
    return trainer.max_steps or num_rows // drawn * drawn // size * trainer.total_epochs

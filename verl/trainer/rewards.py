"""The rewards of a run: the functions that its configuration names, their checks of rows, and what is recorded.

With verl.trainer.main the only place of the trainer that knows spatialthinker.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from verl.config.mixtures import list_parts, split_gate
from verl.config.records import Config, ConfigError, RewardConfig, SourceConfig
from verl.config.sources import COLUMN, list_sources

WITH_SCENES = ("spatial_sgg", "r1v_scene")


@dataclass(frozen=True)
class ScoreFunction:
    """A reward of spatialthinker by name, picklable, over the trainer's items; names why a format failed."""

    name: str
    kwargs: dict[str, Any]
    reads_row: ClassVar[bool] = False

    def __str__(self) -> str:
        return self.name

    def __call__(self, items: list[dict[str, Any]]) -> list[dict[str, float]]:
        from spatialthinker.rewards import REWARDS, TEXT_REWARDS, RewardInput, format_failure

        def read(truth: Any) -> Any:
            return str(truth) if self.name in TEXT_REWARDS else truth

        inputs = [
            RewardInput(item["response"], read(item["ground_truth"]), item["problem"], item["response_length"])
            for item in items
        ]
        scores = REWARDS[self.name](inputs, **self.kwargs)
        if self.name == "spatial_sgg":
            for item, score in zip(items, scores, strict=True):
                if reason := format_failure(item["response"]):
                    score[f"format_failure/{reason}"] = 1.0
        return scores


def check_spatial_row(problem: str, ground_truth: Any, sizes: Sequence[tuple[int, int]]) -> str | None:
    """Doubt about the frame of this row's boxes, if any; ValueError when `spatial_sgg` cannot score answers to it.

    Args:
        sizes: width and height of the row's images.
    """
    from spatialthinker.rewards.spatial_sgg import check_ground_truth, doubt_frame
    from verl.data.dataset import check_answer

    check_answer(problem, ground_truth, sizes)
    ground_truth = str(ground_truth)
    check_ground_truth(ground_truth, problem)
    if "<image>" not in problem:
        raise ValueError("the prompt has no <image>, and spatial_sgg scores boxes in an image")
    return doubt_frame(ground_truth, problem, sizes[0]) if sizes else None


def check_typed_row(name: str, problem: str, ground_truth: Any, sizes: Sequence[tuple[int, int]]) -> None:
    """Passes for a ground truth that the reward of this name can score against; ValueError otherwise."""
    from spatialthinker.rewards import ROW_CHECKS

    ROW_CHECKS[name](ground_truth, problem)


@dataclass(frozen=True)
class GoldScore:
    """Reward of a response that states a prompt's ground truth, by the configured function."""

    manager: Any
    reward: RewardConfig

    def __call__(self, prompt: Any) -> dict[str, float]:
        from spatialthinker.rewards.gold import gold_response

        name = "" if self.reward.reward_function else self.reward.score_function
        if prompt.reward:
            function = self.manager.functions.get(prompt.reward)
            name = function.name if isinstance(function, ScoreFunction) else ""
        gold = gold_response(name, prompt.ground_truth)
        more = {"columns": prompt.columns, "images": prompt.images, "reward": prompt.reward}
        return self.manager.probe(gold, prompt.problem, prompt.ground_truth, prompt.row_id, **more)


def build_recorder(config: Config, train_set: Any, val_set: Any) -> Any:
    """The recorder of the run's rollouts, as trainer.rollouts_to_keep asks."""
    from spatialthinker.matching import can_match
    from spatialthinker.rewards.describe import describe
    from verl.trainer.recording.labels import label_rows
    from verl.trainer.recording.recorder import Recorder

    trainer, reward, data = config.trainer, config.worker.reward, config.data
    name = reward.reward_function or reward.score_function
    labels = {"train": label_rows(data.train_files, train_set), "val": label_rows(data.val_files, val_set)}
    return Recorder(
        Path(trainer.save_checkpoint_path),
        trainer.rollouts_to_keep,
        trainer.rollouts_tokens,
        partial(describe, name),
        labels,
        data.max_response_length,
        name,
        can_match if name in WITH_SCENES else list,
    )


@dataclass(frozen=True)
class GoldReader:
    """Texts and descriptions of the responses that state the ground truths of prompts."""

    reward: RewardConfig

    def __call__(self, prompts: Sequence[Any]) -> tuple[list[str], list[dict[str, Any]]]:
        from spatialthinker.rewards.describe import describe
        from spatialthinker.rewards.gold import gold_response

        name = "" if self.reward.reward_function else self.reward.score_function
        texts = [gold_response(name, prompt.ground_truth) for prompt in prompts]
        items = [(text, each.ground_truth, each.problem) for text, each in zip(texts, prompts, strict=True)]
        return texts, describe(name, items)


def check_filter_key(config: Config, scores: dict[str, float]) -> None:
    """Passes if the reward has what online filtering looks at; ConfigError says what it has."""
    key = config.algorithm.filter_key
    if config.algorithm.online_filtering and key not in scores:
        raise ConfigError([f"algorithm.filter_key = {key!r}: the reward returns only {', '.join(scores)}; name one"])


def build_reward(config: Config) -> Any:
    """The pool that runs the configured reward: a file's function or one of spatialthinker's."""
    from verl.reward import CallLimits, RewardManager

    settings = config.worker.reward
    functions = {"": build_function(config, None, settings.reward_function_kwargs)}
    functions |= source_functions(config)
    model = config.worker.actor.model
    tokenizer_path = model.tokenizer_path or model.model_path
    limit_s = config.trainer.watchdog_timeout_s
    pool = (tokenizer_path, settings.num_processes, settings.skip_special_tokens, limit_s)
    limits = CallLimits(**{name: getattr(settings, name) for name in CallLimits.__dataclass_fields__})
    return RewardManager(
        functions, *pool, limits, None if settings.missing_score == "drop" else settings.missing_score
    )


def build_function(config: Config, name: str | None, kwargs: dict[str, Any]) -> Any:
    """The reward of a name: FILE.py:NAME, a mixture or a built-in one; None is the one of worker.reward."""
    from verl.reward import FileReward, MixedReward

    settings = config.worker.reward
    name = name or settings.reward_function or settings.score_function
    if name in settings.mixtures:
        content = settings.mixtures[name]
        chosen = content.get("kwargs", {})
        parts = {each: build_function(config, each, chosen.get(each, {})) for each in list_parts(content)}
        gates = {split_gate(gate): least for gate, least in content.get("gate", {}).items()}
        return MixedReward(name, parts, content["sum"], gates)
    path, _, function = name.rpartition(":")
    if (path or name).endswith(".py"):
        return FileReward(path or name, function if path else "main", kwargs)
    return ScoreFunction(name, kwargs)


def source_functions(config: Config) -> dict[str, Any]:
    """Rewards that sources name, by the name that their prompts carry.

    Raises:
        ConfigError: a row names an unknown one.
    """
    from spatialthinker.rewards import REWARDS
    from verl.data.sources import DataError, load_rows

    functions = {}
    for source in [*list_sources(config.data.train_files), *list_sources(config.data.val_files)]:
        names: set[str] = {source.reward} if source.reward else set()
        if source.reward == COLUMN:
            rows = load_rows(source.path)
            if "reward" not in rows.column_names:
                raise DataError(f"{source.path} has no column 'reward' (reward: column)")
            names = set(rows["reward"])
        for name in names:
            known = (*REWARDS, *config.worker.reward.mixtures)
            if name not in known and not str(name).partition(":")[0].endswith(".py"):
                raise ConfigError([f"{source.path}: a row's reward is {name!r}, which is none of {', '.join(known)}"])
            functions[reward_key(name, source)] = build_function(config, name, source.reward_kwargs)
    return functions


def reward_key(name: str, source: SourceConfig) -> str:
    """The name under which a source's reward is found: with other arguments it is another reward."""
    return f"{name} {source.reward_kwargs}" if source.reward_kwargs and source.reward != COLUMN else name


def row_check(config: Config, source: SourceConfig) -> Any:
    """The check of a source's rows that its reward asks for; None where that is known of no row."""
    from spatialthinker.rewards import ROW_CHECKS
    from verl.data.dataset import check_answer

    settings = config.worker.reward
    name = source.reward or settings.reward_function or settings.score_function
    if name == COLUMN or name in settings.mixtures or name.partition(":")[0].endswith(".py"):
        return None
    if name == "spatial_sgg":
        return check_spatial_row
    return partial(check_typed_row, name) if name in ROW_CHECKS else check_answer


def first_prompts(rows: Any) -> list[Any]:
    """The first prompt of every source."""
    return [own[0] for own in getattr(rows, "sets", [rows])]

"""The rewards as other trainers call them: TRL, verl, EasyR1.

TRL (data set columns `ground_truth` and, unless the prompt itself states the image size, `problem`):

    from spatialthinker.rewards.adapters import TrlReward
    trainer = GRPOTrainer(model=..., reward_funcs=TrlReward("spatial_sgg"), train_dataset=..., args=...)

verl (`extra_info` of a row holds `problem`; `verl_batch_score` is for its batch reward manager; older versions have no
`reward.` in front):

    reward.custom_reward_function.path=.../spatialthinker/rewards/adapters.py
    reward.custom_reward_function.name=verl_score

EasyR1 (an item has no prompt, so the ground truth states `Image size: (W x H)` in front of its scene; a version that
has the key wants worker.reward.reward_type=batch too):

    worker.reward.reward_function=.../spatialthinker/rewards/adapters.py:easyr1_score
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spatialthinker.matching import check_ready
from spatialthinker.rewards import REWARDS, RewardInput

REWARD_NAME = "spatialthinker"
REWARD_TYPE = "batch"
"""Read by EasyR1 from the module that holds the function."""


class TrlReward:
    """A reward function for TRL's `reward_funcs`; `kwargs` go to the reward. It can be pickled.

    Its terms are logged as `<reward>/<term>` where TRL offers `log_metric`. Raises ValueError for an unknown reward
    and ModuleNotFoundError, with the install command, when the spatial reward's word vectors are missing.
    Interface: https://huggingface.co/docs/trl/grpo_trainer, "Using a custom reward function".
    """

    def __init__(self, reward: str = "spatial_sgg", **kwargs: Any) -> None:
        if reward not in REWARDS:
            raise ValueError(f"got reward {reward!r}; known: {', '.join(REWARDS)}")
        if reward == "spatial_sgg":
            check_ready()
        self.reward = reward
        self.kwargs = kwargs
        self.__name__ = reward  # the name under which TRL logs the function

    def __call__(
        self,
        *,
        completions: Sequence[Any],
        ground_truth: Sequence[str],
        problem: Sequence[str] | None = None,
        prompts: Sequence[Any] = (),
        log_metric: Callable[[str, float], None] | None = None,
        **_other_columns: Any,
    ) -> list[float]:
        problems = problem or [_text_of(prompt) for prompt in prompts] or [""] * len(completions)
        inputs = map(RewardInput, map(_text_of, completions), ground_truth, problems)
        results = REWARDS[self.reward](list(inputs), **self.kwargs)
        if log_metric is not None and results:
            for term in results[0]:
                log_metric(f"{self.reward}/{term}", sum(result[term] for result in results) / len(results))
        return [result["overall"] for result in results]


def _text_of(messages: Any) -> str:
    """Returns the text of a plain or a conversational prompt or completion."""
    if isinstance(messages, str):
        return messages
    contents = (message["content"] or "" for message in messages)
    parts = (part for c in contents for part in ([{"type": "text", "text": c}] if isinstance(c, str) else c))
    return "".join(part["text"] for part in parts if part.get("type") == "text")


def verl_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None = None,
    *,
    reward: str = "spatial_sgg",
    reward_router_address: Any = None,
    reward_model_tokenizer: Any = None,
    **kwargs: Any,
) -> dict[str, float]:
    """Returns `score` and the reward's terms for one response, in verl's `compute_score` form.

    `kwargs` (verl: custom_reward_function.reward_kwargs) go to the reward; the two reward_* arguments belong to
    verl's reward models and are not used.
    Interface: https://verl.readthedocs.io/en/latest/preparation/reward_function.html
    """
    del reward_router_address, reward_model_tokenizer
    return verl_batch_score([data_source], [solution_str], [ground_truth], [extra_info], reward=reward, **kwargs)[0]


def verl_batch_score(
    data_sources: Sequence[str],
    solution_strs: Sequence[str],
    ground_truths: Sequence[str],
    extra_infos: Sequence[Mapping[str, Any] | None],
    *,
    reward: str = "spatial_sgg",
    **kwargs: Any,
) -> list[dict[str, float]]:
    """Returns `score` and the reward's terms for each response, in the form of verl's batch reward manager."""
    del data_sources
    problems = [str((info or {}).get("problem", "")) for info in extra_infos]
    results = REWARDS[reward](list(map(RewardInput, solution_strs, ground_truths, problems)), **kwargs)
    return [{"score": result.pop("overall"), **result} for result in results]


def easyr1_score(
    reward_inputs: Sequence[Mapping[str, Any]], *, reward: str = "spatial_sgg", **kwargs: Any
) -> list[dict[str, float]]:
    """Returns the reward's terms with `overall` for each item, in EasyR1's batch form.

    `kwargs` (worker.reward.reward_function_kwargs) go to the reward. The image size is read from the item's `problem`
    or, where there is none, from its ground truth.
    Interface: https://github.com/hiyouga/EasyR1, examples/reward_function.
    """
    inputs = [
        RewardInput(i["response"], i["ground_truth"], i.get("problem") or i["ground_truth"], i.get("response_length"))
        for i in reward_inputs
    ]
    return REWARDS[reward](inputs, **kwargs)

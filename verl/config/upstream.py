"""Defaults of EasyR1 and of SpatialThinker's release, for configurations that were written for one of them."""

import logging
from collections.abc import Mapping
from typing import Any

from verl.config.old_keys import RENAMED_KEYS, SETTLED_KEYS, find_value, nest

PAPER, EASYR1, RELEASE = "paper", "easyr1", "release"
DEFAULTS_KEY = "defaults"

_BOTH: dict[str, Any] = {
    "data.train_files": "",
    "data.val_files": "",
    "data.prompt_key": "prompt",
    "data.answer_key": "answer",
    "data.max_prompt_length": 512,
    "data.max_response_length": 512,
    "data.val_batch_size": -1,
    "data.resize_first": True,
    "algorithm.use_kl_loss": False,
    "algorithm.kl_penalty": "kl",
    "algorithm.kl_coef": 1e-3,
    **{
        f"worker.{role}.{key}": value
        for role in ("actor", "critic")
        for key, value in (("global_batch_size", 256), ("optim.strategy", "adamw"), ("fsdp.torch_dtype", "fp32"))
    },
    "worker.rollout.n": 1,
    "worker.rollout.tensor_parallel_size": 2,
    "worker.rollout.val_override_config": {},
    "trainer.max_steps": None,
    "trainer.project_name": "easy_r1",
    "trainer.experiment_name": "demo",
    "trainer.logger": ["console", "wandb"],
    "trainer.n_gpus_per_node": 8,
    "trainer.val_freq": -1,
    "trainer.val_generations_to_log": 0,
    "trainer.save_freq": -1,
    "trainer.save_limit": -1,
}

UPSTREAM_DEFAULTS: dict[str, dict[str, Any]] = {
    EASYR1: _BOTH | {"worker.reward.score_function": "", "trainer.total_epochs": 15},
    RELEASE: _BOTH
    | {
        "algorithm.kl_target": 0.0,
        "algorithm.kl_horizon": 0.0,
        "worker.reward.score_function": "math",
        "trainer.total_epochs": 10,
        "trainer.find_last_checkpoint": False,
    },
}
"""Source -> key -> its default, where that is another than here; `paper`, the defaults here, is no entry.

`trust_remote_code`, which is true in both, stays false: code of others runs only where it is asked for.
"""

_OLD_KEYS = (*SETTLED_KEYS, *RENAMED_KEYS)
_RELEASE_MARKS = ("trainer.total_episodes", "worker.reward.score_function", "data.mixed_data", "data.text_only")


def choose_defaults(file: Mapping[str, Any], asked: Any, faults: dict[str, str]) -> dict[str, Any]:
    """Nested defaults, where they are others than here, for the keys that a configuration leaves out.

    Args:
        file: the keys of its file, old ones still under their old names.
        asked: value of the key `defaults`; None recognises by its keys whom the file was written for.
        faults: takes up an unknown source.
    """
    source, reason = asked, ""
    if source is None:
        source, reason = _recognise(file)
    if source not in (PAPER, *UPSTREAM_DEFAULTS):
        names = ", ".join((PAPER, *UPSTREAM_DEFAULTS))
        faults[DEFAULTS_KEY] = f"{DEFAULTS_KEY} = {source!r}: must be one of {names}"
    defaults: dict[str, Any] = {}
    for key, value in UPSTREAM_DEFAULTS.get(str(source), {}).items():
        nest(key, value, defaults)
    if reason:
        logging.getLogger(__name__).warning(
            "The file has %s, so keys that are left out take the defaults of %s; defaults=paper takes those here",
            reason,
            source,
        )
    return defaults


def _recognise(file: Mapping[str, Any]) -> tuple[str, str]:
    """The source whose defaults a file counts on, and what it was recognised by."""
    marks = [key for key in _OLD_KEYS if find_value(file, key) is not None]
    if find_value(file, "trainer.project_name") == "easy_r1":
        marks.append("trainer.project_name = easy_r1")
    if not marks:
        return PAPER, ""
    is_release = any(find_value(file, key) is not None for key in _RELEASE_MARKS)
    return RELEASE if is_release else EASYR1, marks[0]

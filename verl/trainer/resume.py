"""Resume checks: keys, rows, base model and tokenizer must be those of the checkpoint, or change in a stated way.

A row that is gone shifts the order of the rows behind it, adapters fit any base of the same shapes, and an optimizer's
state brings its own settings along: each would train on, and on something else.
"""

import hashlib
import json
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tqdm import tqdm

from verl.config.fields import find_keys
from verl.config.loading import config_to_dict
from verl.config.records import Config, ConfigError
from verl.config.sources import list_sources
from verl.data.dataset import RLHFDataset
from verl.data.mixture import MixedSet
from verl.distributed import checkpoint
from verl.model.checkpoint_files import digest_model

WITHOUT_EFFECT = (
    *(f"trainer.{name}" for name in ("project_name", "experiment_name", "logger", "nnodes", "n_gpus_per_node")),
    *(f"trainer.{name}" for name in ("device", "val_*", "save_*", "on_save_error", "watchdog_timeout_s")),
    *(
        f"trainer.{name}"
        for name in ("max_try_make_batch", "max_skipped_updates", "max_host_memory_share", "memory_gb")
    ),
    *(f"trainer.{name}" for name in ("load_checkpoint_path", "find_last_checkpoint", "check_versions", "dry_run")),
    *(
        "trainer.ray_timeline",
        "trainer.rollouts_*",
        "data.val_*",
        "worker.*.micro_batch_size_per_device_for_*",
        "worker.*.offload.*",
    ),
    *("worker.*.fsdp.enable_cpu_offload", "worker.reward.num_processes"),
    *("worker.actor.shared_prompt", "worker.actor.images_once", "worker.*.model.enable_gradient_checkpointing"),
    *("worker.actor.model.activation_budget_gb", "worker.actor.model.use_fused_layers"),
    *("worker.*.model.trust_remote_code", "worker.rollout.limit_images"),
    *(f"worker.rollout.{name}" for name in ("gpu_memory_utilization", "enforce_eager", "enable_chunked_prefill")),
    *(f"worker.rollout.{name}" for name in ("tensor_parallel_size", "max_model_len", "max_num_batched_tokens")),
    *(f"worker.rollout.{name}" for name in ("max_num_seqs", "shared_prompt", "fast_scheduler", "disable_log_stats")),
)
"""Keys that may change without a word: the run learns the same, or measures and keeps something else."""
APPLIED = (
    *("trainer.max_steps", "trainer.total_epochs", "worker.*.optim.lr", "worker.*.optim.lr_*"),
    *("worker.*.optim.min_lr_ratio", "worker.*.max_grad_norm", "worker.actor.clip_ratio_*", "worker.reward.*"),
    *("algorithm.kl_target", "algorithm.kl_horizon", "worker.rollout.dtype", "worker.rollout.val_override_config*"),
    "data.on_bad_row",
)
"""Keys that may change and are applied from the next step on, which is said."""
BY_CONTENT = {
    "data": (
        *(
            "data.train_files",
            "data.image_dir",
            "data.image_key",
            "data.video_key",
            "data.prompt_key",
            "data.answer_key",
        ),
        *("data.format_prompt", "data.override_chat_template", "data.filter_overlong_prompts"),
    ),
    "columns": ("data.train_files",),
    "base_model": ("worker.actor.model.model_path",),
    "tokenizer": ("worker.actor.model.tokenizer_path",),
    "critic_base_model": ("worker.critic.model.model_path",),
}
"""Keys that may change as long as the fingerprint under the name stays: what they lead to is the same."""
ABSENT = object()
NOUNS = {
    "data": "training rows",
    "columns": "columns that a reward of your own can read",
    "base_model": "base model",
    "tokenizer": "tokenizer",
    "critic_base_model": "critic's base model",
}


def identify(config: Config, processor: Any, train_set: RLHFDataset, val_set: RLHFDataset) -> dict[str, str | None]:
    """Fingerprints (SHA-256) by name; None where the files are not on this machine yet."""
    critic = config.worker.critic.model.model_path if config.algorithm.adv_estimator == "gae" else None
    tokenizer = processor.tokenizer
    vocabulary = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id, tokenizer.pad_token_id])
    data, columns = _digest_rows(train_set)
    return {
        "data": data,
        "columns": columns if _has_own_reward(config) else None,
        "val_data": _digest_rows(val_set)[0],
        "base_model": digest_model(config.worker.actor.model.model_path),
        "critic_base_model": digest_model(critic) if critic else None,
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
    }


def _digest_rows(rows: RLHFDataset) -> tuple[str, str]:
    """Fingerprints of prompts as the model reads them, stored media and answers, in their order; and of all columns.

    The second is apart, so that a column that nobody reads may come and go.
    """
    total, columns = hashlib.sha256(), hashlib.sha256()
    if isinstance(rows, MixedSet):
        total.update(json.dumps(rows.layout).encode())
    for number in tqdm(range(len(rows)), desc="Fingerprint of the rows", disable=len(rows) < 1000):
        row = rows.read(number, is_resized=False)
        content = [row.raw_ids, len(row.ids), row.problem, row.ground_truth]
        total.update(json.dumps(content, default=_plain).encode())
        columns.update(json.dumps(row.columns, default=_plain, sort_keys=True).encode())
        for image in row.images:
            total.update(hashlib.sha256(image).digest())
        for digest in rows.digest_videos(number):
            total.update(digest)
    return total.hexdigest(), columns.hexdigest()


def _has_own_reward(config: Config) -> bool:
    """True if a reward can read columns."""
    is_file = any(".py" in (source.reward or "") for source in list_sources(config.data.train_files))
    return bool(is_file or config.worker.reward.reward_function or config.worker.reward.mixtures)


def _plain(value: Any) -> str:
    """What JSON cannot hold, as text."""
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else repr(value)


def check_resume(start: Path, config: Config, identity: dict[str, str | None]) -> list[str]:
    """Passes if the run can go on from a checkpoint; returns a sentence on each change that is applied.

    Raises:
        ConfigError: naming everything that must not differ, with its value then and now.
    """
    content = checkpoint.read_trainer_state(start)
    known = content.get("identity") or {}
    notes, faults = [], list(_identity_faults(start, config, known, identity))
    if not known:
        notes.append(f"{start} holds no fingerprints: nobody checks that data, model and tokenizer are still the same")
    may_change = (*WITHOUT_EFFECT, *APPLIED, *(key for keys in BY_CONTENT.values() for key in keys))
    if content.get("model_only"):
        may_change += ("worker.*.optim.*",)
    if config.algorithm.kl_type == "fixed":
        may_change += ("algorithm.kl_coef",)
    now, stored = _values(config_to_dict(config)), _values(content.get("config") or {})
    for key, then in (_values(config_to_dict(Config())) | stored if stored else {}).items():
        if now[key] == then or _matches(key, WITHOUT_EFFECT):
            continue
        if key not in stored:
            notes.append(f"{key} = {now[key]!r}: {start} is older than this key and is taken to have {then!r}")
        elif not _matches(key, may_change):
            faults.append(
                f"{key} = {now[key]!r}: {start} was trained with {then!r}, and a run cannot change it on its way; "
                f"set {key}={then}, or {_new_run()}"
            )
        elif key not in {key for keys in BY_CONTENT.values() for key in keys}:
            notes.append(f"{key} changes from {then!r} to {now[key]!r}")
    if known.get("val_data") not in (None, identity["val_data"]):
        notes.append("the validation rows are others than before, and the best checkpoint so far counts no more")
    if faults:
        raise ConfigError(faults)
    return notes


def _identity_faults(
    start: Path, config: Config, known: dict[str, str | None], identity: dict[str, str | None]
) -> Iterator[str]:
    values = _values(config_to_dict(config))
    for name, keys in BY_CONTENT.items():
        if None not in (known.get(name), identity.get(name)) and known[name] != identity[name]:
            given = next((f"{key} = {values[key]!r}" for key in keys if values[key] is not None), keys[0])
            yield (
                f"{given}: the {NOUNS[name]} differ from what {start} was trained with (SHA-256); give the same, "
                f"or {_new_run()}"
            )


def _new_run() -> str:
    return (
        "start a new run: another trainer.save_checkpoint_path, and the checkpoint, merged by "
        "scripts/model_merger.py, as worker.actor.model.model_path"
    )


def _values(sections: dict[str, Any]) -> dict[str, Any]:
    """Values by key, of those that the sections hold; a dictionary of free keys is one value."""
    values = {}
    for key in find_keys():
        value: Any = sections
        for name in key.split("."):
            value = value.get(name, ABSENT) if isinstance(value, dict) else ABSENT
        if value is not ABSENT:
            values[key] = value
    return values


def _matches(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)

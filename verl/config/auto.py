"""Keys that are `auto`, and copies of a configuration with other values."""

from collections.abc import Mapping
from dataclasses import replace
from operator import attrgetter
from typing import Any

from verl.config.records import Config
from verl.config.values import AUTO

UPDATE = "worker.actor.micro_batch_size_per_device_for_update"
EXPERIENCE = "worker.actor.micro_batch_size_per_device_for_experience"
KEPT = "worker.actor.model.activation_budget_gb"
ENGINE = "worker.rollout.gpu_memory_utilization"
WITHOUT_GPU = {UPDATE: 4, EXPERIENCE: 16, KEPT: 0.0, ENGINE: 0.6}
"""Values of the released recipe, for runs whose GPUs are not measured."""


def auto_keys(config: Config) -> list[str]:
    """The keys whose value is still to be chosen."""
    return [key for key in WITHOUT_GPU if attrgetter(key)(config) == AUTO]


def without_auto(config: Config) -> Config:
    """The configuration with the released values where a key is `auto`."""
    return with_values(config, {key: WITHOUT_GPU[key] for key in auto_keys(config)})


def with_values(record: Any, values: Mapping[str, Any]) -> Any:
    """A copy of a configuration record with other values of some dotted keys."""
    direct = {key: value for key, value in values.items() if "." not in key}
    for section in {key.partition(".")[0] for key in values} - set(direct):
        inner = {key.partition(".")[2]: value for key, value in values.items() if key.startswith(f"{section}.")}
        direct[section] = with_values(getattr(record, section), inner)
    return replace(record, **direct) if direct else record

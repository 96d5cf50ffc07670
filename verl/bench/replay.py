"""Routing replay's share of a step, measured within one run: every second step goes without."""

# ruff: noqa: T201  a table on the terminal is what this is for
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

LEAST_STEPS = 5
"""The first is warm-up; two of each kind follow."""
PHASES = {"rollout": ("gen", "weight_sync", "sleep"), "reference": ("ref",), "update": ("update_actor",)}
"""Phase -> timings; the others are taken off the first. They are what replay can make slower."""


def check_turns(config: Any) -> None:
    """Refuses a run that has nothing to compare. Errors: SystemExit."""
    if not config.worker.actor.routing_replay:
        raise SystemExit("--replay_in_turns: set worker.actor.routing_replay=true")
    if config.trainer.max_steps < LEAST_STEPS:
        raise SystemExit(
            f"--replay_in_turns: trainer.max_steps={config.trainer.max_steps} must be {LEAST_STEPS} or more"
        )


def take_turns(trainer: Any) -> None:
    """Lets steps of even numbers go without routing replay, from the engine's notes to the update."""
    step, replaying = trainer.train_step, trainer.engines.settings
    plain = replace(replaying, actor=replace(replaying.actor, routing_replay=False))

    def train_step() -> dict[str, Any]:
        trainer.engines.settings = replaying if trainer.step % 2 else plain
        return step()

    trainer.train_step = train_step


def compare_turns(steps: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Phase -> median seconds `with` and `without` replay, and their difference as a `share` of a step without.

    Args:
        steps: metrics of all steps, of which the first is left out.
    """
    later = [(number, metrics) for number, metrics in enumerate(steps, 1) if number > 1]
    whole = _median([metrics for number, metrics in later if number % 2 == 0], ("step",))
    table = {}
    for name, timings in {**PHASES, "whole step": ("step",)}.items():
        replayed, plain = (
            _median([metrics for number, metrics in later if number % 2 == kind], timings) for kind in (1, 0)
        )
        table[name] = {"with": replayed, "without": plain, "share": (replayed - plain) / whole}
    return table


def print_turns(table: Mapping[str, Mapping[str, float]]) -> None:
    """Prints the table of compare_turns."""
    print(f"\n{'routing replay, s':20s}{'with':>10}{'without':>10}{'of a step':>11}")
    for name, row in table.items():
        print(f"{name:20s}{row['with']:10.2f}{row['without']:10.2f}{row['share']:11.2%}", flush=True)


def _median(steps: Sequence[Mapping[str, Any]], timings: tuple[str, ...]) -> float:
    first, *inside = (f"timing_s/{name}" for name in timings)
    return statistics.median(metrics[first] - sum(metrics.get(name, 0.0) for name in inside) for metrics in steps)

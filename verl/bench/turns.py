"""A choice's share of a step by an interleaved A/B comparison: every second step of a run goes without it.

The choices are routing replay, and lengths of responses that are drawn and not all as long as their mean.
"""

# ruff: noqa: T201  a table on the terminal is what this is for
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from verl.bench.inputs import draw_lengths

LEAST_STEPS = {"replay": 5, "lengths": 3}
"""Choice -> steps, at least. The first is warm-up; one or two of each kind follow."""
COMPARED_IN = {"replay": ("step",), "lengths": ("step", "rollout")}
"""Choice -> benchmarks whose steps can take turns."""
PLAIN_STEPS = slice(1, None, 2)
"""Steps without the choice: those of even numbers, counted from 1."""
PHASES = {
    "rollout": ("gen", "weight_sync", "sleep"),
    "old": ("old",),
    "reference": ("ref",),
    "update": ("update_actor",),
    "whole step": ("step",),
}
"""Phase -> timings; the others are taken off the first. They are what a choice can make slower."""


def check_turns(choice: str, config: Any, lengths: Any) -> None:
    """Refuses a run that has nothing to compare. Errors: SystemExit.

    Args:
        lengths: their distribution, or None.
    """
    if choice == "replay" and not config.worker.actor.routing_replay:
        raise SystemExit("--in_turns replay: set worker.actor.routing_replay=true")
    if choice == "lengths" and not lengths:
        raise SystemExit("--in_turns lengths: name their distribution, --lengths lognormal:334:0.6")
    steps, least = config.trainer.max_steps, LEAST_STEPS[choice]
    if steps is not None and steps < least:
        raise SystemExit(f"--in_turns {choice}: trainer.max_steps={steps} must be {least} or more")


def replay_in_turns(trainer: Any) -> None:
    """Lets steps of even numbers go without routing replay, from the engine's notes to the update."""
    step, replaying = trainer.train_step, trainer.engines.settings
    plain = replace(replaying, actor=replace(replaying.actor, routing_replay=False))

    def train_step() -> dict[str, Any]:
        trainer.engines.settings = replaying if trainer.step % 2 else plain
        return step()

    trainer.train_step = train_step


def limit_responses(trainer: Any, logs: Any, in_turns: bool = False) -> None:
    """Gives each response of a step a length of its own, the same of every run.

    With `in_turns` all responses of steps of even numbers are as long as the mean.
    """
    import numpy as np

    generate, config = trainer.engines.generate, trainer.config

    def generate_limited(prompts: Any, sampling: dict[str, Any], seed: int) -> Any:
        shape = len(prompts), sampling.get("n", 1)
        lengths = draw_lengths(logs, shape, config.data.max_response_length, seed)
        if in_turns and trainer.step % 2 == 0:
            lengths = np.full(shape, round(lengths.mean()))
        prompts.non_tensor_batch["max_tokens"] = lengths
        return generate(prompts, sampling, seed)

    trainer.engines.generate = generate_limited


def compare_turns(steps: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Phase -> median seconds `with` and `without` the choice, and their difference as a `share` of a step without.

    Steps that train nothing are compared by their rollouts, which are the whole of them.

    Args:
        steps: metrics of all steps, of which the first is left out.
    """
    later = [(number, metrics) for number, metrics in enumerate(steps, 1) if number > 1]
    is_trained = any("timing_s/update_actor" in metrics for metrics in steps)
    phases = PHASES if is_trained else {"rollout": PHASES["rollout"], "whole step": ("gen",)}
    whole = _median([metrics for number, metrics in later if number % 2 == 0], phases["whole step"])
    table = {}
    for name, timings in phases.items():
        chosen, plain = (
            _median([metrics for number, metrics in later if number % 2 == kind], timings) for kind in (1, 0)
        )
        table[name] = {"with": chosen, "without": plain, "share": (chosen - plain) / whole}
    return table


def print_turns(choice: str, table: Mapping[str, Mapping[str, float]]) -> None:
    """Prints the table of compare_turns."""
    title = {"replay": "routing replay, s", "lengths": "drawn lengths, s"}[choice]
    print(f"\n{title:20s}{'with':>10}{'without':>10}{'of a step':>11}")
    for name, row in table.items():
        print(f"{name:20s}{row['with']:10.2f}{row['without']:10.2f}{row['share']:11.2%}", flush=True)


def _median(steps: Sequence[Mapping[str, Any]], timings: tuple[str, ...]) -> float:
    seconds = ([metrics.get(f"timing_s/{name}", 0.0) for name in timings] for metrics in steps)
    return statistics.median(first - sum(inside) for first, *inside in seconds)

"""Guards of a run: what ends it early because going on would do harm."""

from collections.abc import Mapping
from typing import Any


class DivergenceError(RuntimeError):
    """Training diverged; the message has the reason and the keys to change."""


class MemoryLimitError(RuntimeError):
    """Host memory of a machine is nearly full."""


def check_memory(metrics: Mapping[str, Any], limit: float, step: int) -> None:
    """Passes while no machine's memory is fuller than `limit`, a share of 1.

    Raises:
        MemoryLimitError: while the run can still save, before the OOM killer ends a process.
    """
    share = metrics.get("perf/max_host_memory_share", 0.0)  # a step that trains nothing asks no rank
    if share > limit:
        raise MemoryLimitError(
            f"step {step}: {share:.0%} of a machine's memory, or of its container's, is in use, over "
            f"trainer.max_host_memory_share={limit:g} (a rank holds up to "
            f"{metrics['perf/max_rank_memory_gb']:.1f} GiB, the driver {metrics['perf/driver_memory_gb']:.1f}); "
            "lower data.rollout_batch_size or data.max_pixels, or free memory; the same command goes on"
        )


def check_skipped(metrics: Mapping[str, float], limit: int, step: int) -> None:
    """Prints how many optimizer steps were skipped for a gradient that was not finite, if any.

    Raises:
        DivergenceError: `limit` in a row; a limit of 0 or less allows any number.
    """
    for role in ("actor", "critic"):
        if not metrics.get(f"{role}/skipped_steps"):
            continue
        in_a_row = int(metrics[f"{role}/skipped_in_a_row"])
        fault = (
            f"step {step}: {int(metrics[f'{role}/skipped_steps'])} optimizer steps of the {role} were "
            f"left out because their gradient was not finite, {in_a_row} in a row by now"
        )
        if 0 < limit <= in_a_row:
            raise DivergenceError(
                f"{fault}; the limit is trainer.max_skipped_updates={limit}. Lower worker.{role}.optim.lr or "
                "check the rewards, and start the run again: it goes on from its last checkpoint"
            )
        print(fault[0].upper() + fault[1:], flush=True)  # noqa: T201

"""Decode steps of an engine: milliseconds by how many sequences write a token in each."""

# ruff: noqa: T201  a table on the terminal is what this is for
import argparse
import time
from collections.abc import Sequence
from typing import Any

FIRST_SHARE = 4
"""A short rollout has this fraction (1 / n) of the long one's tokens; their difference holds decode steps alone."""


def parse_rows(text: str) -> int:
    """The number of sequences that the command line names."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of sequences; it is at least 1")
    return int(text)


def time_decode(trainer: Any, rows: Sequence[int]) -> list[dict[str, float]]:
    """Rows, milliseconds of a decode step and tokens/s for each number of rows in every engine.

    Prompts have worker.rollout.n rows each, or fewer where there are fewer rows; rows beyond a multiple are left out.
    """
    from verl.trainer.batches import train_sampling

    rollout, limit, engines = trainer.config.worker.rollout, trainer.config.data.max_response_length, trainer.engines
    lengths = max(1, limit // FIRST_SHARE), limit
    prompts = trainer.batches.upcoming()
    if lengths[0] == lengths[1]:
        raise SystemExit(
            f"--rows: data.max_response_length={limit} has no decode steps to time; raise it to 2 or more"
        )
    most = len(prompts) // len(engines.group) * rollout.n
    if max(rows) > min(most, rollout.max_num_seqs):
        raise SystemExit(
            f"--rows {max(rows)}: an engine has {most} sequences and writes {rollout.max_num_seqs} at a time; raise "
            "data.rollout_batch_size and worker.rollout.max_num_seqs"
        )
    measured = []
    with engines.awake():
        for count in rows:
            samples = min(rollout.n, count)
            groups = prompts[: count // samples * len(engines.group)]
            sampling = train_sampling(rollout) | {"n": samples, "ignore_eos": True}
            seconds = [_seconds(engines, groups, sampling, length) for length in (lengths[0], *lengths)][1:]
            step = (seconds[1] - seconds[0]) / (lengths[1] - lengths[0])
            size = len(groups) // len(engines.group) * samples
            measured.append({"rows": size, "step_ms": 1000 * step, "tokens_per_s": size / step})
            print("{rows:6d} rows {step_ms:8.2f} ms {tokens_per_s:10.0f} tokens/s".format(**measured[-1]), flush=True)
    return measured


def _seconds(engines: Any, prompts: Any, sampling: dict[str, Any], length: int) -> float:
    """Seconds of a rollout of so many tokens for each response."""
    import numpy as np

    prompts.non_tensor_batch["max_tokens"] = np.full((len(prompts), sampling["n"]), length)
    start = time.perf_counter()
    engines.generate(prompts, sampling, seed=0)
    return time.perf_counter() - start

"""Probe of an update's memory: its largest passes are run, and size and kept activations follow from their peaks.

`fit_passes` decides from measured peaks alone; `Probe` measures them on a rank.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from verl.workers.actor import Actor, Groups

GB = 1024**3
USED_SHARE = 0.95
"""Share of a GPU that its processes may hold: its driver keeps some for itself, and a run goes on for hours."""
ALLOCATED_SHARE = 0.94
"""Share of a process's memory that tensors fill at most: the allocator's blocks leave gaps."""
FIRST_SHARES = (8, 4)
"""The first two passes have these fractions (1 / n) of the tokens; the whole one's peak is foreseen from them."""
FORESEEN_MARGIN = 1.1
"""Growth that is foreseen over that of the first two passes."""
KEPT_SHARE = 0.9
"""Share of the memory that remains which activations are first given; their bytes are estimated by layer."""
NUM_TRIES = 3

Measure = Callable[[int, float], float]
"""Tokens of a pass, and bytes for kept activations -> peak bytes; infinite when memory ran out."""


@dataclass(frozen=True)
class Fit:
    """Tokens of an update's pass, bytes of kept activations, peak and available bytes, and lines on changes."""

    tokens: int
    kept: float
    peak: float
    available: float
    notes: list[str]

    def describe(self) -> list[str]:
        """Lines on the passes, for the log."""
        kept = f"{self.kept / GB:.1f} GiB for kept activations"
        peak = f"the largest takes {self.peak / GB:.1f} of the {self.available / GB:.1f} GiB that a rank may fill"
        return [f"Probed: updates in passes of {self.tokens} tokens, {kept}; {peak}", *self.notes]


def fit_passes(measure: Measure, available: float, tokens: int, least: int) -> Fit:
    """The largest passes that fit, and the activations that they can keep.

    A peak is foreseen by the growth over two small passes, so that ranks that would have to wait for one that ran out
    of memory hardly meet that case.

    Args:
        measure: runs passes; the same result on every rank.
        available: bytes that tensors may fill.
        tokens, least: of the planned pass and of the smallest one, which holds one response of full length.

    Raises:
        MemoryError: even the smallest pass does not fit.
    """
    notes: list[str] = []
    smaller, small = (max(least, tokens // share) for share in FIRST_SHARES)
    first = peak = measure(smaller, 0.0)
    if first > available and smaller > least:
        smaller = small = least
        first = peak = measure(least, 0.0)
    if first > available:
        raise MemoryError(
            f"the smallest pass of an update, {least} tokens, reaches {peak / GB:.1f} GiB of the {available / GB:.1f} "
            "that a rank may fill; lower data.max_prompt_length, data.max_pixels or data.max_response_length, set "
            "worker.actor.offload.offload_optimizer=true, or raise trainer.n_gpus_per_node"
        )
    growth = 0.0
    if small > smaller:
        peak = measure(small, 0.0)
        growth = FORESEEN_MARGIN * max(0.0, peak - first) / (small - smaller)
        if peak > available:
            small, peak = smaller, first
    planned, foreseen_from = tokens, peak
    while tokens > small:
        if foreseen_from + growth * (tokens - small) <= available and (measured := measure(tokens, 0.0)) <= available:
            peak = measured
            break
        tokens = max(small, tokens // 2)
    if tokens < planned:
        notes.append(f"passes of {planned} tokens would not fit; they have {tokens}")
    kept = KEPT_SHARE * (available - peak)
    for _ in range(NUM_TRIES):
        with_kept = measure(tokens, kept)
        if with_kept <= available:
            return Fit(tokens, kept, with_kept, available, notes)
        kept *= KEPT_SHARE * (available - peak) / (with_kept - peak) if with_kept < math.inf else 0.5
    measure(tokens, 0.0)  # leaves the actor without kept activations
    return Fit(tokens, 0.0, peak, available, notes)


def probe_update(
    actor: Actor, groups: Groups, tokens: int, least: int, temperature: float, memory_gb: float | None
) -> Fit:
    """The passes of the actor's updates over such groups, of the planned number of tokens or fewer.

    The actor keeps the activations that were chosen. `memory_gb` limits what all processes of a GPU hold, in GiB.
    """
    probe = Probe(actor, groups, temperature)
    available = probe.available(math.inf if memory_gb is None else memory_gb * GB)
    return fit_passes(probe.peak, available, tokens, least)


class Probe:
    """Measures an update's passes on a rank, without changing weights or states.

    Args:
        actor: with its model on the device.
        groups: the largest ones, loaded.
        temperature: of the log-probs.
    """

    def __init__(self, actor: Actor, groups: Groups, temperature: float):
        self.actor, self.groups, self.temperature = actor, groups, temperature

    def peak(self, tokens: int, kept: float) -> float:
        """Peak bytes on any rank of two passes one after the other: the second adds to the first's gradients."""
        actor, groups = self.actor, self.groups
        actor.model.train()
        if actor.activation_budget_gb is not None:
            actor.activation_budget_gb = kept / GB
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            pieces = max(groups.plan(tokens, True), key=len)
            for _ in range(2):
                (0.0 * actor.forward(groups, pieces, self.temperature)[0].sum()).backward()
            peak = float(torch.cuda.max_memory_allocated())
        except torch.OutOfMemoryError:
            if actor.world_size > 1:  # the others wait for this rank
                raise
            peak = math.inf
        assert actor.optimizer is not None
        actor.optimizer.zero_grad(set_to_none=True)
        return self._over_ranks(peak, dist.ReduceOp.MAX)

    def available(self, limit: float) -> float:
        """Bytes that tensors may fill on the fullest GPU of all ranks, within the limit and beside other processes."""
        free, total = torch.cuda.mem_get_info()
        others = total - free - torch.cuda.memory_reserved()
        return self._over_ranks(ALLOCATED_SHARE * (USED_SHARE * min(total, limit) - others), dist.ReduceOp.MIN)

    def _over_ranks(self, value: float, operation: dist.ReduceOp.RedOpType) -> float:
        if self.actor.world_size == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64, device=self.actor.device)
        dist.all_reduce(shared, operation)
        return float(shared)

"""Kernels of the passes by kind: which seconds of old and reference log-probs and of the update go where.

torch's profiler notes every kernel of a GPU, the host's operators beside it, and on a CPU every operator, of the first
rank. Noting takes the host time: where it is the slower one, "none" grows.
"""

# ruff: noqa: T201  a table on the terminal is what this is for
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

KINDS = {
    "attention": re.compile(r"flash|fmha|attention|attn", re.IGNORECASE),
    "products": re.compile(
        r"gemm|gemv|nvjet|cutlass|xmma|cublas|grouped_mm|aten::(addmm|mm|bmm|linear)", re.IGNORECASE
    ),
    "optimizer": re.compile(r"adam|foreach|multi_tensor", re.IGNORECASE),
    "copies": re.compile(r"memcpy|memset|aten::copy_|aten::_to_copy|nccl", re.IGNORECASE),
}
"""Kind -> names of its kernels; the first that fits counts."""
REST = "others"
"""Norms, activations, rotations, losses: what reads and writes much and computes little."""
NUM_LONGEST = 12

WALL = "wall"
"""Name of the seconds that passed, among those of kernels."""


def kind_of(kernel: str) -> str:
    """The kind of a kernel or operator by its name."""
    return next((kind for kind, names in KINDS.items() if names.search(kernel)), REST)


class KernelTable:
    """Kernels of each pass of a group of training ranks that note them."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.passes: dict[str, dict[str, float]] = {}
        self.of_host: dict[str, dict[str, float]] = {}

    @contextmanager
    def watch(self, name: str) -> Iterator[None]:
        """Context of a pass."""
        self.actor.start_kernels()
        yield
        kernels, self.of_host[name], wall = self.actor.kernel_seconds()[0]
        self.passes[name] = {**kernels, WALL: wall}

    def print(self, title: str) -> None:
        """Prints the seconds of each kind in each pass, and what of the update takes GPU and host longest."""
        print(f"\nseconds of kernels, prompts shared, of the first rank, {title}")
        print(f"{'pass':10s}" + "".join(f"{kind:>11s}" for kind in (*KINDS, REST, "none", WALL)))
        for name, seconds in self.passes.items():
            print(f"{name:10s}" + "".join(f"{value:11.3f}" for value in by_kind(seconds).values()), flush=True)
        for kernel, seconds in longest(self.passes.get("update", {})):
            print(f"{seconds:10.3f} s  {kind_of(kernel):10s} {kernel[:90]}", flush=True)
        for operator, seconds in longest(self.of_host.get("update", {})):
            print(f"{seconds:10.3f} s  {'host':10s} {operator[:90]}", flush=True)


def longest(seconds: Mapping[str, float]) -> list[tuple[str, float]]:
    """The names that take longest, with their seconds."""
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return [item for item in ordered if item[0] != WALL][:NUM_LONGEST]


def by_kind(kernels: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each kind, those in which none ran ("none", at least 0), and all that passed."""
    seconds = dict.fromkeys((*KINDS, REST), 0.0)
    for kernel, value in kernels.items():
        if kernel != WALL:
            seconds[kind_of(kernel)] += value
    idle = max(0.0, kernels[WALL] - sum(seconds.values()))
    return seconds | {"none": idle, WALL: kernels[WALL]}

"""Helpers of the tests with several ranks."""

import faulthandler
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from spatialthinker.multicast import WITHOUT_MULTICAST
from verl.distributed.fsdp import init_mesh

TIMEOUT_S = 120


def leave() -> NoReturn:
    """Ends a rank's process once all ranks are here.

    Not by returning: a gloo thread that lets go of a Python object while the interpreter shuts down aborts the
    process ("terminate called without an active exception").
    """
    dist.barrier()
    os._exit(0)


def run_ranks(
    function: Callable[..., Any], num_ranks: int, folder: Path, *arguments: Any, device: str = "cpu"
) -> list[Any]:
    """Results of `function(mesh, rank, num_ranks, *arguments)` on each rank, over gloo or NCCL."""
    own = folder / f"ranks_{time.monotonic_ns()}"
    own.mkdir()
    # Importing torch anew takes longer than most functions, but a process that has seen a GPU cannot be forked.
    context = mp.start_processes(  # type: ignore[attr-defined]
        _run_rank,
        (function, num_ranks, own, arguments, device),
        nprocs=num_ranks,
        join=False,
        start_method="fork" if device == "cpu" else "spawn",
    )
    deadline = time.monotonic() + TIMEOUT_S
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise AssertionError(f"{num_ranks} ranks did not end within {TIMEOUT_S} s")
    return [torch.load(own / f"{rank}.pt", weights_only=True) for rank in range(num_ranks)]


def _run_rank(
    rank: int, function: Callable[..., Any], num_ranks: int, own: Path, arguments: tuple[Any, ...], device: str
) -> None:
    faulthandler.dump_traceback_later(TIMEOUT_S - 20)  # says where a rank hangs
    torch.set_num_threads(1)
    if device == "cuda":
        for name, value in WITHOUT_MULTICAST.items():
            os.environ.setdefault(name, value)
        torch.backends.cudnn.allow_tf32 = False
        torch.cuda.set_device(rank)
    store = dist.FileStore(str(own / "store"), num_ranks)
    mesh = init_mesh(store, rank, num_ranks, torch.device(device))
    torch.save(function(mesh, rank, num_ranks, *arguments), own / f"{rank}.pt")
    leave()

"""Process groups of the ranks: each is tested when it is made, and its errors say what keeps the ranks apart."""

import datetime
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from verl.distributed.host_report import find_name_fault

START_TIMEOUT_S = 180
COLLECTIVE_TIMEOUT_S = 1800


@contextmanager
def naming_network(rank: int, world_size: int, what: str, with_nccl: bool, limit_s: float) -> Iterator[None]:
    """Context in which ranks meet.

    Args:
        what: they do there.
        with_nccl: over GPUs.

    Raises:
        RuntimeError: they do not, within `limit_s`; with the variables that choose a network.
    """
    try:
        yield
    except (RuntimeError, TimeoutError) as error:
        variables = "NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME" if with_nccl else "GLOO_SOCKET_IFNAME"
        fault = find_name_fault() if world_size > 1 else ""
        raise RuntimeError(
            f"rank {rank} of {world_size} on {socket.gethostname()} cannot talk to the others: {what} did not end "
            f"within {limit_s:g} s ({error}); {f'if there are other machines, {fault}; ' if fault else ''}look for a "
            f"rank that failed before it or a firewall between machines, or set {variables} to the network that joins "
            "them: in front of the training command for all machines, or of `ray start` on one whose interface has "
            "another name (NCCL_DEBUG=INFO says more)"
        ) from error


def new_cpu_group(limit_s: float = START_TIMEOUT_S) -> Any:
    """A gloo group of all ranks, tested by one all-reduce; collective.

    Raises:
        RuntimeError: the ranks do not meet within `limit_s`.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    limit = datetime.timedelta(seconds=limit_s)
    with naming_network(rank, world_size, "the first all-reduce of the checkpoint writers", False, limit_s):
        group: Any = dist.new_group(backend="gloo", timeout=limit)
        work = dist.all_reduce(torch.ones(1), group=group, async_op=True)
        assert work is not None
        work.wait(limit)
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_S), group)
    return group

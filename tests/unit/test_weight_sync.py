"""Weight sync over GPUs: each engine gets the handles of its own GPUs, however many there are."""

from typing import Any

import pytest

from tests.support.ranks import run_ranks
from verl.workers.weight_sync import _gather_handles, share_handles


def handles(rank: int) -> list[dict[str, tuple[Any, ...]]]:
    """As a rank makes them for two tensors, each with its GPU's name."""
    return [{f"GPU-{rank}": (rank, tensor)} for tensor in range(2)]


@pytest.mark.parametrize("num_engines", [1, 2, 4])
def test_engines_get_the_handles_of_their_own_gpus(num_engines):
    shares = share_handles([handles(rank) for rank in range(4)], num_engines)
    size = 4 // num_engines
    assert len(shares) == num_engines
    for engine, share in enumerate(shares):
        ranks = range(engine * size, (engine + 1) * size)
        assert share == [{f"GPU-{rank}": (rank, tensor) for rank in ranks} for tensor in range(2)]


def gather(mesh: Any, rank: int, num_ranks: int) -> list[Any]:
    return _gather_handles(handles(rank))


def test_handles_are_gathered_by_rank(tmp_path):
    assert _gather_handles(handles(0)) == [handles(0)]
    assert run_ranks(gather, 2, tmp_path) == [[handles(0), handles(1)]] * 2

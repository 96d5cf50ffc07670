"""Weight sync over GPUs: each engine gets the handles of its own GPUs, however many there are."""

import weakref
from typing import Any

import pytest
import torch

from tests.support.ranks import run_ranks
from verl.workers.weight_sync import _copied_chunks, _gather_handles, share_handles


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


def test_chunks_hold_copies_in_order_and_no_more_than_asked_for():
    sources, alive = [], []

    def weights():
        for index in range(5):
            tensor = torch.full((2, 3), float(index)).T  # 24 bytes, not contiguous
            sources.append(weakref.ref(tensor))
            yield f"w{index}", tensor

    chunks = []
    for chunk in _copied_chunks(weights(), 40):
        alive.append(sum(source() is not None for source in sources))
        chunks.append(chunk)
    assert [[name for name, _ in chunk] for chunk in chunks] == [["w0", "w1"], ["w2", "w3"], ["w4"]]
    copies = [tensor for chunk in chunks for _, tensor in chunk]
    assert all(tensor.is_contiguous() and tensor.shape == (3, 2) for tensor in copies)
    assert [float(tensor[0, 0]) for tensor in copies] == [0, 1, 2, 3, 4]
    assert max(alive) <= 1, "gathered weights outlive their copies"

"""Weight sync over GPUs: each engine gets the handles of its own GPUs, however many there are."""

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.ranks import run_ranks
from verl.workers import weight_sync
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


def test_a_chunk_is_freed_before_the_next_is_gathered(monkeypatch):
    """Three weights in chunks of two, sent to an engine by handles that stand for CUDA's."""
    alive, sent = [], []

    class Call:
        def __init__(self, receive):
            self.remote = receive

    engine = SimpleNamespace(receive_weights=Call(sent.append), finish_weights=Call(lambda: sent.append("finished")))
    handed = []

    def handle(tensor):
        handed.append(weakref.ref(tensor))
        return {"GPU-0": (float(tensor[0, 0]),)}

    def weights():
        for index in range(3):
            alive.append(sum(copy() is not None for copy in handed))
            yield f"w{index}", torch.full((2, 3), float(index))

    monkeypatch.setattr(weight_sync, "_ipc_handle", handle)
    monkeypatch.setattr(weight_sync, "_wait", lambda calls: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    weight_sync._send_by_ipc(weights(), [engine], True, 40)
    *updates, end = sent
    assert [update["names"] for update in updates] == [["w0", "w1"], ["w2"]] and end == "finished"
    assert updates[0]["ipc_handles"] == [{"GPU-0": (0.0,)}, {"GPU-0": (1.0,)}]
    assert updates[1] == {
        "names": ["w2"],
        "dtype_names": ["float32"],
        "shapes": [[2, 3]],
        "ipc_handles": [{"GPU-0": (2.0,)}],
    }
    assert alive == [0, 0, 0]

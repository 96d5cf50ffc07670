"""Offloaded tensors keep their identity and values, and their device memory is free meanwhile."""

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from tests.support.ranks import run_ranks
from tests.support.updates import TOY, scorer
from verl.distributed.cpu_offload import OffloadedTensors, Offloader, PinnedBuffer, _pin
from verl.distributed.fsdp import full_weights, shard
from verl.distributed.optim import KahanAdamW, allocate_states, local_part, state_tensors


def num_bytes(tensors) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def test_views_ties_and_types_come_back_as_they_were():
    base = torch.arange(10.0)
    half, nothing = torch.randn(3, 5).bfloat16(), torch.empty(0)
    tensors = [base, base[2:5], half, half, nothing]
    before = [tensor.clone() for tensor in tensors]
    offloaded = OffloadedTensors(lambda: tensors)
    offloaded.offload()
    assert num_bytes(tensors) == 0
    offloaded.load()
    offloaded.load()
    assert all(torch.equal(tensor, was) for tensor, was in zip(tensors, before, strict=True))
    base[3] = -1.0
    assert tensors[1][1] == -1.0  # still a view


@pytest.mark.parametrize("have_changed", [True, False])
def test_changes_are_kept_where_they_are_told_of(have_changed):
    weight = torch.zeros(4)
    offloader = Offloader()
    offloader.offload("policy", lambda: [weight])
    with offloader.on_device("policy", "someone who never waits", None, have_changed=have_changed):
        weight += 1
    assert num_bytes([weight]) == 0
    with offloader.on_device("policy", have_changed=False):
        assert torch.equal(weight, torch.full((4,), float(have_changed)))


def test_a_fault_while_they_are_there_lets_them_wait_again():
    weight = torch.ones(4)
    offloader = Offloader()
    offloader.offload("policy", lambda: [weight])
    with pytest.raises(ValueError, match="fault"), offloader.on_device("policy", have_changed=True):
        raise ValueError("fault")
    assert num_bytes([weight]) == 0


def test_tensors_that_have_been_replaced_wait_too():
    """As when a checkpoint is read: an optimizer then holds other tensors of the same sizes."""
    held = {"moment": torch.zeros(4)}
    offloaded = OffloadedTensors(lambda: held.values())
    offloaded.offload()
    offloaded.load()
    held["moment"] = torch.ones(4)
    offloaded.offload()
    assert num_bytes(held.values()) == 0
    offloaded.load()
    assert torch.equal(held["moment"], torch.ones(4))


def test_what_waits_cannot_wait_twice():
    offloaded = OffloadedTensors(lambda: [weight])
    weight = torch.ones(4)
    offloaded.offload()
    with pytest.raises(AssertionError, match="offloaded already"):
        offloaded.offload()


def test_copies_are_made_in_the_same_memory_and_each_is_whole_in_itself():
    weight = torch.randn(3, 4)
    model = {"a": weight, "tied": weight, "part": weight[1:, ::2], "none": weight[:0]}
    state = {"model": model, "step": [7, torch.ones(())]}
    buffer = PinnedBuffer()
    first = buffer.copy_state(state)
    addresses = [copy.data_ptr() for copy in tree_leaves(first) if isinstance(copy, torch.Tensor)]
    before = weight.clone()
    weight += 1
    assert torch.equal(first["model"]["a"], before)
    second = buffer.copy_state(state)
    assert second["step"] == [7, torch.ones(())]
    for name, copy in second["model"].items():
        assert torch.equal(copy, state["model"][name])
        assert copy.untyped_storage().nbytes() == copy.numel() * copy.itemsize  # or a file would hold the whole buffer
    assert addresses == [copy.data_ptr() for copy in tree_leaves(second) if isinstance(copy, torch.Tensor)]
    assert second["model"]["a"].data_ptr() == second["model"]["tied"].data_ptr()


def copies(mesh, rank: int, num_ranks: int) -> torch.Tensor:
    """Contents of a sharded state's copy when the state has changed meanwhile."""
    model = scorer(family=TOY)
    shard(model, mesh, torch.float32, torch.float32)
    kept = PinnedBuffer().copy_state(dict(model.named_parameters()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(isinstance(copy, DTensor) for copy in kept.values())
    return torch.cat([copy.full_tensor().flatten() for copy in kept.values()])


def test_copies_of_sharded_tensors_are_sharded(tmp_path):
    expected = torch.cat([parameter.flatten() for parameter in scorer(family=TOY).parameters()])
    assert all(torch.equal(whole, expected) for whole in run_ranks(copies, 2, tmp_path))


def updates(mesh, rank: int, num_ranks: int, waits: bool) -> torch.Tensor:
    """Weights of a sharded model after two updates by made-up gradients, having waited between them or not."""
    model = scorer(family=TOY).bfloat16()
    shard(model, mesh, torch.bfloat16, torch.float32)
    optimizer = KahanAdamW(model.parameters(), lr=1e-3)
    allocate_states(optimizer)
    offloader = Offloader()
    if waits:
        offloader.offload(model, model.parameters)
        offloader.offload(optimizer, lambda: state_tensors(optimizer))
        assert num_bytes([*map(local_part, model.parameters())]) == 0
        assert num_bytes([*map(local_part, state_tensors(optimizer))]) == 0
    for seed in range(2):
        with offloader.on_device(model, optimizer, have_changed=True):
            torch.manual_seed(seed)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    with offloader.on_device(model, have_changed=False):
        return torch.cat([weight.flatten() for _, weight in full_weights(model.model)])


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_sharded_models_and_optimizers_learn_the_same(tmp_path, num_ranks):
    alone, waited = (run_ranks(updates, num_ranks, tmp_path, waits) for waits in (False, True))
    assert all(torch.equal(*pair) for pair in zip(alone, waited, strict=True))
    assert not torch.equal(waited[0], torch.cat([w.flatten() for _, w in full_weights(scorer(family=TOY).model)]))


class Runtime:
    """Stands in for CUDA's: pins buffers of up to so many bytes."""

    def __init__(self, limit: int):
        self.limit = limit
        self.locked: set[int] = set()

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        self.locked |= {address} if size <= self.limit else set()
        return 0 if size <= self.limit else 2

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self.locked.remove(address)
        return 0


def test_pages_are_unlocked_before_their_memory_becomes_anothers(monkeypatch):
    runtime = Runtime(limit=2**20)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    buffer = torch.empty(2**20, dtype=torch.uint8)
    _pin(buffer)
    assert runtime.locked == {buffer.data_ptr()}
    del buffer
    assert not runtime.locked


def test_pages_that_cannot_be_locked_are_an_error_that_says_what_to_change(monkeypatch):
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime(limit=0))
    with pytest.raises(RuntimeError, match=r"0\.5 GiB of host memory .* offload_params, offload_opt"):
        _pin(torch.empty(2**29, dtype=torch.uint8))

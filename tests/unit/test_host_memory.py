"""What waits in host memory keeps its identity and its values, and its own memory is free meanwhile."""

import pytest
import torch

from tests.ranks import run_ranks
from tests.updates import TOY, scorer
from verl.fsdp import full_weights, shard
from verl.host_memory import HostRoom, HostRooms
from verl.optim import KahanAdamW, allocate_states, state_tensors


def num_bytes(tensors) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def test_views_ties_and_types_come_back_as_they_were():
    base = torch.arange(10.0)
    half, nothing = torch.randn(3, 5).bfloat16(), torch.empty(0)
    tensors = [base, base[2:5], half, half, nothing]
    before = [tensor.clone() for tensor in tensors]
    room = HostRoom(lambda: tensors)
    room.take()
    assert num_bytes(tensors) == 0
    room.give_back()
    room.give_back()
    assert all(torch.equal(tensor, was) for tensor, was in zip(tensors, before, strict=True))
    base[3] = -1.0
    assert tensors[1][1] == -1.0  # still a view


@pytest.mark.parametrize("have_changed", [True, False])
def test_changes_are_kept_where_they_are_told_of(have_changed):
    weight = torch.zeros(4)
    rooms = HostRooms()
    rooms.let_wait("policy", lambda: [weight])
    with rooms.left_by("policy", "someone who never waits", None, have_changed=have_changed):
        weight += 1
    assert num_bytes([weight]) == 0
    with rooms.left_by("policy", have_changed=False):
        assert torch.equal(weight, torch.full((4,), float(have_changed)))


def test_a_fault_while_they_are_there_lets_them_wait_again():
    weight = torch.ones(4)
    rooms = HostRooms()
    rooms.let_wait("policy", lambda: [weight])
    with pytest.raises(ValueError, match="fault"), rooms.left_by("policy", have_changed=True):
        raise ValueError("fault")
    assert num_bytes([weight]) == 0


def test_tensors_that_have_been_replaced_wait_too():
    """As when a checkpoint is read: an optimizer then holds other tensors of the same sizes."""
    held = {"moment": torch.zeros(4)}
    room = HostRoom(lambda: held.values())
    room.take()
    room.give_back()
    held["moment"] = torch.ones(4)
    room.take()
    assert num_bytes(held.values()) == 0
    room.give_back()
    assert torch.equal(held["moment"], torch.ones(4))


def test_what_waits_cannot_wait_twice():
    room = HostRoom(lambda: [weight])
    weight = torch.ones(4)
    room.take()
    with pytest.raises(AssertionError, match="wait already"):
        room.take()


def updates(mesh, rank: int, num_ranks: int, waits: bool) -> torch.Tensor:
    """Weights of a sharded model after two updates by made-up gradients, having waited between them or not."""
    model = scorer(family=TOY)
    shard(model, mesh, torch.float32, torch.float32)
    optimizer = KahanAdamW(model.parameters(), lr=1e-3)
    allocate_states(optimizer)
    rooms = HostRooms()
    if waits:
        rooms.let_wait(model, model.parameters)
        rooms.let_wait(optimizer, lambda: state_tensors(optimizer))
        assert num_bytes([*(p.to_local() for p in model.parameters())]) == 0
        assert num_bytes([value.to_local() for value in state_tensors(optimizer)]) == 0
    for seed in range(2):
        with rooms.left_by(model, optimizer, have_changed=True):
            torch.manual_seed(seed)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    with rooms.left_by(model, have_changed=False):
        return torch.cat([weight.flatten() for _, weight in full_weights(model.model)])


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_sharded_models_and_optimizers_learn_the_same(tmp_path, num_ranks):
    alone, waited = (run_ranks(updates, num_ranks, tmp_path, waits) for waits in (False, True))
    assert all(torch.equal(*pair) for pair in zip(alone, waited, strict=True))
    assert not torch.equal(waited[0], torch.cat([w.flatten() for _, w in full_weights(scorer(family=TOY).model)]))

"""Errors of Ray's calls by name: who died, who only saw it, and when the ranks are still whole."""

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayTaskError,
    WorkerCrashedError,
)

from verl.distributed import single_controller
from verl.distributed.single_controller import WorkerError, WorkerGroup, WorkerSpec


class Nothing:
    """Class of workers that are never made."""


def group(num_ranks: int, name: str = "actor") -> WorkerGroup:
    found = WorkerGroup.__new__(WorkerGroup)
    found.spec, found.watchdog, found.actors = WorkerSpec(Nothing, {}, name), None, [None] * num_ranks
    return found


def seen_inside(cause: Exception) -> Exception:
    """As a task raises what a call of its own to another actor came to."""
    return RayTaskError("send_weights", "traceback", cause).as_instanceof_cause()


class Calls:
    """Ray with the outcome of each call; None never ends, and the first that has one ends first."""

    def __init__(self, *outcomes: Any):
        self.outcomes = outcomes

    def wait(self, refs: list[int], num_returns: int, timeout: float | None) -> tuple[list[int], list[int]]:
        done = [ref for ref in refs if self.outcomes[ref] is not None][:num_returns]
        return done, [ref for ref in refs if ref not in done]

    def get(self, ref: Any) -> Any:
        if isinstance(ref, list):
            return [self.get(each) for each in ref]
        if isinstance(self.outcomes[ref], Exception):
            raise self.outcomes[ref]
        return self.outcomes[ref]


@pytest.fixture
def failure(monkeypatch):
    def call(*outcomes: Any, name: str = "actor") -> WorkerError:
        calls = Calls(*outcomes)
        monkeypatch.setattr(single_controller, "ray", SimpleNamespace(wait=calls.wait, get=calls.get))
        with pytest.raises(WorkerError) as caught:
            group(len(outcomes), name)._wait("update_actor", list(range(len(outcomes))))
        return caught.value

    return call


@pytest.mark.parametrize(
    "death", [ActorDiedError(), OutOfMemoryError("node is low on memory"), WorkerCrashedError(), NodeDiedError("gone")]
)
def test_a_dead_rank_is_named_however_it_died(failure, death):
    error = failure("ok", death)
    assert "actor rank 1 of 2 in update_actor: its process died" in str(error)
    assert error.role == "actor" and not error.has_ended


def test_the_memory_monitors_victim_is_named_before_who_lost_the_connection(failure):
    lost = RayTaskError("update_actor", "connection closed by peer", RuntimeError("gloo"))
    assert "actor rank 1 of 2 in update_actor: its process died" in str(failure(lost, OutOfMemoryError("low")))


@pytest.mark.parametrize("death", [ActorDiedError(), OutOfMemoryError("low")])
def test_the_death_of_an_engine_leaves_ranks_that_have_answered_whole(failure, death):
    error = failure(seen_inside(death), "ok")
    assert "actor rank 0 of 2 in update_actor: an actor that it called died" in str(error) and error.has_ended
    assert not failure(seen_inside(death), None).has_ended  # one still waits for the other
    assert not failure(seen_inside(death), ActorDiedError()).has_ended
    assert failure(death, name="rollout").role == "rollout"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            ActorUnavailableError("socket closed", b"0" * 16),
            "rollout rank 1 of 2 beside update_actor of actor on right",
        ),
        ("alive", "actor rank 0 of 2 in update_actor: an actor that it called died"),
        (None, "actor rank 0 of 2 in update_actor: an actor that it called died"),  # no answer in time
    ],
)
def test_the_engine_that_died_is_named_and_not_the_rank_that_called_it(monkeypatch, answer, words):
    calls = Calls(seen_inside(ActorDiedError()), "ok", "alive", answer)
    monkeypatch.setattr(single_controller, "ray", SimpleNamespace(wait=calls.wait, get=calls.get))
    ranks, engines = group(2), group(2, "rollout")
    engines.machines = ["left", "right"]
    engines.actors = [SimpleNamespace(__ray_ready__=SimpleNamespace(remote=lambda ref=ref: ref)) for ref in (2, 3)]
    ranks.called = [engines]
    with pytest.raises(WorkerError, match=words) as caught:
        ranks._wait("update_actor", [0, 1])
    assert caught.value.role == "actor" and caught.value.has_ended


def test_an_engine_that_hangs_leaves_ranks_that_have_answered_whole(failure):
    late = seen_inside(GetTimeoutError("Get timed out"))
    error = failure(late, "ok")
    assert "actor rank 0 of 2 in update_actor: an actor that it called gave no answer in time" in str(error)
    assert "trainer.watchdog_timeout_s" in str(error) and error.has_ended
    assert not failure(late, None).has_ended  # one still waits for the other
    assert "its process died" in str(failure(late, ActorDiedError()))


def test_a_machine_is_named_where_there_are_several(failure, monkeypatch):
    monkeypatch.setattr(WorkerGroup, "machines", ["left (10.0.0.1)", "right (10.0.0.2)"])
    error = failure("ok", ActorDiedError())
    assert "actor rank 1 of 2 in update_actor on right (10.0.0.2): its process died" in str(error)
    names = ["actor rank 0 on left (10.0.0.1)", "actor rank 1 on right (10.0.0.2)"]
    assert group(2).rank_names == names


def test_any_other_error_of_ray_is_named(failure):
    error = failure("ok", ObjectLostError("00" * 28, None, "stack"))
    assert "actor rank 1 of 2 in update_actor" in str(error) and "died" not in str(error).splitlines()[0]

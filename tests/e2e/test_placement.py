"""GPUs that actors see, and the failed actor that a call names; Ray believes that this machine has two GPUs."""

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Timer

import pytest
import ray

from verl.distributed.single_controller import (
    WATCH_PERIOD_S,
    ResourcePool,
    WorkerError,
    WorkerGroup,
    WorkerSpec,
    register,
)

pytestmark = pytest.mark.e2e


class Probe:
    """An actor that looks at its environment and fails on demand."""

    def __init__(self, rank: int, world_size: int):
        self.rank, self.world_size = rank, world_size

    @register()
    def where(self) -> tuple[int, int, str]:
        return self.rank, self.world_size, os.environ.get("CUDA_VISIBLE_DEVICES", "")

    @register()
    def fail(self, death: str) -> None:
        """The second rank dies just after the first has lost it."""
        if self.rank == 0:
            while not Path(death).exists():
                time.sleep(0.01)
            raise RuntimeError("connection closed by peer")
        Path(death).touch()
        time.sleep(0.5)
        os._exit(1)

    @register()
    def process(self) -> int:
        return os.getpid()

    @register()
    def work(self, seconds: float) -> None:
        time.sleep(seconds)


@pytest.fixture(scope="module")
def groups():
    """Ranks and their engine, side by side, on a machine where a killed `ray start` has left its address."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="r") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        patch.delenv("RAY_ADDRESS", raising=False)
        (Path(folder) / "ray").mkdir()
        (Path(folder) / "ray" / "ray_current_cluster").write_text("10.1.2.3:6379")
        ray.init("local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False)
        assert list(Path(folder).glob("ray/session_*"))
        yield from make_groups()
        ray.shutdown()


def make_groups() -> Iterator[tuple[WorkerGroup, WorkerGroup, Callable[[], WorkerGroup]]]:
    """Ranks, their engine and a maker of others."""
    pool = ResourcePool(2, 2, use_gpu=True)
    env = {"PYTHONPATH": str(Path(__file__).parent)}  # where the actors find this file
    spec = WorkerSpec(cls=Probe, kwargs={}, name="probe", env=env)
    make_engines = partial(WorkerGroup, pool, replace(spec, name="engine"), ranks_per_actor=2)
    yield WorkerGroup(pool, spec), make_engines(), make_engines


def test_an_engine_sees_the_gpus_of_its_ranks(groups):
    of_ranks, of_engines = (group.where() for group in groups[:2])
    assert [place[:2] for place in of_ranks] == [(0, 2), (1, 2)]
    gpus = [gpu for *_, gpu in of_ranks]
    assert sorted(gpus) == ["0", "1"]
    assert of_engines == [(0, 1, ",".join(gpus))]


@pytest.mark.parametrize("is_at_work", [False, True])
def test_the_death_of_a_watched_process_ends_the_wait_for_others(groups, is_at_work):
    ranks, _, make_engines = groups
    engines = make_engines()
    ranks.watched = [engines]
    ranks.work(2.5 * WATCH_PERIOD_S)  # who lives disturbs nobody
    (process,) = engines.process()
    wait = engines.start("work", 60.0) if is_at_work else None
    Timer(1.0, os.kill, (process, signal.SIGKILL)).start()
    with pytest.raises(WorkerError, match="engine rank 0 of 1 beside work of probe: its process died") as caught:
        ranks.work(3 + 2 * WATCH_PERIOD_S)
    assert caught.value.role == "engine"
    ranks.watched = []
    assert wait is None or pytest.raises(WorkerError, wait)


def test_a_death_is_named_before_the_neighbour_that_it_left_behind(groups, tmp_path):
    with pytest.raises(WorkerError, match="probe rank 1 of 2 in fail: its process died"):
        groups[0].fail(str(tmp_path / "death"))

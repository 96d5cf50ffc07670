"""A start: seconds of its parts, the order in which engines and ranks take GPUs, and their room beside each other."""

import os
import re
import subprocess
import sys

import pytest

from verl.config.loading import load_config
from verl.config.records import ConfigError
from verl.trainer import worker_groups
from verl.trainer.worker_groups import GB, Laps, Place, build_workers, check_room, load_in_turn
from verl.workers.rollout import CPU_ENVIRONMENT, GpuMemory


class FakeGroup:
    """A group of workers that notes what begins and ends; `faults` are raised by the calls of their names."""

    def __init__(self, name, notes, memory=(), faults=()):
        self.name, self.notes, self.memories, self.faults = name, notes, iter(memory), dict(faults)

    def start(self, method, *arguments):
        self.notes.append(f"{self.name} begins {method}")

        def wait():
            if method in self.faults:
                raise self.faults[method]
            self.notes.append(f"{self.name} ends {method}")
            return [{"imports": 2.0, "engine": 3.0}, {"imports": 1.0, "engine": 4.0}]

        return wait

    def run_on(self, rank, method):
        return f"host of rank {rank}", 1234

    def load(self, *address):
        assert address == ("host of rank 0", 1234)
        self.start("load")()

    def memory(self):
        self.notes.append(f"{self.name} tells its memory")
        return next(self.memories)


def gpu(free, at_start=79, share=40):
    return GpuMemory(free * GB, at_start * GB, share * GB)


def test_a_start_is_told_by_its_parts(monkeypatch):
    """From 100 to 103.4, 109 and 110.6 s of the clock."""
    laps, clock = Laps(100.0), iter((103.4, 109.0, 110.6))
    monkeypatch.setattr("verl.trainer.worker_groups.time.time", lambda: next(clock))
    laps.mark("checks")
    laps.mark("engines", [{"imports": 2.2, "engine": 3.0}, {"imports": 1.0, "engine": 4.4}])
    laps.mark("probe", [])
    assert str(laps) == "Started in 11 s: checks 3, engines 6 (imports 2, engine 4), probe 2"


def test_libraries_are_quiet_unless_the_environment_says_otherwise(monkeypatch):
    monkeypatch.setattr("verl.distributed.single_controller.ResourcePool", lambda *_: None)
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    config = load_config(["data.train_files=owner/name", "data.val_files=owner/name"])
    shared = worker_groups.find_place(config, "cpu").shared
    assert (shared["VLLM_LOGGING_LEVEL"], shared["TRANSFORMERS_VERBOSITY"]) == ("ERROR", "info")


def test_ranks_read_while_engines_load_and_take_the_gpus_when_these_sleep():
    notes, laps = [], Laps()
    rollout = FakeGroup("rollout", notes, [[[gpu(76), gpu(76)], [gpu(76)]], [[gpu(50), gpu(50)], [gpu(50)]]])
    load_in_turn(FakeGroup("actor", notes), rollout, 0.5, laps)
    assert notes == [
        "actor begins read",
        "rollout begins load",
        "actor ends read",
        "rollout ends load",
        "rollout tells its memory",
        "actor begins load",
        "actor ends load",
        "rollout tells its memory",
    ]
    assert re.search(r"engines and reading \d+ \(imports 2, engine 4\), ranks \d+$", str(laps))


def test_an_engine_on_a_cpu_starts_with_its_environment(monkeypatch):
    """Torch reads its own as it is imported, which is before the engine's class can set any."""
    made = []

    class Group(FakeGroup):
        def __init__(self, _, spec, **__):
            super().__init__(spec.name, [])
            made.append((spec.name, spec.env))

    monkeypatch.setattr("verl.distributed.single_controller.WorkerGroup", Group)
    monkeypatch.setattr("verl.trainer.engine_arguments.rollout_arguments", lambda *_: {})
    monkeypatch.setattr(worker_groups, "find_place", lambda *_: Place(None, {"A": "1"}, {"OMP_NUM_THREADS": "2"}))
    config = load_config(["data.train_files=owner/name", "data.val_files=owner/name"])
    ranks, engines = build_workers(config, "cpu", None, 1)
    assert ranks.called == [engines]
    of_ranks = {"A": "1", "OMP_NUM_THREADS": "2"}
    assert made == [("actor", of_ranks), ("rollout", of_ranks | CPU_ENVIRONMENT)]
    code = "import verl.workers.rollout, torch._dynamo; torch.compile(torch.sin)(torch.ones(1))"
    code += "; print(torch._dynamo.utils.counters['frames'])"
    environment = os.environ | CPU_ENVIRONMENT
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["Counter()"]


@pytest.mark.parametrize(("failing", "method"), [("actor", "read"), ("rollout", "load"), ("actor", "load")])
def test_the_error_of_what_fails_is_the_run_s(failing, method):
    notes, fault = [], RuntimeError("of its own")
    groups = {
        name: FakeGroup(name, notes, [[[gpu(76)]]], {method: fault} if name == failing else ())
        for name in ("actor", "rollout")
    }
    with pytest.raises(RuntimeError, match="of its own"):
        load_in_turn(groups["actor"], groups["rollout"], 0.5, Laps())
    assert ("actor begins load" in notes) == (method == "load" and failing == "actor")


def test_an_engine_has_room_for_its_share_as_if_it_started_beside_the_rank():
    """Of 79 GiB free at its start 3 are kept asleep; a rank that takes 39 leaves 40, one byte more is too much."""
    check_room([gpu(76)], [gpu(37)], 0.5)
    with pytest.raises(ConfigError):
        check_room([gpu(76)], [gpu(37)._replace(free=37 * GB - 1)], 0.5)


def test_a_share_that_does_not_fit_is_named_with_the_one_that_does():
    """The fuller GPU's rank takes 47 of 79 GiB: 32 remain, of which 0.4 of the GPU is the share."""
    with pytest.raises(ConfigError) as raised:
        check_room([gpu(76), gpu(76)], [gpu(37), gpu(29)], 0.5)
    assert raised.value.faults == [
        "worker.rollout.gpu_memory_utilization = 0.5: the engine's share is 40.0 GiB, and beside the rank's 47.0 its "
        "GPU has room for 32.0; lower it to 0.4, or let the rank hold less with "
        "worker.actor.offload.offload_optimizer=true and its like"
    ]

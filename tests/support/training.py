"""Starts real training runs on the toy model, small enough for a test: real Ray, FSDP2 ranks on gloo, vLLM."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from verl.distributed.watchdog import FILE_VARIABLE

ROOT = Path(__file__).parents[2]
SMALL = [
    "data.rollout_batch_size=8",
    "data.val_batch_size=-1",
    "data.max_response_length=160",
    "worker.rollout.n=4",
    "worker.actor.global_batch_size=4",
    "worker.reward.num_processes=1",
    "trainer.logger=[file]",
    "trainer.val_before_train=false",
    "trainer.val_freq=-1",
    "trainer.save_freq=1",
    "trainer.save_limit=-1",
]

HOLDER = """
import sys
from pathlib import Path
from verl.trainer.saver import lock_folder
lock_folder(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""
"""Program that holds a run's folder until its input ends."""


@contextmanager
def two_nodes(cpus: int = 2) -> Iterator[Any]:
    """A Ray cluster of two nodes on this machine, with room for one rank and its engine on each."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus, "include_dashboard": False})
    try:
        nodes.second = nodes.add_node(num_cpus=cpus)  # type: ignore[attr-defined]
        yield nodes
    finally:
        nodes.shutdown()


def make_data(folder: Path, num_train: int = 64, num_val: int = 16) -> None:
    command = [sys.executable, "-m", "spatialthinker.synthetic", "--out", str(folder), "--seed", "3"]
    subprocess.run([*command, "--train", str(num_train), "--val", str(num_val)], cwd=ROOT, check=True)


def arguments(data: Path, run: Path, *overrides: str) -> list[str]:
    """Of a small run on the toy model; the last ones count."""
    files = [f"data.train_files={data}@train", f"data.val_files={data}@val"]
    return ["config=configs/toy_cpu.yaml", *files, f"trainer.save_checkpoint_path={run}", *SMALL, *overrides]


def start(data: Path, run: Path, *overrides: str, script: str = "", address: str | None = None) -> subprocess.Popen:
    """A training run in a process group of its own, started by a recipe's script if one is named.

    Its output goes to `run`.log; `address` is of a Ray cluster.
    """
    log = run.with_suffix(".log").open("a")
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"RAY_ADDRESS": address} if address else {}
    python_first = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    return subprocess.Popen(
        [
            *(["bash", script] if script else [sys.executable, "-m", "verl.trainer.main"]),
            *arguments(data, run, *overrides),
        ],
        cwd=ROOT,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment | {"PYTHONUNBUFFERED": "1", "PATH": python_first},
        start_new_session=True,
    )


def finish(process: subprocess.Popen, run: Path, timeout_s: float = 300, code: int = 0) -> str:
    """The output of a run that must end with `code`."""
    try:
        process.wait(timeout_s)
    finally:
        kill(process)
    output = run.with_suffix(".log").read_text()
    assert process.returncode == code, output[-6000:]
    return output


def wait_for(condition, process: subprocess.Popen, what: str, timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, f"the run ended before {what}"
        assert time.monotonic() < deadline, f"no {what} after {timeout_s} s"
        time.sleep(0.2)


def descendants(process: subprocess.Popen) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def wait_for_ends(processes: list[psutil.Process], timeout_s: float = 30) -> None:
    """Passes when all have ended; those that nobody has reaped have, too."""
    deadline = time.monotonic() + timeout_s
    while left := [each for each in processes if _is_at_work(each)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def _is_at_work(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def find_worker(process: subprocess.Popen, name: str, rank: int) -> psutil.Process:
    """The process of one of a run's actors, which its watchdog's file names."""
    for child in descendants(process):
        with suppress(psutil.NoSuchProcess):
            file = child.environ().get(FILE_VARIABLE, "")
            if Path(file).name == f"{name}_rank_{rank}.txt" and child.cmdline()[0].startswith("ray::"):
                return child
    raise AssertionError(f"no process of {name} rank {rank}")


def kill(process: subprocess.Popen) -> None:
    """kill -9 of the run and everything that it started."""
    for child in descendants(process):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            pass
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def metrics(run: Path) -> dict[int, dict[str, float]]:
    lines = (run / "experiment_log.jsonl").read_text().splitlines()
    return {line["step"]: line for line in map(json.loads, lines)}


def learned(row: dict[str, float]) -> dict[str, float]:
    """Metrics that must repeat exactly: all but times, speeds and memory, what a recording missed, and checks.

    Checks compare a step with the ones before, of which a killed run may have lost the last.
    """
    varying = ("timing_", "perf/", "recording/", "checks/")
    return {key: value for key, value in row.items() if not key.startswith(varying)}

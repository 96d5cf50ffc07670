"""Training over two hosts: the numbers of one, resumed on either, and killed in every part.

Hosts are namespaces of this machine (tests/support/hosts.py). `KILLS=20 pytest -m nightly tests/e2e/test_two_hosts.py`
sets how many kills there are.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hosts import Host, find_lack, start_ray, stop_ray, two_hosts, wait_until
from tests.support.training import arguments, finish, learned, make_data, metrics, start

LACK = find_lack()
pytestmark = [pytest.mark.e2e, pytest.mark.nightly, pytest.mark.skipif(bool(LACK), reason=LACK)]

SMALL = [
    "data.rollout_batch_size=4",
    "data.max_response_length=48",
    "worker.rollout.n=2",
    "worker.actor.global_batch_size=4",
]
OVER_BOTH = ["trainer.nnodes=2", "trainer.n_gpus_per_node=1"]
LIMIT_S = 90
NUM_KILLS = int(os.environ.get("KILLS", "20"))
KILLS_OF_A_TEST = 4
KINDS = ("actor", "rollout", "raylet", "driver")

Pair = tuple[Host, Host]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return folder


@pytest.fixture
def hosts(tmp_path) -> Iterator[Pair]:
    with two_hosts(tmp_path) as pair:
        start_ray(pair)
        yield pair


def start_over_both(hosts: Pair, data: Path, run: Path, *overrides: str) -> subprocess.Popen:
    words = arguments(data, run, *SMALL, *OVER_BOTH, *overrides)
    return hosts[0].start(["python", "-m", "verl.trainer.main", *words], run.with_suffix(".log"))


def saved(run: Path) -> int:
    """The newest step that is saved."""
    return max((int(path.parent.name.split("_")[-1]) for path in run.glob("global_step_*/manifest.json")), default=0)


def first_step(run: Path, other: Path) -> Path:
    """A copy of a run as it was after its first step."""
    shutil.copytree(run, other)
    for folder in other.glob("global_step_*"):
        if folder.name != "global_step_1":
            shutil.rmtree(folder)
    return other


def test_two_hosts_give_the_numbers_of_one_and_each_goes_on_from_the_other(hosts, data, tmp_path):
    one, both = tmp_path / "one", tmp_path / "both"
    steps = "trainer.max_steps=2"
    finish(start(data, one, *SMALL, steps), one)
    finish(start_over_both(hosts, data, both, steps), both)
    expected, found = metrics(one), metrics(both)
    assert sorted(found) == sorted(expected) == [1, 2]
    for step in (1, 2):
        assert learned(found[step]) == learned(expected[step])
    here, there = first_step(both, tmp_path / "here"), first_step(one, tmp_path / "there")
    assert "Resumed step 1" in finish(start(data, here, *SMALL, steps), here)
    assert "Resumed step 1" in finish(start_over_both(hosts, data, there, steps), there)
    assert learned(metrics(here)[2]) == learned(metrics(there)[2]) == learned(expected[2])
    stop_ray(hosts)


@pytest.mark.parametrize("part", range(-(-NUM_KILLS // KILLS_OF_A_TEST)))
def test_whatever_is_killed_the_run_ends_with_its_name_and_goes_on(hosts, data, tmp_path, part):
    """Each kill is at a random moment after a new checkpoint, from which the next start of the command goes on."""
    rng = random.Random(part)
    run, note = tmp_path / "run", ""
    first = part * KILLS_OF_A_TEST
    for number in range(first, min(first + KILLS_OF_A_TEST, NUM_KILLS)):
        kind, where = KINDS[number % len(KINDS)], hosts[rng.randrange(2)]
        before = saved(run)
        log = run.with_suffix(".log")
        begin = log.stat().st_size if log.is_file() else 0
        process = start_over_both(hosts, data, run, "trainer.max_steps=1000", "trainer.save_limit=2")
        wait_until(
            lambda before=before, process=process: saved(run) > before or process.poll() is not None,
            f"no checkpoint after step {before}",
            lambda log=log: log.read_text()[-3000:],
            timeout_s=240,
        )
        text = read_from(log, begin)
        assert process.poll() is None, text[-3000:]
        assert not before or re.search(rf"Resumed step \d+ of 1000 from {run}", text), text[-3000:]
        assert re.search(note, text), text[-3000:]
        time.sleep(rng.random() * 8)
        note = kill_one(hosts, kind, where, process, log)
        check_rest(hosts, kind)
        print(f"kill {number}: {kind} on {where.name} after step {saved(run)}: {note or 'told at once'}", flush=True)
        if kind == "raylet":
            stop_ray(hosts)
            start_ray(hosts)
    stop_ray(hosts)


def kill_one(hosts: Pair, kind: str, where: Host, process: subprocess.Popen, log: Path) -> str:
    """Kills a process and waits for the end of the run and its message; what the next start must say, if not that."""
    begin = log.stat().st_size
    if kind == "driver":
        driver = hosts[0].find("python -m verl.trainer.main")
        inner = (Path("/proc") / str(driver.pid) / "status").read_text()
        own = re.search(r"NSpid:.*\s(\d+)", inner)
        assert own is not None
        driver.kill()
        process.wait(LIMIT_S)
        return f"trainer process {own[1]} of left, since .*, was killed: it left "
    victim = where.find("raylet/raylet") if kind == "raylet" else next(iter_workers(where, kind))
    victim.send_signal(signal.SIGKILL)
    code = process.wait(LIMIT_S)
    text = read_from(log, begin)
    assert code == 2 or kind == "raylet" and code != 0, text[-3000:]
    assert where.address in text or where.name in text, text[-3000:]
    role = "actor|rollout|raylet" if kind == "raylet" else kind
    assert re.search(rf"({role}).*(died|gone|failed)", text, re.DOTALL), text[-3000:]
    return ""


def read_from(log: Path, begin: int) -> str:
    return log.read_bytes()[begin:].decode(errors="replace")


def iter_workers(host: Host, kind: str):
    return (worker for name, worker in host.workers().items() if name.startswith(kind))


def check_rest(hosts: Pair, kind: str) -> None:
    """Asserts that ranks, engines and the driver have ended on both hosts."""
    for host in hosts:
        wait_until(lambda host=host: not host.workers(), f"workers on {host.name}", host.workers, LIMIT_S)
        trainers = [each for each in host.processes() if "verl.trainer.main" in " ".join(each.cmdline())]
        assert trainers == [], (host.name, kind)

"""Training over two hosts: the numbers of one, resumed on either, and killed, cut off or out of room in every part.

Hosts are namespaces of this machine (tests/support/hosts.py). `KILLS=20 pytest -m nightly tests/e2e/test_two_hosts.py`
sets how many kills there are.
"""

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support.hosts import (
    TEMPORARY,
    Host,
    connect,
    disconnect,
    find_lack,
    start_ray,
    stop_ray,
    two_hosts,
    wait_until,
)
from tests.support.training import arguments, learned, make_data, metrics, start, two_nodes
from tests.support.training import finish as finish_within
from verl.distributed import checkpoint

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
START_LIMIT_S = 900
"""Of what a busy machine makes slow and nobody waits for."""
NUM_KILLS = int(os.environ.get("KILLS", "20"))
KILLS_OF_A_TEST = 10
KINDS = ("actor", "rollout", "raylet", "driver")
MOMENTS = ("start", "step", "save")
START_S, STEP_S = 12.0, 6.0
"""Kills are within so many seconds after the first process of the run, or after a checkpoint."""
HOUR_S = 3600
ENDLESS = ("trainer.max_steps=1000", "trainer.save_limit=2")

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


def finish(process: subprocess.Popen, run: Path) -> str:
    return finish_within(process, run, START_LIMIT_S)


def saved(run: Path) -> int:
    """The newest step that is saved."""
    return max(
        (step for step, folder in checkpoint.step_folders(run) if (folder / "manifest.json").is_file()), default=0
    )


def first_step(run: Path, other: Path) -> Path:
    """A copy of a run as it was after its first step."""
    shutil.copytree(run, other)
    for folder in other.glob("global_step_*"):
        if folder.name != "global_step_1":
            shutil.rmtree(folder)
    return other


def newest_log(run: Path, begin: int = 0) -> str:
    """Text of the run's log from a place on."""
    log = run.with_suffix(".log")
    return log.read_bytes()[begin:].decode(errors="replace") if log.is_file() else ""


def size(run: Path) -> int:
    """Of the run's log."""
    log = run.with_suffix(".log")
    return log.stat().st_size if log.is_file() else 0


def await_checkpoint(process: subprocess.Popen, run: Path, before: int) -> None:
    """Waits until the run has saved a step after `before`."""
    wait_until(
        lambda: saved(run) > before or process.poll() is not None,
        f"no checkpoint after step {before}",
        lambda: newest_log(run)[-3000:],
        timeout_s=START_LIMIT_S,
    )
    assert process.poll() is None, newest_log(run)[-5000:]


def end(process: subprocess.Popen, run: Path, begin: int) -> tuple[int, str, float]:
    """Code of a run that must end within LIMIT_S, what it has written since `begin`, and the seconds that it took."""
    since = time.monotonic()
    try:
        code = process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"no end within {LIMIT_S} s: {newest_log(run, begin)[-5000:]}") from None
    return code, newest_log(run, begin), time.monotonic() - since


def test_two_hosts_give_the_numbers_of_one_and_each_goes_on_from_the_other(data, tmp_path):
    """The clock of the second is an hour ahead, which is said and changes nothing.

    The one host has two Ray nodes: on a CPU the ranks of a machine share an engine, and samples depend on how many
    engines there are.
    """
    one, both = tmp_path / "one", tmp_path / "both"
    here, there = tmp_path / "here", tmp_path / "there"
    steps = "trainer.max_steps=2"
    with two_hosts(tmp_path, HOUR_S) as hosts:
        start_ray(hosts)
        told = finish(start_over_both(hosts, data, both, steps), both)
        assert re.search(rf"Warning: right \({hosts[1].address}\): its clock is 36\d\d s ahead of that of left", told)
        with two_nodes() as cluster:
            finish(start(data, one, *SMALL, *OVER_BOTH, steps, address=cluster.address), one)
            expected, found = metrics(one), metrics(both)
            assert sorted(found) == sorted(expected) == [1, 2]
            for step in (1, 2):
                assert learned(found[step]) == learned(expected[step])
            first_step(both, here)
            told = finish(start(data, here, *SMALL, *OVER_BOTH, steps, address=cluster.address), here)
            assert "Resumed step 1" in told and learned(metrics(here)[2]) == learned(expected[2])
        told = finish(start_over_both(hosts, data, first_step(one, there), steps), there)
        assert "Resumed step 1" in told and learned(metrics(there)[2]) == learned(expected[2])
        stop_ray(hosts)


@pytest.mark.parametrize("part", range(-(-NUM_KILLS // KILLS_OF_A_TEST)))
def test_whatever_is_killed_the_run_ends_with_its_name_and_goes_on(hosts, data, tmp_path, part):
    """Each kill is at a random moment of the start, of a step or of a save; the next start of the command goes on."""
    rng = random.Random(part)
    run, note = tmp_path / "run", ""
    first = part * KILLS_OF_A_TEST
    for number in range(first, min(first + KILLS_OF_A_TEST, NUM_KILLS)):
        kind, moment, where = KINDS[number % len(KINDS)], rng.choice(MOMENTS), hosts[rng.randrange(2)]
        before, begin = saved(run), size(run)
        process = start_over_both(hosts, data, run, *ENDLESS)
        await_moment(hosts, moment, process, run, rng)
        text = newest_log(run, begin)
        assert process.poll() is None, text[-3000:]
        assert re.search(note, text), text[-3000:]
        if saved(run) > before > 0:
            assert f"Resumed step {before} of 1000 from {run}" in text, text[-3000:]
        note, seconds, told = kill_one(hosts, kind, where, process, run)
        rest_s = await_rest(hosts)
        print(
            f"kill {number}: {kind} on {where.name}, {moment} after step {saved(run)}: end after {seconds:.1f} s, the "
            f"rest after {rest_s:.1f} s more: {told}",
            flush=True,
        )
        if kind == "raylet":
            stop_ray(hosts)
            start_ray(hosts)
    before, begin = saved(run), size(run)
    process = start_over_both(hosts, data, run, *ENDLESS)
    await_checkpoint(process, run, before)
    text = newest_log(run, begin)
    assert re.search(note, text) and (not before or f"Resumed step {before} of 1000" in text), text[-3000:]
    hosts[0].find("python -m verl.trainer.main").send_signal(signal.SIGTERM)
    process.wait(LIMIT_S)
    stop_ray(hosts)


def await_moment(hosts: Pair, moment: str, process: subprocess.Popen, run: Path, rng: random.Random) -> None:
    """Waits for a random time in the start of the run, in a step of it, or while a checkpoint is written."""
    if moment == "start":
        roles = ("actor_rank_", "rollout_rank_")
        wait_until(
            lambda: (
                all(any(name.startswith(role) for name in host.workers()) for host in hosts for role in roles)
                or process.poll() is not None
            ),
            "no ranks and engines",
            lambda: newest_log(run)[-3000:],
            timeout_s=START_LIMIT_S,
        )
        time.sleep(rng.random() * START_S)
        return
    await_checkpoint(process, run, saved(run))
    if moment == "step":
        time.sleep(rng.random() * STEP_S)
        return
    deadline = time.monotonic() + LIMIT_S
    while not list(run.glob("*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert time.monotonic() < deadline, newest_log(run)[-3000:]


def kill_one(hosts: Pair, kind: str, where: Host, process: subprocess.Popen, run: Path) -> tuple[str, float, str]:
    """Kills a process and waits for the end of the run and its message.

    Returns:
        A pattern of what the next start must say, the seconds until the end, and what was said.
    """
    begin = size(run)
    if kind == "driver":
        driver = hosts[0].find("python -m verl.trainer.main")
        own = re.search(r"NSpid:.*\s(\d+)", (Path("/proc") / str(driver.pid) / "status").read_text())
        assert own is not None
        driver.kill()
        _, _, seconds = end(process, run, begin)
        note = f"trainer process {own[1]} of left, since .*, was killed: it left "
        return note, seconds, "by the next start"
    if kind == "raylet":
        victim = where.find("raylet/raylet")
    else:
        victim = next(worker for name, worker in where.workers().items() if name.startswith(kind))
    victim.send_signal(signal.SIGKILL)
    code, text, seconds = end(process, run, begin)
    assert code == 2 or kind == "raylet" and code != 0, text[-5000:]
    role = "actor|rollout|raylet" if kind == "raylet" else kind
    told = re.search(rf"^.*({role}).*on {where.name} \({where.address}\).*(died|gone|failed).*$", text, re.MULTILINE)
    assert told is not None, text[-5000:]
    return "", seconds, told[0][:200]


OF_RAY = re.compile(r"^ray::(IDLE|\w+Agent)|site-packages/ray/|raylet| -m ray\.")


def await_rest(hosts: Sequence[Host]) -> float:
    """Seconds until all that the run started has ended on these hosts, at most LIMIT_S."""
    since = time.monotonic()

    def left() -> list[str]:
        found = [(process.pid, " ".join(commands(process))) for host in hosts for process in host.processes()]
        return [f"{pid} {words[:200]}" for pid, words in found if words and not OF_RAY.search(words)]

    wait_until(lambda: not left(), "processes of the run", left, LIMIT_S)
    return time.monotonic() - since


def commands(process: psutil.Process) -> list[str]:
    with suppress(psutil.NoSuchProcess):
        return process.cmdline()
    return []


def test_a_lost_network_ends_the_run_with_the_hosts_name_and_it_goes_on(hosts, data, tmp_path):
    """Nobody can tell the processes of the host that is cut off; they end once it can be reached again."""
    run = tmp_path / "run"
    process = start_over_both(hosts, data, run, *ENDLESS)
    await_checkpoint(process, run, 0)
    begin = size(run)
    disconnect(hosts[1])
    code, text, seconds = end(process, run, begin)
    assert code == 2, text[-5000:]
    told = re.search(rf"^Error: .*on right \({hosts[1].address}\).*its process died.*$", text, re.MULTILINE)
    assert told is not None, text[-5000:]
    rest_s = await_rest(hosts[:1])
    print(f"network: end after {seconds:.1f} s, the rest after {rest_s:.1f} s more: {told[0][:300]}", flush=True)
    connect(hosts[1])
    print(f"network: the rest on right {await_rest(hosts):.1f} s after the link is back", flush=True)
    stop_ray(hosts)
    start_ray(hosts)
    before, begin = saved(run), size(run)
    process = start_over_both(hosts, data, run, *ENDLESS)
    await_checkpoint(process, run, before)
    assert f"Resumed step {before} of 1000" in newest_log(run, begin)


def test_a_full_disk_on_one_host_is_named_at_the_start_and_at_a_save(hosts, data, tmp_path):
    """At the start the host's own disk is full; at a save its rank cannot write a file of more than 100 kB.

    Without a byte left no process of Ray's can say why it ends; with half a MiB one can.
    """
    right, run = hosts[1], tmp_path / "run"
    filling = f"{TEMPORARY}/filling"
    right.run("dd", "if=/dev/zero", f"of={filling}", "bs=64K", check=False)
    full = f"Ray's and temporary files: nothing can be written to {TEMPORARY} (No space left"
    for left_free, words in ((0, "make room on the disk of Ray's folder there"), (512 * 1024, full)):
        right.run("truncate", f"--size=-{left_free}", filling)
        begin = size(run)
        process = start_over_both(hosts, data, run, *ENDLESS)
        code, text, _ = end(process, run, begin)
        told = re.search(rf"^  - right \({right.address}\): .*$", text, re.MULTILINE)
        assert code == 2 and told and words in told[0], text[-5000:]
        print(told[0])
    right.run("rm", filling)
    process = start_over_both(hosts, data, run, *ENDLESS)
    await_checkpoint(process, run, 0)
    begin = size(run)
    rank = next(worker for name, worker in right.workers().items() if name.startswith("actor_rank_"))
    resource.prlimit(rank.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    code, text, _ = end(process, run, begin)
    assert code == 2 and re.search(r"the checkpoint of step \d+ could not be written .*on right: ", text), text[-5000:]
    assert str(checkpoint.find_latest(run)) in text

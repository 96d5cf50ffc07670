"""Two hosts on one machine: network, UTS, PID and mount namespaces joined by a veth pair, a Ray node on each.

Each has its own name, address, /etc/hosts, /dev/shm and disk for Ray and temporary files; all other files are
shared. Root, util-linux and iproute2 are needed, and a C compiler where the second has a clock of its own.
"""

import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from verl.distributed.watchdog import FILE_VARIABLE

ROOT = Path(__file__).parents[2]
NAMES = ("left", "right")
NETWORK = "10.77.0"
PORT = 6379
TOOLS = ("unshare", "setpriv", "nsenter", "ip", "ss", "cc")
NAMESPACES = ("--net", "--uts", "--pid", "--mount")
OBJECT_STORE_BYTES = 300_000_000
START_ATTEMPTS = 4
TEMPORARY = "/var/tmp"
"""Folder for Ray and temporary files; each host has a disk of its own there."""
TEMPORARY_MB = 256

CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
int clock_gettime(clockid_t id, struct timespec *at) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(id, at);
    if (!failed && id == CLOCK_REALTIME) at->tv_sec += GAP_S;
    return failed;
}
time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
int gettimeofday(struct timeval *at, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}
"""
"""Library that moves the clock of programs that load it; no namespace does."""

INIT = """
import signal, subprocess, sys
name, folder, temporary, size = sys.argv[1:]
for command in (
    ["hostname", name],
    ["mount", "--bind", folder + "/hosts", "/etc/hosts"],
    ["mount", "--bind", "/dev/null", "/etc/resolv.conf"],
    ["mount", "-t", "tmpfs", "tmpfs", "/dev/shm"],
    ["mount", "-t", "tmpfs", "-o", "size=" + size, "tmpfs", temporary],
    ["ip", "link", "set", "lo", "up"],
):
    subprocess.run(command, check=True)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the dead whose parents are gone are nobody's zombies
print("ready", flush=True)
while True:
    signal.pause()
"""
"""Program of a host's process 1."""


def find_lack() -> str:
    """The reason why no hosts can be made here; empty where they can."""
    if os.geteuid() != 0:
        return "two hosts need root"
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"two hosts need {', '.join(missing)}"
    tried = subprocess.run(["unshare", *NAMESPACES, "--fork", "true"], capture_output=True, text=True)
    return f"no namespaces: {tried.stderr.strip()}" if tried.returncode else ""


@dataclass(frozen=True)
class Host:
    """One host.

    Attributes:
        init: process 1 of it, as the machine itself sees it.
        environment: of everything that starts there.
    """

    name: str
    address: str
    init: int
    environment: dict[str, str]

    def start(self, arguments: list[str], log: Path) -> subprocess.Popen:
        """Starts a program there, in the checkout, with its output appended to a file."""
        enter = ["nsenter", f"--target={self.init}", *NAMESPACES, f"--wd={ROOT}", "--", *arguments]
        with log.open("a") as output:
            return subprocess.Popen(
                enter, stdout=output, stderr=subprocess.STDOUT, env=self.environment, start_new_session=True
            )

    def run(self, *arguments: str, check: bool = True) -> str:
        """Output of a program there, which must end well."""
        enter = ["nsenter", f"--target={self.init}", *NAMESPACES, f"--wd={ROOT}", "--", *arguments]
        done = subprocess.run(enter, capture_output=True, text=True, env=self.environment, timeout=180)
        assert not check or done.returncode == 0, f"{arguments} on {self.name}: {done.stdout}{done.stderr}"
        return done.stdout

    def processes(self) -> list[psutil.Process]:
        """Processes that live there beside process 1; the dead that wait for their parents do not count."""
        space = os.readlink(f"/proc/{self.init}/ns/pid")
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, OSError):
                is_here = process.pid != self.init and os.readlink(f"/proc/{process.pid}/ns/pid") == space
                if is_here and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def find(self, text: str) -> psutil.Process:
        """The process there whose command line has these words."""
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                if text in " ".join(process.cmdline()):
                    return process
        raise AssertionError(f"no {text} on {self.name}")

    def workers(self) -> dict[str, psutil.Process]:
        """The run's ranks and engines there by name, such as actor_rank_1."""
        found = {}
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                file = process.environ().get(FILE_VARIABLE, "")
                if file and process.cmdline()[0].startswith("ray::"):
                    found[Path(file).stem] = process
        return found

    def sockets(self) -> list[str]:
        """Sockets that listen there."""
        return self.run("ss", "--no-header", "--listening", "--tcp", "--udp", "--numeric").splitlines()

    def shared_memory(self) -> list[str]:
        """Segments in /dev/shm there."""
        return self.run("ls", "/dev/shm").split()


@contextmanager
def two_hosts(folder: Path, clock_gap_s: int = 0) -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other and nothing else; all that runs there ends with them.

    Args:
        folder: for what each has of its own.
        clock_gap_s: by which the second's clock is ahead.
    """
    table = "".join(f"{NETWORK}.{number} {name}\n" for number, name in enumerate(NAMES, 1))
    token = secrets.token_hex(32)
    keepers: list[subprocess.Popen] = []
    hosts: list[Host] = []
    try:
        for number, name in enumerate(NAMES, 1):
            own = folder / name
            own.mkdir(parents=True)
            (own / "hosts").write_text(f"127.0.0.1 localhost\n{table}")
            command = ["setpriv", "--pdeathsig", "KILL"]  # a test that is killed leaves no host
            command += ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc"]
            command += [sys.executable, "-c", INIT, name, str(own), TEMPORARY, f"{TEMPORARY_MB}m"]
            keepers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True))
            output = keepers[-1].stdout
            assert output is not None and output.readline() == "ready\n"
            init = psutil.Process(keepers[-1].pid).children()[0].pid
            environment = _environment(folder, token)
            if clock_gap_s and number == len(NAMES):
                environment |= {"LD_PRELOAD": str(_build_clock(folder, clock_gap_s))}
            hosts.append(Host(name, f"{NETWORK}.{number}", init, environment))
        _join(*hosts)
        yield hosts[0], hosts[1]
    finally:
        for keeper in keepers:
            keeper.kill()
            keeper.wait()


def _environment(folder: Path, token: str) -> dict[str, str]:
    home, caches = (
        folder / "home",
        Path.home() / ".cache",
    )  # Ray keeps its token there; vLLM's caches save a start 30 s
    home.mkdir(exist_ok=True)
    # importing vLLM without its cached bytecode takes 20 s, in every process
    unwanted = ("RAY_", "PYTHONDONTWRITEBYTECODE")
    outer = {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}
    path = os.pathsep.join([str(Path(sys.executable).parent), outer["PATH"]])
    own = {"PATH": path, "HOME": str(home), "TMPDIR": TEMPORARY, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    own |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
    own |= {"XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(caches))}
    own |= {"RAY_worker_niceness": "0"}  # Ray's ranks and engines give way to all others, for 15 is its own choice
    return outer | own | {"RAY_ADDRESS": f"{NETWORK}.1:{PORT}"}


def _build_clock(folder: Path, gap_s: int) -> Path:
    library = folder / "clock.so"
    command = ["cc", "-shared", "-fPIC", f"-DGAP_S={gap_s}", "-x", "c", "-", "-o", str(library), "-ldl"]
    subprocess.run(command, input=CLOCK, text=True, check=True)
    return library


def _join(first: Host, second: Host) -> None:
    link = ["ip", "link", "add", "eth0", "netns", str(first.init), "type", "veth"]
    subprocess.run([*link, "peer", "name", "eth0", "netns", str(second.init)], check=True)
    for host in (first, second):
        host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
        connect(host)


def connect(host: Host) -> None:
    """Sets the host's link up."""
    (other,) = {f"{NETWORK}.{number}" for number in (1, 2)} - {host.address}
    host.run("ip", "link", "set", "eth0", "up")
    host.run("ip", "route", "add", "default", "via", other)  # programs ask which address leads out


def disconnect(host: Host) -> None:
    """Sets the host's link down: what is sent is lost, and nobody is told."""
    host.run("ip", "link", "set", "eth0", "down")


def start_ray(hosts: tuple[Host, Host], cpus: int = 2) -> None:
    """A Ray cluster over both, with room for one rank and its engine on each."""
    first = hosts[0]
    for host in hosts:
        place = ["--head", f"--port={PORT}", "--include-dashboard=false"] if host is first else []
        place = place or [f"--address={first.address}:{PORT}"]
        limits = [f"--num-cpus={cpus}", f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats"]
        for attempt in range(START_ATTEMPTS):  # a node has 30 s, which is little on a busy machine
            is_last = attempt == START_ATTEMPTS - 1
            told = host.run("ray", "start", *place, f"--node-ip-address={host.address}", *limits, check=is_last)
            if "Ray runtime started" in told:
                break
            host.run("ray", "stop", "--force", check=False)


def stop_ray(hosts: tuple[Host, Host]) -> None:
    """Ends the cluster, as its user does; asserts that nothing of it is left."""
    for host in hosts:
        host.run("ray", "stop", "--force", check=False)
    for host in hosts:
        wait_until(lambda host=host: not host.processes(), f"processes on {host.name}", host.processes)
        assert host.sockets() == [], host.name
        assert host.shared_memory() == [], host.name


def wait_until(condition, what: str, show=lambda: "", timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} after {timeout_s:g} s: {show()}"
        time.sleep(0.3)

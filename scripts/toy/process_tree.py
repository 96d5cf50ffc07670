"""Memory of a tree of processes, and the end of processes that a killed run left behind.

psutil measures and kills them; what it cannot tell is whose run a daemon belongs to that outlived its parents, as
Ray's do. A mark in the environment tells.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress

import psutil

BYTES_PER_GB = 1024**3
OWNER_VARIABLE = "SPATIALTHINKER_RUN"


def owned_environment(owner: str) -> dict[str, str]:
    """Returns the variables that mark a process and all its descendants as `owner`'s.

    SPT_NOENV keeps setproctitle (Ray's workers, vLLM) from overwriting the memory that /proc/PID/environ shows.
    """
    return {OWNER_VARIABLE: owner, "SPT_NOENV": "1"}


def find_owned(owner: str) -> list[psutil.Process]:
    """Returns the living processes that carry `owner`'s mark, and their descendants, this process left out."""
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(OWNER_VARIABLE) == owner:
                found.update((process, *process.children(recursive=True)))
    return list(found - {psutil.Process(), *psutil.Process().parents()})


def is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def kill_owned(owner: str) -> int:
    """Kills what `find_owned` finds and returns how many processes that were.

    Repeats until nothing is left, since a daemon may start a worker before its own end.
    """
    killed: set[int] = set()
    for _ in range(5):
        if not (processes := find_owned(owner)):
            break
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
                killed.add(process.pid)
        # Read only: psutil.wait_procs would take a child's exit status away from its subprocess.Popen.
        deadline = time.monotonic() + 5
        while any(map(is_alive, processes)) and time.monotonic() < deadline:
            time.sleep(0.01)
    return len(killed)


def read_tree_bytes(root: psutil.Process) -> int:
    """Returns the sum of PSS over `root` and its descendants: a page that k of them share counts 1/k in each."""
    total = 0
    with suppress(psutil.NoSuchProcess):
        for process in (root, *root.children(recursive=True)):
            with suppress(psutil.Error):
                memory = process.memory_full_info()
                total += getattr(memory, "pss", memory.rss)
    return total


class MemorySampler(threading.Thread):
    """Keeps the highest memory of this process and its descendants, sampled every `interval_s` seconds.

    `on_sample` is called with the peak after each sample, for a caller who wants it on disk.
    """

    def __init__(self, interval_s: float = 1.0, on_sample: Callable[[int], None] = lambda peak_bytes: None) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self._interval_s = interval_s
        self._on_sample = on_sample
        self._finished = threading.Event()

    def run(self) -> None:
        root = psutil.Process()
        while not self._finished.is_set():
            started = time.monotonic()
            self.peak_bytes = max(self.peak_bytes, read_tree_bytes(root))
            self._on_sample(self.peak_bytes)
            self._finished.wait(max(self._interval_s - (time.monotonic() - started), 0.1))

    def stop(self) -> None:
        self._finished.set()
        self.join()

"""Background process of the recording: it runs when nobody else wants the processor, and ends with its driver."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any

from spatialthinker.stop_signals import STOP_SIGNALS

LOWEST_PRIORITY = 19
POLL_S = 0.5


class BackgroundError(RuntimeError):
    """The process died or did not answer in time."""


class Background:
    """A process that calls functions, one at a time; started by the first call, and anew after it died.

    A process, since a thread of low priority would keep the interpreter's lock from the driver while it waits.

    Args:
        prepare: called there first, still at the usual priority, to import what is needed.
        limit_s: seconds that a call may take; beside busy ranks the lowest priority makes minutes of seconds.
    """

    def __init__(self, prepare: Callable[[], Any], limit_s: float = 1800.0):
        self.prepare, self.limit_s = prepare, limit_s
        self.pool: ProcessPoolExecutor | None = None
        self.is_closed = False

    def start(self) -> None:
        """Starts the process if there is none, without waiting for it."""
        if self.is_closed:
            raise BackgroundError("the process that records rollouts was ended")
        if self.pool is None:
            self.pool = ProcessPoolExecutor(
                1, multiprocessing.get_context("spawn"), initializer=_start_child, initargs=(self.prepare,)
            )
            self.pool.submit(os.getpid)

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """The result of the function in the process.

        Raises:
            BackgroundError: no result, for the process died or took too long.
        """
        self.start()
        assert self.pool is not None
        try:
            return self.pool.submit(function, *args).result(self.limit_s)
        except BrokenProcessPool as error:
            self._end()
            raise BackgroundError("the process that records rollouts died (out of memory?)") from error
        except TimeoutError as error:
            self._end()
            raise BackgroundError(f"rollouts were not recorded within {self.limit_s:g} s") from error

    def close(self) -> None:
        """Ends the process for good, whatever it does."""
        self.is_closed = True
        self._end()

    def _end(self) -> None:
        pool, self.pool = self.pool, None
        if pool is None:
            return
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            with suppress(OSError, ValueError):
                process.kill()


def _start_child(prepare: Callable[[], Any]) -> None:
    for signum in STOP_SIGNALS:  # they reach all processes; the driver handles them
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    from verl.trainer.recording import pictures, table  # noqa: F401

    prepare()
    with suppress(OSError):
        os.nice(LOWEST_PRIORITY)
    with suppress(OSError, AttributeError):  # a third of a per cent of a processor that others want, where there is it
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _end_with_parent(parent: int) -> None:
    """Ends this process soon after its driver, lest it writes into a folder where the next run is at work."""
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os._exit(1)

"""Ends of an evaluation before its last answer: batches, and signals, after which answers under way are waited for."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from spatialthinker.stop_signals import install_handler

STOP_WAIT_S = 25.0
"""Time that answers under way have after a signal; job systems kill after 30 s."""


class BatchPending(Exception):
    """A batch that was submitted or has not ended; the message names the next command."""


class Stopped(KeyboardInterrupt):
    """The end of a run that was asked to stop."""


class StopSignal:
    """Stop signals: while answers are under way the first asks for an end within STOP_WAIT_S.

    A second one, the end of that time, or any signal at another time raises Stopped.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._on_stop: Callable[[], None] | None = None

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, the shell's convention."""
        return 128 + (self.signum or signal.SIGINT)

    @contextmanager
    def handling(self) -> Iterator[None]:
        """Context with these signals handled, in the main thread alone."""
        before = self._install()
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    @contextmanager
    def asking(self, on_stop: Callable[[], None]) -> Iterator[None]:
        """Context in which the first signal calls `on_stop`, and the block ends by itself."""
        self._install()  # Ray has its own handlers by now
        self._on_stop = on_stop
        try:
            yield
        finally:
            self._on_stop = None
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _install(self) -> dict[int, Any]:
        if threading.current_thread() is not threading.main_thread():
            return {}
        alarm = signal.signal(signal.SIGALRM, self._handle)
        return {signal.SIGALRM: alarm, **install_handler(self._handle)}

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        is_first, self.signum = self.signum is None, self.signum or signum
        if not is_first or self._on_stop is None:
            raise Stopped
        signal.setitimer(signal.ITIMER_REAL, STOP_WAIT_S)
        self._on_stop()
        with suppress(OSError):
            os.write(2, f"\nstopping: answers under way have {STOP_WAIT_S:.0f} s; once more ends at once\n".encode())

"""Handling of stop signals that interrupts only where the training state is consistent."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import psutil

from spatialthinker.stop_signals import install_handler


class Interrupted(KeyboardInterrupt):
    """The run was interrupted; `exit_code` is 128 + signal, the shell convention."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class Interrupt:
    """Raises Interrupted inside `interruptible`, or at its next entry.

    SIGINT after that ends the process and all that it started at once, whatever they wait for. The others never do:
    job systems and their launchers send SIGTERM more than once, and SIGKILL when their patience ends.

    Args:
        describe_loss: words on what an end at once would lose.
    """

    def __init__(self, describe_loss: Callable[[], str]):
        self.describe_loss = describe_loss
        self.is_interruptible = False
        self.signum: int | None = None

    @contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Context with these signal handlers installed; main thread only."""
        previous = install_handler(self._handle_signal)
        try:
            yield
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Context that may be left anywhere without harm to the training state."""
        self.is_interruptible = True
        try:
            if self.signum is not None:
                raise Interrupted(self.signum)
            yield
        finally:
            self.is_interruptible = False

    def _handle_signal(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None:
            self.signum = signum
            _say("Stopping: the state is saved first; Ctrl-C (SIGINT) once more ends at once.")
            if self.is_interruptible:
                raise Interrupted(signum)
        elif signum == signal.SIGINT:
            _say(f"Ended at once: {self.describe_loss()}")
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)


def _say(text: str) -> None:
    """Writes a line past the streams, in which the signal may have interrupted a print."""
    with suppress(OSError):  # the reader of a pipe got the same signal
        os.write(2, f"\n{text}\n".encode())

"""SIGINT and SIGTERM handling that interrupts only where the training state is consistent."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """The run was interrupted; `exit_code` is 128 + signal, the shell convention."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class Interrupt:
    """Raises Interrupted inside `interruptible`, or at its next entry; a second signal kills the process."""

    def __init__(self):
        self.is_interruptible = False
        self.signum: int | None = None

    @contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Context with these signal handlers installed; main thread only."""
        previous = {signum: signal.signal(signum, self._handle_signal) for signum in SIGNALS}
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
        if self.signum is not None:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        self.signum = signum
        print("\nStopping: the state is saved first; once more ends at once.", flush=True)  # noqa: T201
        if self.is_interruptible:
            raise Interrupted(signum)

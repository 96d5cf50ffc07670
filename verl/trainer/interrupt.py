"""Ctrl-C and the scheduler's SIGTERM, answered only where the training state is whole."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """The run was asked to end; `exit_code` is 128 plus the signal, as shells count."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class Interrupt:
    """Raises Interrupted inside `allowed`, or at the next entry to it; a second signal ends the process at once."""

    def __init__(self):
        self.is_allowed = False
        self.signum: int | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Handles the signals meanwhile; main thread only."""
        before = {signum: signal.signal(signum, self._strike) for signum in SIGNALS}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """A span that may be left anywhere without harm to the training state."""
        self.is_allowed = True
        try:
            if self.signum is not None:
                raise Interrupted(self.signum)
            yield
        finally:
            self.is_allowed = False

    def _strike(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        self.signum = signum
        print("\nStopping: the state is saved first; once more ends at once.", flush=True)  # noqa: T201
        if self.is_allowed:
            raise Interrupted(signum)

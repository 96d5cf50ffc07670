"""Signals that ask a program to stop: Ctrl-C, SIGTERM of a job system, and SIGHUP of a terminal that was closed."""

import os
import signal
import stat
from collections.abc import Callable
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def install_handler(handler: Callable[[int, FrameType | None], Any]) -> dict[int, Any]:
    """Installs a handler of these signals and returns the handlers before; SIGHUP stays ignored under nohup."""

    def handle(signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGHUP:
            _leave_terminal()
        handler(signum, frame)

    heeded = [each for each in STOP_SIGNALS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]
    return {signum: signal.signal(signum, handle) for signum in heeded}


def _leave_terminal() -> None:
    """Sends further output to the terminal nowhere: writing to a closed one fails."""
    with open(os.devnull, "w") as nothing:
        for stream in (1, 2):
            if stat.S_ISCHR(os.fstat(stream).st_mode):
                os.dup2(nothing.fileno(), stream)

"""Watchdog: dumps the stacks of worker processes whose calls time out, to debug a hanging run.

Each worker arms faulthandler.dump_traceback_later around its calls; it needs no GIL, so hangs inside libraries show
too.
"""

import faulthandler
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

TIMEOUT_VARIABLE, FILE_VARIABLE = "VERL_WATCHDOG_TIMEOUT_S", "VERL_WATCHDOG_FILE"

_process: dict[str, Any] = {"is_armed": False, "file": None}


@dataclass(frozen=True)
class Watchdog:
    """Timeout of worker calls, and the folder for stack dumps."""

    timeout_s: float
    folder: Path

    @property
    def caller_timeout_s(self) -> float:
        """Timeout of the caller: longer, so that processes called slightly later can write their stacks too."""
        return self.timeout_s + max(2.0, 0.05 * self.timeout_s)

    def environment(self, name: str, rank: int) -> dict[str, str]:
        """Environment variables that arm the timer of a worker process."""
        return {TIMEOUT_VARIABLE: str(self.timeout_s), FILE_VARIABLE: str(self.folder / f"{name}_rank_{rank}.txt")}

    def describe_stacks(self) -> str:
        """Words on what the processes of a stalled call wrote."""
        if any(file.stat().st_size for file in self.folder.glob("*_rank_*.txt")):
            return f"the stacks of all processes at work are in {self.folder}"
        return "no process wrote its stack: it was stopped, had not begun, or runs on a machine with other folders"

    def remove_empty(self) -> None:
        """Removes the files of processes that never stalled."""
        for file in self.folder.glob("*_rank_*.txt"):
            if file.stat().st_size == 0:
                file.unlink()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()


def watched(method: Callable) -> Callable:
    """Wraps a method: arms the timer while it runs, if the environment enables it; nested calls are not timed."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        timeout_s = os.environ.get(TIMEOUT_VARIABLE)
        if timeout_s is None or _process["is_armed"]:
            return method(*args, **kwargs)
        _process["is_armed"] = True
        faulthandler.dump_traceback_later(float(timeout_s), file=_open_file())
        try:
            return method(*args, **kwargs)
        finally:
            faulthandler.cancel_dump_traceback_later()
            _process["is_armed"] = False

    return call


def _open_file() -> IO[str]:
    """The stack file of this process, kept open: faulthandler writes to its descriptor."""
    if _process["file"] is None:
        path = Path(os.environ[FILE_VARIABLE])
        path.parent.mkdir(parents=True, exist_ok=True)
        _process["file"] = path.open("w")
    return _process["file"]

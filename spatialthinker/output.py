"""Standard output: text of any language, whatever the terminal's encoding, and a reader that may go away."""

import io
import os
import signal
import sys


def print_any_text() -> None:
    """Lets standard output and error escape signs that their encoding lacks, such as Chinese ones in Latin-1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def report_closed_pipe(message: str) -> int:
    """Writes to standard error that the output's reader is gone, if it is not gone, too; returns the exit code."""
    with open(os.devnull, "w") as nothing:
        for stream, text in zip((sys.stdout, sys.stderr), ("", message + "\n"), strict=True):
            try:
                stream.write(text)
                stream.flush()
            except BrokenPipeError:  # else the interpreter would complain at its end
                os.dup2(nothing.fileno(), stream.fileno())
    return 128 + signal.SIGPIPE

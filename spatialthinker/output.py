"""Standard output: text of any language, whatever the terminal's encoding."""

import io
import sys


def print_any_text() -> None:
    """Lets standard output and error escape signs that their encoding lacks, such as Chinese ones in Latin-1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

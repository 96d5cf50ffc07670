"""The command line: open runs, serve the page or write it to a file."""

import argparse
import signal
import sys
import threading
import urllib.parse
from pathlib import Path

DEFAULT_PORT = 8640
EXPORTED_GROUPS = 40


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 0, or 2 after one message about what is wrong with its arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m verl.viewer", description="Show runs: curves, groups, rollouts with their boxes and rewards."
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run (a second one: compared)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; others than loopback open it")
    port_help = f"port, 0 for a free one (default: {DEFAULT_PORT})"
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help=port_help)
    parser.add_argument("--export", type=Path, metavar="FILE", help="write one self-contained page and end")
    where_help = "what to export, as the page's address states it: kind=train&step=12&odd=right_bad_boxes"
    parser.add_argument("--where", default="", metavar="FILTERS", help=where_help)
    limit_help = f"most groups to export (default: {EXPORTED_GROUPS})"
    parser.add_argument("--limit", type=int, default=EXPORTED_GROUPS, help=limit_help)
    args = parser.parse_args(argv)

    from verl.viewer.run import Run  # after --help: Arrow takes a while to load

    try:
        runs = [Run(path) for path in args.runs]
        for run in runs:
            run.refresh()
        if args.export:
            from verl.viewer.export import write_page

            query = dict(urllib.parse.parse_qsl(args.where, keep_blank_values=True, strict_parsing=bool(args.where)))
            _say(f"viewer: {write_page(args.export, runs, query, args.limit)}")
            return 0
        return _serve(runs, args.host, args.port)
    except (FileNotFoundError, ValueError) as error:
        _say(f"viewer: {error}", sys.stderr)
        return 2


def _serve(runs: list, host: str, port: int) -> int:
    from verl.viewer.server import Server

    if not 0 <= port < 2**16:
        raise ValueError(f"--port {port}: must be from 0 to {2**16 - 1}")
    try:
        server = Server(runs, host, port)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"{host}:{port} cannot be listened on: {reason}; --port 0 takes a free port") from error
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with server:
        for run in runs:
            threading.Thread(target=run.reader.read_ahead, args=(run.snapshot.files,), daemon=True).start()
        _say(f"viewer: {server.url}")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass
    return 0


def _say(text: str, file=None) -> None:
    (file or sys.stdout).write(f"{text}\n")
    (file or sys.stdout).flush()

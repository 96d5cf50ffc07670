"""The viewer's server: one page, its data as JSON, and images. It answers GET alone and changes nothing.

It is for this machine's own browser. Whoever can reach the address can read the run, so it listens on loopback unless
told otherwise; a request under a foreign host name is refused, since a page of another site may have a name of its
own lead here (DNS rebinding), and so is one that another site's page makes.
"""

import ipaddress
import socket
import sys
import urllib.parse
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.message import Message
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec

from verl.viewer.page_files import FILES, read_page_file
from verl.viewer.pictures import SIDES_PX
from verl.viewer.queries import (
    compare_runs,
    describe_run,
    find_groups,
    read_checks,
    read_metrics,
    show_prompt,
    show_rollout,
)
from verl.viewer.run import Run

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
MAX_TARGET_CHARACTERS = 32_768
CONTROLS = ("sort", "offset", "limit")
IDLE_S = 60
"""A connection without a request is closed after this long."""


@dataclass(frozen=True)
class Answer:
    """Body of a response and what it is."""

    body: bytes
    media_type: str
    cache: str = "no-store"


class Refusal(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: HTTPStatus, message: str):
        super().__init__(message)
        self.status = status


class Api:
    """The answers on some runs, by the path of a request."""

    def __init__(self, runs: Sequence[Run]):
        self.runs = runs
        self.routes: dict[str, Callable[[dict[str, str]], Any]] = {
            "state": lambda query: [run.revision for run in self.runs],
            "runs": lambda query: [describe_run(run) for run in self.runs],
            "metrics": lambda query: read_metrics(self.run(query)),
            "checks": lambda query: read_checks(self.run(query)),
            "groups": self.groups,
            "rollout": self.rollout,
            "prompt": lambda query: show_prompt(self.run(query), _take(query, "uid"), query.get("kind")),
            "compare": self.compare,
        }

    def answer(self, path: str, query: dict[str, str]) -> Answer:
        """Return the answer to a request. Errors: Refusal."""
        if path in FILES:
            return Answer(*read_page_file(path), "no-cache")
        room, _, name = path.removeprefix("/").partition("/")
        try:
            if room == "api" and name in self.routes:
                for run in self.runs:
                    run.refresh()
                return Answer(msgspec.json.encode(self.routes[name](query)), "application/json")
            if room == "image":
                return self.image(name, query)
        except ValueError as error:
            raise Refusal(HTTPStatus.BAD_REQUEST, str(error)) from None
        except KeyError as error:
            raise Refusal(HTTPStatus.NOT_FOUND, str(error.args[0])) from None
        raise Refusal(HTTPStatus.NOT_FOUND, "there is no such page")

    def run(self, query: dict[str, str], name: str = "run") -> Run:
        """Take the number of a run out of the query and return the run. Errors: KeyError."""
        number = query.pop(name, "0")
        if not number.isdecimal() or int(number) >= len(self.runs):
            raise KeyError(f"there is no run {number[:80]!r}")
        return self.runs[int(number)]

    def groups(self, query: dict[str, str]) -> dict[str, Any]:
        run = self.run(query)
        sort, (offset, limit) = query.pop("sort", "newest"), _take_page(query)
        return find_groups(run, query, sort, offset, limit)

    def rollout(self, query: dict[str, str]) -> dict[str, Any]:
        run = self.run(query)
        numbers = (_whole(_take(query, name), name) for name in ("step", "group", "sample"))
        return show_rollout(run, _take(query, "kind"), *numbers)

    def compare(self, query: dict[str, str]) -> dict[str, Any]:
        runs = [self.run(query, name) for name in ("run", "other")]
        query.pop("sort", None)
        offset, limit = _take_page(query)
        return compare_runs(runs, query, offset, limit)

    def image(self, name: str, query: dict[str, str]) -> Answer:
        number, _, image_id = name.partition("/")
        run = self.run({"run": number})
        side = _whole(query.get("side", str(SIDES_PX[-1])), "side")
        if side not in SIDES_PX:
            raise ValueError(f"side={side}: must be one of {', '.join(map(str, SIDES_PX))}")
        body, media_type = run.pictures.scaled(image_id, side)
        return Answer(body, media_type, "private, max-age=86400, immutable")


def _take(query: dict[str, str], name: str) -> str:
    if name not in query:
        raise ValueError(f"{name} is missing")
    return query[name]


def _whole(value: str, name: str) -> int:
    if not value.isdecimal() or len(value) > 12:
        raise ValueError(f"{name}={value[:80]!r} is no whole number")
    return int(value)


def _take_page(query: dict[str, str]) -> tuple[int, int]:
    return _whole(query.pop("offset", "0"), "offset"), _whole(query.pop("limit", "10"), "limit")


class Handler(BaseHTTPRequestHandler):
    """One connection of a browser."""

    protocol_version = "HTTP/1.1"
    timeout = IDLE_S
    server_version, sys_version = "viewer", ""

    def __init__(self, api: Api, *args: Any):
        self.api = api
        super().__init__(*args)

    def do_GET(self) -> None:
        try:
            check_origin(self.headers)
            if len(self.path) > MAX_TARGET_CHARACTERS:
                raise Refusal(HTTPStatus.REQUEST_URI_TOO_LONG, "the address is too long")
            target = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(target.query, keep_blank_values=True, max_num_fields=100))
            self.reply(HTTPStatus.OK, self.api.answer(target.path, query))
        except Refusal as refusal:
            body = msgspec.json.encode({"error": str(refusal)})
            self.reply(refusal.status, Answer(body, "application/json"))
        except ValueError as error:  # of an address that cannot be split
            body = msgspec.json.encode({"error": str(error)})
            self.reply(HTTPStatus.BAD_REQUEST, Answer(body, "application/json"))
        except (BrokenPipeError, ConnectionResetError, TimeoutError):  # the browser has gone
            self.close_connection = True

    def reply(self, status: HTTPStatus, answer: Answer) -> None:
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", answer.media_type)
        self.send_header("Content-Length", str(len(answer.body)))
        self.send_header("Cache-Control", answer.cache)
        self.end_headers()
        self.wfile.write(answer.body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not printed: a tab asks every few seconds."""


def check_origin(headers: Message) -> None:
    """Raises Refusal for a request under a foreign name, or made by another site's page."""
    host = headers.get("Host", "")
    try:
        name = urllib.parse.urlsplit(f"//{host}").hostname or ""
    except ValueError:
        name = ""
    if not is_own_name(name):
        raise Refusal(
            HTTPStatus.FORBIDDEN,
            f"host {host[:200]!r} is refused: give the address as localhost, as a number, or by this machine's name",
        )
    is_foreign = headers.get("Sec-Fetch-Site", "none") in ("cross-site", "same-site")
    if is_foreign and headers.get("Sec-Fetch-Mode") != "navigate":
        raise Refusal(HTTPStatus.FORBIDDEN, "requests of other sites are refused")


def is_own_name(name: str) -> bool:
    """Return whether a host name is this machine's: localhost, its own name, or an IP address.

    A rebound name is a name of its owner's domain, never a number.
    """
    if name in ("localhost", socket.gethostname().lower()):
        return True
    try:
        ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return True


class Server(ThreadingHTTPServer):
    """Serves some runs; `with` closes it. Errors: OSError where the address cannot be taken."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, runs: Sequence[Run], host: str, port: int):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._connections: set[socket.socket] = set()
        super().__init__((host, port), partial(Handler, Api(runs)))

    @property
    def url(self) -> str:
        """The address of the page."""
        host, port = self.server_address[:2]
        name = host.decode() if isinstance(host, bytes) else str(host)
        name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(name, name)
        return f"http://{f'[{name}]' if ':' in name else name}:{port}/"

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        """Close the address and every connection that a browser keeps open."""
        super().server_close()
        for connection in list(self._connections):
            with suppress(OSError):  # closed by the browser in this moment
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print a fault of the viewer's own, not that a browser went away."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

"""A port that is open on one machine, and whether others reach it; of the standard library alone, sent by value."""

import socket
from collections.abc import Mapping

CONNECT_TIMEOUT_S = 5.0


class OpenPort:
    """Listens on all interfaces on a port that the system chooses, as long as it lives."""

    def __init__(self) -> None:
        self.server = socket.create_server(("", 0))

    def port(self) -> int:
        """Number of the port."""
        return self.server.getsockname()[1]


def find_unreachable(targets: Mapping[str, tuple[str, int]]) -> dict[str, str]:
    """Reasons by name of the targets (host and port) to which no connection comes about."""
    reasons = {}
    for name, target in targets.items():
        try:
            socket.create_connection(target, CONNECT_TIMEOUT_S).close()
        except OSError as error:
            reasons[name] = str(error)
    return reasons

"""Network: the hub's reach, found out once and quickly, before libraries retry each file for minutes."""

import os
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

DEFAULT_ENDPOINT = "https://huggingface.co"
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
"""Variables that make huggingface_hub, datasets and transformers use their cache alone."""
PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
TIMEOUT_S = 5.0


def use_cache_without_network(names: Iterable[str | None]) -> None:
    """Sets OFFLINE, and says so in one line, when a name is of the hub and the hub cannot be reached.

    Must come before huggingface_hub is imported, which reads these variables once. Behind a proxy nothing is tried.

    Args:
        names: of models and data sets, with or without `@split`; those that exist as paths are no hub names.
    """
    remote = [name for name in names if name and name.count("/") <= 1 and not _is_local(name)]
    if not remote or os.environ.get(OFFLINE[0]) or any(map(os.environ.get, PROXIES)):
        return
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT)
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        socket.create_connection((endpoint.hostname or "", port), TIMEOUT_S).close()
    except OSError as error:
        os.environ.update(dict.fromkeys(OFFLINE, "1"))
        sys.stderr.write(
            f"No network: {endpoint.hostname} cannot be reached ({error}); {', '.join(dict.fromkeys(remote))} must be "
            "in the cache. Give folders of this machine in their place, or try again with a network\n"
        )


def check_cluster_address(address: str) -> None:
    """Passes unless a Ray cluster's HOST:PORT does not answer, which Ray itself would try for minutes.

    Raises:
        ValueError: with the reason.
    """
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        return  # auto, or another form, which Ray judges
    try:
        socket.create_connection((host.strip("[]"), int(port)), TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"--ray_address {address}: no Ray cluster answers there ({error}); give the address of its head node, "
            "HOST:PORT, or leave it out to work on this machine alone"
        ) from error


def _is_local(name: str) -> bool:
    return any(Path(path).expanduser().exists() for path in (name, name.rpartition("@")[0]) if path)

"""A machine's report on itself: code, versions, folders, room, name and clock.

Sent to every machine by value and made of the standard library alone, so that one without the project can answer too.
"""

import hashlib
import os
import platform
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from ipaddress import ip_address
from pathlib import Path
from typing import Any

SOURCES = ("verl", "spatialthinker")
MARK_WAIT_S = 20.0
"""A shared disk may show a new file only after seconds."""
PROBE_BYTES = 1 << 20
WHOLE_BYTES = 1 << 20
"""Files up to this size are compared whole, larger ones by size."""


def describe_host(
    root: str, packages: Iterable[str], folder: str, mark: str, paths: Mapping[str, str], compared: Iterable[str]
) -> dict[str, Any]:
    """The report.

    Args:
        root: of the project.
        packages: distributions whose versions matter.
        folder: of the run.
        mark: name of a file in it that holds its own name, written by the driver.
        paths: files and folders by the key that names them.
        compared: keys of those whose files must be the driver's.

    Returns:
        `versions` and `sources` by name, `files` of the compared paths by key and name, `faults` (sentences),
        `name_fault` (one or empty), names of `gpus`, and `clock` in seconds since the epoch.
    """
    faults = [
        *_mark_faults(Path(folder), mark),
        *_room_faults({"trainer.save_checkpoint_path": folder, "Ray's and temporary files": _temporary()}, mark),
        *(f"{key} = {path!r} is not there" for key, path in paths.items() if not os.path.exists(path)),
    ]
    return {
        "versions": {"Python": platform.python_version()} | {name: _version(name) for name in packages},
        "sources": digest_sources(Path(root)),
        "files": {key: _list_files(Path(paths[key])) for key in compared},
        "faults": faults,
        "name_fault": find_name_fault(),
        "gpus": _list_gpus(),
        "clock": time.time(),
    }


def digest_sources(root: Path) -> dict[str, str]:
    """SHA-256 of each source file of the project by its place in it."""
    files = sorted(file for name in SOURCES for file in (root / name).rglob("*.py"))
    return {str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _list_gpus() -> list[str]:
    """Names of all GPUs that the machine's driver knows."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return shown.stdout.split("\n")[:-1] if shown.returncode == 0 else []


def _temporary() -> str:
    """Folder that Ray writes to; Python's own choice passes over a full disk."""
    return os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"


def find_name_fault() -> str:
    """A sentence if others cannot reach this machine by its own name, as gloo asks them to; else empty."""
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""
    if os.environ.get("GLOO_SOCKET_IFNAME") or not ip_address(address).is_loopback:
        return ""
    return (
        f"its own name leads to {address} (mostly the line '{address} {socket.gethostname()}' of /etc/hosts), where "
        "no other machine finds it; give that line its address in the network, or set GLOO_SOCKET_IFNAME to the "
        "interface that joins the machines"
    )


def _mark_faults(folder: Path, mark: str) -> Iterable[str]:
    deadline = time.monotonic() + MARK_WAIT_S
    while True:
        try:
            found = (folder / mark).read_text() == mark
        except OSError:
            found = False
        if found:
            return
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    what = "is another folder here than on the driver's machine" if folder.is_dir() else "is not there"
    yield f"trainer.save_checkpoint_path = {str(folder)!r} {what}; all machines must share it"


def _room_faults(folders: Mapping[str, str], mark: str) -> Iterable[str]:
    for name, folder in folders.items():
        if not os.path.isdir(folder):
            continue  # said by its mark
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(PROBE_BYTES))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            free_gb = shutil.disk_usage(folder).free / 2**30
            yield f"{name}: nothing can be written to {folder} ({error.strerror}, {free_gb:.2f} GiB free); make room"


def _list_files(path: Path) -> dict[str, str]:
    """Marks that tell files apart, by name: of a file or of those in a folder, without reading weights."""
    files = [path] if path.is_file() else sorted(file for file in path.glob("*") if file.is_file())
    sizes = {file: file.stat().st_size for file in files}
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() if size <= WHOLE_BYTES else f"{size} bytes"
        for file, size in sizes.items()
    }

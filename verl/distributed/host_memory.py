"""Host memory of this process and its machine; a container's limit (cgroup v1 or v2) counts like a smaller machine's.

https://docs.kernel.org/admin-guide/cgroup-v2.html and .../cgroup-v1/memory.html; the system kills a process of the
container when its memory, without the file cache that can be dropped, reaches the limit.
"""

from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
V2 = ("memory.max", "memory.current", "")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
"""Files of limit and usage, and the prefix of the counts of a group with its children in memory.stat."""


def host_memory_metrics() -> dict[str, tuple[float, float]]:
    """Resident memory of this process and used share of its machine's or container's memory, as (sum, weight)."""
    return {
        "perf/max_rank_memory_gb": (psutil.Process().memory_info().rss / 2**30, 1.0),
        "perf/max_host_memory_share": (used_share(), 1.0),
    }


def used_share(mount: Path = CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> float:
    """Used share of the memory that this process may take: the largest of its machine's and its containers'."""
    memory = psutil.virtual_memory()
    limits = _container_limits(mount, membership)
    return max(
        [1 - memory.available / memory.total, *(used / limit for limit, used in limits if limit < memory.total)]
    )


def _container_limits(mount: Path, membership: Path) -> Iterator[tuple[int, int]]:
    """Limit and used bytes of the control groups of this process, from its own to the outermost."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, names = mount, V2
        elif "memory" in controllers.split(","):
            top, names = mount / "memory", V1
        else:
            continue
        group = top / path.strip("/")  # a container may see the host's path here, and only the outermost folder
        for folder in [group, *(parent for parent in group.parents if parent.is_relative_to(top))]:
            if (found := _read_group(folder, *names)) is not None:
                yield found


def _read_group(folder: Path, limit_name: str, used_name: str, prefix: str) -> tuple[int, int] | None:
    """Limit and used bytes of a control group; None without a limit."""
    try:
        limit, used = int((folder / limit_name).read_text()), int((folder / used_name).read_text())
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # "max", or no such group
        return None
    cached = sum(int(counts.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    return (limit, max(0, used - cached)) if limit > 0 else None

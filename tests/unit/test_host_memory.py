"""Used share of memory by hand, in made-up control groups of both versions."""

from pathlib import Path

import psutil
import pytest

from verl.distributed.host_memory import host_memory_metrics, used_share

GIB = 2**30
MACHINE = 1 - psutil.virtual_memory().available / psutil.virtual_memory().total


def write_v2(folder: Path, limit: str, used: int, active: int = 0, inactive: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\nactive_file {active}\ninactive_file {inactive}\n")


def write_v1(folder: Path, limit: int, used: int, cached: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"cache 7\ninactive_file 1\ntotal_inactive_file {cached}\n")


@pytest.fixture
def member(tmp_path):
    def write(*lines: str) -> Path:
        (tmp_path / "membership").write_text("".join(f"{line}\n" for line in lines))
        return tmp_path / "membership"

    return write


def test_a_containers_limit_counts_and_its_file_cache_does_not(tmp_path, member):
    write_v2(tmp_path / "cg", str(GIB), GIB, active=GIB // 64, inactive=GIB // 64)
    assert used_share(tmp_path / "cg", member("0::/")) == pytest.approx(1 - 1 / 32)


def test_the_tightest_of_nested_groups_counts(tmp_path, member):
    write_v2(tmp_path / "cg", "max", GIB)
    write_v2(tmp_path / "cg" / "pod", str(GIB), GIB * 63 // 64)
    write_v2(tmp_path / "cg" / "pod" / "container", str(2 * GIB), GIB // 4)
    assert used_share(tmp_path / "cg", member("0::/pod/container")) == pytest.approx(63 / 64)


def test_the_first_version_by_its_own_files(tmp_path, member):
    write_v1(tmp_path / "cg" / "memory" / "docker" / "a", GIB, GIB, cached=GIB // 32)
    lines = ("9:name=systemd:/x", "4:cpu,memory:/docker/a", "0::/")
    assert used_share(tmp_path / "cg", member(*lines)) == pytest.approx(1 - 1 / 32)


def test_the_hosts_path_seen_from_inside_leads_to_the_outermost_folder(tmp_path, member):
    write_v1(tmp_path / "cg" / "memory", GIB, GIB)
    assert used_share(tmp_path / "cg", member("4:memory:/docker/not/here")) == 1
    write_v2(tmp_path / "two", str(GIB), GIB)
    assert used_share(tmp_path / "two", member("0::/../../host")) == 1


@pytest.mark.parametrize("limit", ["max", "0", str(2**63 - 4096), "nonsense"])
def test_without_a_limit_the_machine_counts(tmp_path, member, limit):
    write_v2(tmp_path / "cg", limit, GIB)
    assert used_share(tmp_path / "cg", member("0::/")) == pytest.approx(MACHINE, abs=0.2)
    assert used_share(tmp_path / "nothing", tmp_path / "nothing") == pytest.approx(MACHINE, abs=0.2)


def test_the_metrics_of_a_rank():
    metrics = host_memory_metrics()
    assert 0 < metrics["perf/max_host_memory_share"][0] <= 1 and metrics["perf/max_rank_memory_gb"][0] > 0

"""On GPUs: what waits in host memory between passes, or lies there always, computes what it would on the device."""

import pytest

from spatialthinker.multicast import WITHOUT_MULTICAST
from tests.support.cpu_offload import check_host_memory
from tests.support.gpus import counts

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("num_ranks", counts(1, 2))
def test_host_memory_changes_where_tensors_wait_and_nothing_else(tmp_path, monkeypatch, num_ranks):
    for name, value in WITHOUT_MULTICAST.items():
        monkeypatch.setenv(name, value)
    check_host_memory(tmp_path, num_ranks, "cuda")

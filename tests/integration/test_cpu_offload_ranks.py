"""Models and optimizers that wait between passes compute what others do, with two ranks and through a checkpoint."""

from tests.support.cpu_offload import check_host_memory


def test_what_waits_between_passes_computes_the_same(tmp_path):
    names = ("on the device", "between passes", "as released", "adapters on the device", "adapters between passes")
    check_host_memory(tmp_path, 2, "cpu", names)

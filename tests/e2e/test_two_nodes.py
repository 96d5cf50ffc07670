"""Two Ray nodes on this machine: ranks on both, what has no room, reports before anything is loaded, a lost node."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from verl.config.loading import load_config
from verl.config.records import ConfigError
from verl.distributed.placement import ResourcePool, addresses
from verl.distributed.single_controller import ROOT, WorkerError, WorkerGroup, WorkerSpec, register
from verl.trainer.hosts import check_hosts
from verl.trainer.reach import find_closed_ways

pytestmark = pytest.mark.e2e

CPUS_PER_NODE = 4


class Probe:
    """An actor that says where it is."""

    def __init__(self, rank: int, world_size: int):
        self.rank = rank

    @register()
    def where(self) -> tuple[str, str]:
        return ray.get_runtime_context().get_node_id(), os.environ.get("GLOO_SOCKET_IFNAME", "")

    @register()
    def wait(self) -> None:
        import time

        time.sleep(600)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes with room for both ranks on either."""
    from ray.cluster_utils import Cluster

    both = Cluster(initialize_head=True, head_node_args={"num_cpus": CPUS_PER_NODE, "include_dashboard": False})
    both.second = both.add_node(num_cpus=CPUS_PER_NODE)  # type: ignore[attr-defined]
    ray.init(both.address, log_to_driver=False)
    yield both
    ray.shutdown()
    both.shutdown()


def test_machines_share_the_ranks_evenly_are_checked_and_are_named_when_lost(cluster, tmp_path):
    with pytest.raises(ConfigError) as caught:
        ResourcePool(3, 2, use_gpu=False, num_nodes=3)
    message = str(caught.value)
    assert "trainer.nnodes = 3, trainer.n_gpus_per_node = 1: each machine needs 2 CPU, and 2 machines" in message
    assert message.count(f"has {CPUS_PER_NODE} CPU") == 2 and message.count(", node ") == 2

    pool = ResourcePool(2, 2, use_gpu=False, num_nodes=2)
    env = {"PYTHONPATH": str(Path(__file__).parent), "GLOO_SOCKET_IFNAME": "lo"}  # where the actors find this file
    probes = WorkerGroup(pool, WorkerSpec(cls=Probe, kwargs={}, name="probe", env=env))
    places = probes.where()
    assert len({node for node, _ in places}) == 2 and {interface for _, interface in places} == {"lo"}
    assert [node for node, _ in places] == pool.nodes

    model = f"worker.actor.model.model_path={ROOT / 'configs' / 'toy_model'}"
    data = [f"data.{split}_files={tmp_path}" for split in ("train", "val")]
    folder = f"trainer.save_checkpoint_path={tmp_path / 'run'}"
    config = load_config([f"config={ROOT / 'configs' / 'toy_cpu.yaml'}", model, *data, folder])
    check_hosts(config, pool.machines, {})
    assert not (tmp_path / "run").exists()
    assert find_closed_ways(pool.machines, addresses(), {}) == []
    (closed,) = find_closed_ways(pool.machines, addresses() | {pool.nodes[1]: "name.invalid"}, {})
    assert closed.startswith(f"{pool.machine(0)} cannot connect to {pool.machine(1)}, port ")
    nodes = {**pool.machines, "ab" * 28: "gone (10.0.0.9)"}
    with pytest.raises(ConfigError) as caught:
        check_hosts(config, nodes, {})
    assert any(fault.startswith("gone (10.0.0.9): it cannot run a process") for fault in caught.value.faults)

    joined = cluster.add_node(num_cpus=CPUS_PER_NODE)  # changes nothing for who is there
    assert probes.where() == places
    cluster.remove_node(joined)
    assert probes.where() == places
    second = next(rank for rank, node in enumerate(pool.nodes) if node == cluster.second.node_id)
    wait = probes.start("wait")
    cluster.remove_node(cluster.second, allow_graceful=False)
    with pytest.raises(WorkerError) as lost:
        wait()
    assert f"probe rank {second} of 2 in wait on {pool.machine(second)}: its process died" in str(lost.value)

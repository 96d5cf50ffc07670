"""Training over two Ray nodes of this machine, briefly: a third joins and changes nothing, one is lost and named."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.training import ROOT, arguments, kill, make_data, metrics, wait_for
from verl.distributed import checkpoint

pytestmark = pytest.mark.e2e

SMALL = [
    "data.rollout_batch_size=2",
    "data.max_response_length=16",
    "worker.rollout.n=2",
    "worker.actor.global_batch_size=2",
    "trainer.nnodes=2",
    "trainer.n_gpus_per_node=1",
    "trainer.max_steps=1000",
    "trainer.save_limit=1",
]
CPUS_PER_NODE = 2
LIMIT_S = 90


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Two nodes, each with room for one rank and its engine."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": CPUS_PER_NODE, "include_dashboard": False})
    nodes.second = nodes.add_node(num_cpus=CPUS_PER_NODE)  # type: ignore[attr-defined]
    yield nodes
    nodes.shutdown()


def newest(run: Path) -> int:
    folder = checkpoint.find_latest(run, with_content=False)
    return checkpoint.read_step(folder) if folder else 0


def test_a_training_over_two_nodes_takes_no_third_and_names_the_one_that_is_lost(cluster, tmp_path):
    make_data(tmp_path / "data", num_train=8, num_val=2)
    run, log = tmp_path / "run", tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "verl.trainer.main", *arguments(tmp_path / "data", run, *SMALL)],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"RAY_ADDRESS": cluster.address},
            start_new_session=True,
        )
    try:
        wait_for(lambda: newest(run) > 0, process, "checkpoint")
        cluster.add_node(num_cpus=CPUS_PER_NODE)
        joined = newest(run)
        wait_for(lambda: newest(run) > joined, process, "checkpoint after a node has joined")
        cluster.remove_node(cluster.second, allow_graceful=False)
        assert process.wait(LIMIT_S) == 2, log.read_text()[-5000:]
    finally:
        kill(process)
    lost = cluster.second.node_id[:8]
    words = rf"^Error: (actor|rollout) rank \d of 2 in \w+ on .*, node {lost}: its process died"
    assert re.search(words, log.read_text(), re.MULTILINE), log.read_text()[-5000:]
    rows = metrics(run)
    assert len(rows) >= 2 and all(row["actor/grad_norm"] >= 0 for row in rows.values())

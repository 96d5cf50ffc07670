"""Training over two Ray nodes of this machine, briefly: a third joins and changes nothing, one is lost and named."""

import re
from pathlib import Path

import pytest

from tests.support.training import finish, kill, make_data, metrics, start, two_nodes, wait_for
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


def newest(run: Path) -> int:
    folder = checkpoint.find_latest(run, with_content=False)
    return checkpoint.read_step(folder) if folder else 0


def test_a_training_over_two_nodes_takes_no_third_and_names_the_one_that_is_lost(tmp_path):
    make_data(tmp_path / "data", num_train=8, num_val=2)
    run = tmp_path / "run"
    with two_nodes(CPUS_PER_NODE) as cluster:
        process = start(tmp_path / "data", run, *SMALL, address=cluster.address)
        try:
            wait_for(lambda: newest(run) > 0, process, "checkpoint")
            cluster.add_node(num_cpus=CPUS_PER_NODE)
            joined = newest(run)
            wait_for(lambda: newest(run) > joined, process, "checkpoint after a node has joined")
            cluster.remove_node(cluster.second, allow_graceful=False)
            told = finish(process, run, LIMIT_S, code=2)
        finally:
            kill(process)
    lost = cluster.second.node_id[:8]
    words = rf"^Error: (actor|rollout) rank \d of 2 (in|beside) [\w ]+ on .*, node {lost}: its process died"
    assert re.search(words, told, re.MULTILINE), told[-5000:]
    rows = metrics(run)
    assert len(rows) >= 2 and all(row["actor/grad_norm"] >= 0 for row in rows.values())


@pytest.mark.nightly
def test_one_machine_goes_on_from_what_two_saved_and_the_other_way_round(tmp_path):
    """A rank on each of two nodes, then both on one, then on two again."""
    make_data(tmp_path / "data", num_train=8, num_val=2)
    run, small = tmp_path / "run", SMALL[:4]
    two, one = ([f"trainer.nnodes={nodes}", f"trainer.n_gpus_per_node={2 // nodes}"] for nodes in (2, 1))
    for step, layout in enumerate((two, one, two), 1):
        chosen = [*small, *layout, f"trainer.max_steps={step}"]
        if layout is one:
            told = finish(start(tmp_path / "data", run, *chosen), run)
        else:
            with two_nodes(CPUS_PER_NODE) as cluster:
                told = finish(start(tmp_path / "data", run, *chosen, address=cluster.address), run)
        assert step == 1 or f"Resumed step {step - 1} of {step} from {run}" in told, told[-3000:]
    assert sorted(metrics(run)) == [1, 2, 3]

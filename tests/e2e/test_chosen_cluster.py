"""Evaluation and data generation beside a cluster of two nodes: they join it when they are asked to, and only then."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group

from data_gen.generate_data import main
from data_gen.questions.records import read_records
from data_gen.scenes.sources import synthetic_row
from evaluation.engines.local import ModelOptions
from evaluation.engines.replicas import DataParallelBackend, find_places
from tests.support.placed_engine import PlacedBackend

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one core each; RAY_ADDRESS names them, as for a training."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = nodes.address
    yield nodes
    os.environ.pop("RAY_ADDRESS")
    os.environ |= {"RAY_ADDRESS": before} if before else {}
    nodes.shutdown()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Iterator[Path]:
    """The folder of the call, with a model; the driver leaves its cluster at the end."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"small")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    ray.shutdown()


def places(options: ModelOptions, num_replicas: int) -> dict[str, list[str]]:
    """Node -> threads and model path of the engine there."""
    backend = DataParallelBackend(PlacedBackend, options, num_replicas)
    samples: Any = [SimpleNamespace(id=str(number)) for number in range(4)]
    answers = [answer.text.split() for _, answer in backend.answer(samples)]
    assert len(answers) == 4
    return {node: rest for node, *rest in answers}


def node_ids() -> set[str]:
    return {node["NodeID"] for node in ray.nodes()}


@pytest.mark.nightly
def test_blocks_run_on_the_cluster_that_was_named_and_find_files_of_the_folder_of_the_call(cluster, folder):
    """First here: blocks of a second driver in one process lose those of the one before."""
    row = synthetic_row(0, 0)
    (folder / "picture.png").write_bytes(row["image"]["bytes"])
    rows = [row | {"image": "picture.png", "image_id": str(number)} for number in range(6)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["preprocess_on_cluster", "--provider=template", "--source=rows.jsonl", "--out=out/t.csv"]
    assert main([*command, "--block_rows=4", f"--ray_address={cluster.address}"]) == 0
    assert ray.get_runtime_context().gcs_address == cluster.address
    assert len(list((folder / "out" / "t" / "blocks").glob("*.jsonl"))) == 2
    assert [record.image_id for record in read_records(folder / "out" / "t.csv")] == list("012345")


def test_engines_run_on_every_machine_of_the_cluster_that_was_named(cluster, folder, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))  # the driver's cores do not count
    options = ModelOptions("model", "reasoning", num_items=10_000, ray_address=cluster.address)
    found = places(options, 0)
    assert set(found) == node_ids() and len(found) == 2
    assert list(found.values()) == [["1", str(folder / "model")]] * 2


def test_engines_stay_here_when_none_was_named(cluster, folder):
    found = places(ModelOptions("model", "reasoning", num_items=10_000), 2)
    assert set(found) == node_ids() and len(found) == 1
    assert ray.get_runtime_context().gcs_address != cluster.address


def test_a_cluster_that_others_hold_is_said(cluster, folder, monkeypatch):
    monkeypatch.setattr("evaluation.engines.replicas.PLACEMENT_TIMEOUT_S", 2)
    options = ModelOptions("model", "reasoning", num_items=10_000, ray_address=cluster.address)
    ray.init(cluster.address, log_to_driver=False)
    ray.get(placement_group([{"CPU": 1}]).ready())
    with pytest.raises(ValueError, match="no room for 2 engines of .*some of it is in use"):
        find_places(options)

"""Placement: one bundle of a Ray cluster's resources per machine of the run, and the machines' names."""

import os
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from verl.config.records import ConfigError

PLACEMENT_TIMEOUT_S = 120


class ResourcePool:
    """One placement-group bundle per machine: CPUs for its ranks, and their GPUs where the cluster has them.

    Attributes:
        nodes: id of each rank's machine, in order of the bundles.
        machines: name of each machine by id.
        gpus: each rank's GPU as CUDA_VISIBLE_DEVICES of its machine names it; none on CPUs.

    Raises:
        ConfigError: the cluster cannot hold the bundles; the message has its machines.
    """

    def __init__(self, num_ranks: int, cpus_per_rank: float, use_gpu: bool, num_nodes: int = 1):
        self.num_ranks, self.ranks_per_node = num_ranks, num_ranks // num_nodes
        bundle = {"CPU": cpus_per_rank * self.ranks_per_node} | ({"GPU": self.ranks_per_node} if use_gpu else {})
        check_room(bundle, num_nodes, self.ranks_per_node)
        self.group: PlacementGroup = placement_group([bundle] * num_nodes, strategy="STRICT_SPREAD")
        try:
            ray.get(self.group.ready(), timeout=PLACEMENT_TIMEOUT_S)
        except GetTimeoutError as error:
            remove_placement_group(self.group)
            raise ConfigError(
                [
                    f"trainer.nnodes = {num_nodes}, trainer.n_gpus_per_node = {self.ranks_per_node}: no room within "
                    f"{PLACEMENT_TIMEOUT_S} s for {describe_resources(bundle)} on each of so many machines, and some "
                    f"are in use: {describe_cluster(bundle)}"
                ]
            ) from error
        of_bundle = placement_group_table(self.group)["bundles_to_node_id"]
        self.nodes = [of_bundle[rank // self.ranks_per_node] for rank in range(num_ranks)]
        self.machines = {node: name for node, name in name_machines().items() if node in self.nodes}
        self.gpus = self._find_gpus() if use_gpu else []

    def strategy(self, rank: int) -> PlacementGroupSchedulingStrategy:
        """Places an actor on the rank's machine."""
        bundle = rank // self.ranks_per_node
        return PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=bundle)

    def machine(self, rank: int) -> str:
        """Name of the rank's machine; empty when there is only one."""
        return self.machines[self.nodes[rank]] if len(self.machines) > 1 else ""

    def _find_gpus(self) -> list[str]:
        # A Ray task, since Ray sets the variable per process.
        show = ray.remote(num_cpus=0, num_gpus=self.ranks_per_node)(lambda: os.environ["CUDA_VISIBLE_DEVICES"])
        firsts = range(0, self.num_ranks, self.ranks_per_node)
        shown = [show.options(scheduling_strategy=self.strategy(rank)).remote() for rank in firsts]
        return [gpu for gpus in ray.get(shown, timeout=PLACEMENT_TIMEOUT_S) for gpu in gpus.split(",")]

    def visible_gpus(self, ranks: range) -> dict[str, str]:
        """The variable that shows a process the GPUs of these ranks; empty on CPUs.

        Ray gives a process GPUs of one bundle alone, and leaves this variable to those that ask it for none.

        Raises:
            ConfigError: the ranks are not on one machine.
        """
        if not self.gpus:
            return {}
        if len({self.nodes[rank] for rank in ranks}) > 1:
            raise ConfigError(
                [
                    f"worker.rollout.tensor_parallel_size = {len(ranks)}: ranks {ranks[0]} to {ranks[-1]} are on "
                    f"several machines ({', '.join(self.machine(rank) for rank in ranks)}), and an engine needs one; "
                    "set a divisor of trainer.n_gpus_per_node"
                ]
            )
        return {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus[rank] for rank in ranks)}

    def release(self) -> None:
        """Removes the placement group."""
        remove_placement_group(self.group)


def name_machines() -> dict[str, str]:
    """Name and address of every living machine of the cluster by id; the id too where two are named alike."""
    nodes = {node["NodeID"]: f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})" for node in _living()}
    names = list(nodes.values())
    return {node: name if names.count(name) == 1 else f"{name}, node {node[:8]}" for node, name in nodes.items()}


def addresses() -> dict[str, str]:
    """Network address of every living machine by id."""
    return {node["NodeID"]: node["NodeManagerAddress"] for node in _living()}


def _living() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def describe_resources(resources: Mapping[str, float]) -> str:
    """As `4 CPU and 2 GPU`."""
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items())


def describe_cluster(wanted: Mapping[str, float]) -> str:
    """Wanted resources that each machine has."""
    names = name_machines()
    found = {node["NodeID"]: {key: node["Resources"].get(key, 0) for key in wanted} for node in _living()}
    return "; ".join(f"{names[node]} has {describe_resources(has)}" for node, has in found.items() if node in names)


def check_room(bundle: Mapping[str, float], num_nodes: int, ranks_per_node: int) -> None:
    """Passes if enough machines of the cluster can hold a bundle each, whatever is in use there.

    Raises:
        ConfigError: with what each machine has.
    """
    fitting = [
        node for node in _living() if all(node["Resources"].get(key, 0) >= amount for key, amount in bundle.items())
    ]
    if len(fitting) < num_nodes:
        raise ConfigError(
            [
                f"trainer.nnodes = {num_nodes}, trainer.n_gpus_per_node = {ranks_per_node}: each machine needs "
                f"{describe_resources(bundle)}, and {len(fitting)} machines of the Ray cluster have that: "
                f"{describe_cluster(bundle)}; lower one of the two, or add machines to the cluster of RAY_ADDRESS"
            ]
        )

"""Check that the machines of a cluster reach each other on ports that the system chooses, as ranks do."""

from collections.abc import Mapping

import ray
from ray import cloudpickle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from verl.distributed import open_port

TIMEOUT_S = 60


def find_closed_ways(machines: Mapping[str, str], addresses: Mapping[str, str], env: Mapping[str, str]) -> list[str]:
    """A sentence on each pair of machines of which the first cannot connect to the second.

    Args:
        machines: names by id of Ray's node.
        addresses: in the network, by id.
        env: of the processes there.
    """
    cloudpickle.register_pickle_by_value(open_port)
    try:
        make, ask = ray.remote(num_cpus=0)(open_port.OpenPort), ray.remote(num_cpus=0)(open_port.find_unreachable)
        places = {
            node: {
                "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
                "runtime_env": {"env_vars": dict(env)},
            }
            for node in machines
        }
        listeners = {node: make.options(**places[node]).remote() for node in machines}
        faults, ports = [], {}
        for node, listener in listeners.items():
            try:
                ports[node] = ray.get(listener.port.remote(), timeout=TIMEOUT_S)
            except RayError as error:
                faults.append(f"{machines[node]}: no port can be opened there ({str(error).splitlines()[-1]})")
        others = {node: {to: (addresses[to], ports[to]) for to in ports if to != node} for node in ports}
        asked = {node: ask.options(**places[node]).remote(targets) for node, targets in others.items() if targets}
        for node, ref in asked.items():
            faults += [
                f"{machines[node]} cannot connect to {machines[to]}, port {ports[to]} ({reason}); open all ports "
                "between the machines"
                for to, reason in ray.get(ref, timeout=TIMEOUT_S).items()
            ]
    finally:
        cloudpickle.unregister_pickle_by_value(open_port)
    return faults

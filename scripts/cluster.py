"""Checks the machines of a running Ray cluster for a training: one line for each finding, code 2 with any fault.

`bash scripts/cluster.sh check FIRST_MACHINE:PORT [key=value ...]` calls it with the cluster's token.
"""

import argparse
import logging
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from verl.config.loading import load_config  # noqa: E402
from verl.config.records import ConfigError  # noqa: E402


def main() -> int:
    """Prints the findings; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address", help="of the cluster's first machine, HOST:PORT")
    parser.add_argument("overrides", nargs="*", help="arguments of the training, whose folders must be there")
    options = parser.parse_args()
    from spatialthinker.rewards import REWARDS

    try:
        config = load_config(options.overrides, tuple(REWARDS))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    import ray

    try:
        ray.init(options.address, logging_level=logging.ERROR, log_to_driver=False)
    except Exception as error:  # noqa: BLE001  of many types
        reason = str(error).strip().splitlines()[-1]
        print(f"error: {options.address}: no Ray cluster can be joined there ({reason})", file=sys.stderr)
        return 2
    from verl.distributed.placement import addresses, name_machines
    from verl.trainer.hosts import examine, network_environment
    from verl.trainer.reach import find_closed_ways

    machines, env = name_machines(), network_environment()
    findings = examine(config, machines, env)
    faults = findings.faults + find_closed_ways(machines, addresses(), env)
    for line in findings.facts:
        print(line)
    for line in findings.warnings:
        print(f"Warning: {line}")
    for line in faults:
        print(f"Fault: {line}")
    print(f"{len(machines)} machines, {len(faults)} faults")
    ray.shutdown()
    return 2 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

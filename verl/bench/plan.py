"""`python -m verl.bench plan --nodes 64 --gpus 8`: a step of 3B, 7B and 30B-A3B on 1 to so many machines, estimated.

Prints the seconds of a step by machines for each model, what grows first, and every assumption. Nothing is started.
"""

# ruff: noqa: T201  a table on the terminal is what this is for
import argparse
from collections.abc import Iterator

from verl.bench.step_time import (
    DRIVER_S,
    GATHER_S,
    GIGA,
    GPUS,
    GROUPS_OF_GPU,
    HANDLE_S,
    IMAGES_S,
    MODELS,
    PASS_SHARE,
    PROMPT_TOKENS,
    RESPONSE_TOKENS,
    ROLLOUT_SHARE,
    SAMPLES,
    SCORING_PROCESSES,
    SCORING_S,
    SYNC_S_PER_GB,
    UPDATE_SHARE,
    Cluster,
    Model,
    StepTime,
    group_by_cause,
    least_gpus,
    step_time,
)

NOTICED_SHARE = 0.05
"""Of a step on one machine: what adds more than this has grown."""
COLUMNS = ("rollout", "weight sync", "old log-probs", "reference log-probs", "update", "driver", "checkpoint")


def main(argv: list[str] | None = None) -> int:
    """Prints the plan that the command line asks for; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m verl.bench plan", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=_count, default=64, help="machines, up to which the tables go")
    parser.add_argument("--gpus", type=_count, default=8, help="of each machine")
    parser.add_argument("--gpu", choices=list(GPUS), default="H100")
    parser.add_argument(
        "--prompts", type=_count, help=f"of a step over all GPUs (default: {GROUPS_OF_GPU} for each GPU)"
    )
    parser.add_argument("--network", type=_rate, default=400.0, help="GB/s of a machine's network cards, one way")
    parser.add_argument("--storage", type=_rate, default=2.0, help="GB/s of the run's folder, all machines together")
    parser.add_argument("--save_freq", type=_count, default=5, help="steps between checkpoints")
    arguments = parser.parse_args(argv)
    if arguments.prompts and arguments.prompts < arguments.nodes * arguments.gpus:
        parser.error(
            f"--prompts {arguments.prompts}: fewer than the {arguments.nodes * arguments.gpus} GPUs; raise it"
        )
    rates = {"network": arguments.network * GIGA, "storage": arguments.storage * GIGA}
    options = {"gpu": GPUS[arguments.gpu], "save_every": arguments.save_freq} | rates
    clusters = [Cluster(machines, arguments.gpus, **options) for machines in list_machines(arguments.nodes)]
    for name, model in MODELS.items():
        print("\n".join([*plan_model(name, model, clusters, arguments.prompts), ""]))
    print("\n".join(list_assumptions(clusters[-1])))
    return 0


def list_machines(most: int) -> list[int]:
    """Powers of two up to `most`, and `most`."""
    return sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | {most})


def plan_model(name: str, model: Model, clusters: list[Cluster], prompts: int | None) -> Iterator[str]:
    """The table of one model, and the words on what grows first."""
    yield f"{name}: seconds of a step"
    names = ("machines", *COLUMNS, "step", "of one's speed")
    yield "".join(f"{column:>{max(len(column) + 2, 10)}}" for column in names)
    least, times = least_gpus(model, clusters[0].gpu), {}
    for cluster in clusters:
        if cluster.ranks < least or cluster.gpus % model.engine_gpus:
            yield f"{cluster.machines:>10}  does not fit: needs {least} GPUs, by {model.engine_gpus} on a machine"
            continue
        groups = prompts / cluster.ranks if prompts else GROUPS_OF_GPU
        times[cluster] = time = step_time(model, cluster, groups)
        first, one = next(iter(times.items()))
        speed = one.total / time.total * (first.ranks / cluster.ranks if prompts else 1.0)
        cells = [*(time.phases[column] for column in COLUMNS), time.total]
        shown = "".join(
            f"{cell:{max(len(column) + 2, 10)}.2f}" for cell, column in zip(cells, names[1:], strict=False)
        )
        yield f"{cluster.machines:>10}{shown}{speed:16.0%}"
    if times:
        yield describe_growth(times)


def describe_growth(times: dict[Cluster, StepTime]) -> str:
    """The part that first adds more than NOTICED_SHARE of the first step, and the one that adds most at the last."""
    first = next(iter(times.values()))
    last = list(times)[-1]
    base = group_by_cause(first)
    most, seconds = max(_growth(times[last], base).items(), key=lambda item: item[1])
    at_last = f"on {last.machines} machines most is added by {most}, {seconds:.1f} s"
    for cluster, time in times.items():
        cause, added = max(_growth(time, base).items(), key=lambda item: item[1])
        if added > NOTICED_SHARE * first.total:
            words = f"more than {NOTICED_SHARE:.0%} of a step from {cluster.machines} machines on"
            return f"grows first: {cause}, {words}; {at_last}"
    return f"nothing grows by {NOTICED_SHARE:.0%} of a step; {at_last}"


def _growth(time: StepTime, base: dict[str, float]) -> dict[str, float]:
    return {cause: seconds - base[cause] for cause, seconds in group_by_cause(time).items()}


def list_assumptions(cluster: Cluster) -> Iterator[str]:
    """Every number that the plan rests on, and where it is from."""
    network, storage = cluster.network / GIGA, cluster.storage / GIGA
    yield "Measured on one and four GPUs (docs/speed.md):"
    yield f"  {SAMPLES} responses of {RESPONSE_TOKENS} tokens to each prompt of {PROMPT_TOKENS}"
    yield f"  a rollout reaches {ROLLOUT_SHARE:g} of its two floors, log-probs {PASS_SHARE:g} of 800 TFLOP/s,"
    yield f"  the update {UPDATE_SHARE:g}; images take {IMAGES_S * 1e3:g} ms a group of a GPU"
    yield f"  weight sync: {SYNC_S_PER_GB:g} s/GB to an engine, {GATHER_S * 1e3:g} ms to gather a tensor"
    yield "Measured on two CPU cores:"
    yield f"  driver: {DRIVER_S * 1e3:g} ms a group; {SCORING_S * 1e6:.0f} us to score a response,"
    yield f"  by {SCORING_PROCESSES} processes beside the log-probs"
    yield f"  rank 0 reads and packs every GPU's handle of every tensor, {HANDLE_S * 1e6:g} us each"
    yield "Assumed:"
    yield "  7B reaches the shares of 3B, 30B-A3B half of them with engines of 4 GPUs"
    yield f"  network: {network:g} GB/s a machine, of which a collective reaches {cluster.network_share:.0%},"
    yield f"  and {cluster.hop_s * 1e6:g} us for each machine of a ring"
    yield "  FSDP shards over all GPUs, and gathers behind matrix products as far as these take longer"
    yield f"  storage: {storage:g} GB/s for all machines together; a checkpoint of weights and states every"
    yield f"  {cluster.save_every} steps, read once more by the driver for its digests, beside the training"
    yield "  no machine is slower than another; groups and lengths are shared out evenly"


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: need a whole number from 1 up")
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < 1e6:
        raise argparse.ArgumentTypeError(f"{text}: need GB/s above 0")
    return rate

#!/usr/bin/env python3
"""A step of TRL's GRPOTrainer on the load of `python -m verl.bench step`: seconds of a prompt, phase by phase.

    python3 -m verl.bench step --config configs/bench_3b_h100.yaml --ratio_groups 0 --dump ours.json
    python3 scripts/bench_peers.py --config configs/bench_3b_h100.yaml --ours ours.json
    python3 scripts/bench_peers.py --config configs/bench_3b_h100.yaml --prompts 32 --ours ours.json --limit 400
    python3 scripts/bench_peers.py --config configs/bench_toy_cpu.yaml --image 112x112   # a CPU, without vLLM

Both have the same random model, pictures, prompts, responses of one length, optimizer steps and reference. A step is
a generation with all its optimizer steps; the first is warm-up, and the table has medians of the rest. TRL's settings
are chosen for speed, in `trl_settings` of verl/bench/peers.py with their reasons, and can be changed:

    --trl gradient_checkpointing=false --micro 2    # activations kept, in smaller passes; --trl sets any of GRPOConfig
    --attention sdpa                                # what TRL does where no flash attention is installed

Without --attention it is FlashAttention 2 where that is installed, and else this project's flash attention for the
windows of pictures, which SDPA would compute one by one.

To be known when comparing:

- TRL 1.16 gives vLLM prompts in which a picture's token is already expanded, and vLLM expands the first of them once
  more: its engine reads 2,194 tokens of a prompt of 1,586, and samples from another prompt than is trained on. The
  passes are not touched. vLLM reads a prompt once for all its responses, so this costs a share of the prefill and of
  the engine's memory; `--raw_prompts` gives vLLM one token for each picture.
- TRL loads a generation's rows again for each pass. A usual data set would decode each picture so often; here they are
  decoded once. TRL's processor still reads every picture twice for every response.
- TRL's AdamW keeps bf16 moments of bf16 weights here: fewer bytes than this project's, and not its precision.

With 128 prompts TRL holds the patches of 1,024 pictures on the GPU, 12 GB and a copy: one of 80 GB takes --prompts 32.
On a larger GPU, --memory_gb 79 has another process hold the rest.
TRL 1.16.0 is among the locked packages; elsewhere: python -m pip install --no-deps trl==1.16.0
"""

# ruff: noqa: T201  a table on the terminal is what this is for
import argparse
import json
import os
import sys
import threading
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout's packages before installed ones

TRL = "1.16.0"
INSTALL = f"python -m pip install --no-deps trl=={TRL}"
STOPPED = 3
"""Exit code after --limit."""


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and runs TRL's steps; returns the exit code."""
    given = parse(argv)
    check_trl()
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # transformers would spread over several
    from verl.trainer.main import user_errors

    try:
        measure(given)
    except user_errors() as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    from verl.bench.measure import file_to_read, file_to_write

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=file_to_read, help="of the benchmark, as for verl.bench")
    parser.add_argument("--image", default="800x600", help="width x height of the pictures")
    parser.add_argument(
        "--prompt_tokens", type=positive(int), help="of every prompt; data.max_prompt_length if left out"
    )
    parser.add_argument("--prompts", type=positive(int), help="of a step; data.rollout_batch_size if left out")
    parser.add_argument("--memory_gb", type=positive(float), help="GiB of the GPU to be had; all, if left out")
    parser.add_argument("--steps", type=positive(int), default=2, help="the first is warm-up; default: %(default)s")
    parser.add_argument("--micro", type=positive(int), help="responses of a pass; those of a prompt if left out")
    parser.add_argument(
        "--attention", default="auto", help="varlen, sdpa, flash_attention_2, ...; default: %(default)s"
    )
    parser.add_argument("--raw_prompts", action="store_true", help="one token of each picture in the engine's prompts")
    parser.add_argument("--trl", type=parse_setting, action="append", default=[], help="NAME=VALUE of GRPOConfig")
    parser.add_argument("--ours", type=read_ours, help="what `verl.bench step --dump` wrote, to compare with")
    parser.add_argument("--limit", type=positive(float), help="seconds, after which it says how far it is, and ends")
    parser.add_argument("--dump", type=file_to_write, help="JSON file for everything that was measured")
    parser.add_argument("overrides", nargs="*", help="keys of the configuration, a.b=value")
    given = parser.parse_intermixed_args(argv)
    given.trl = dict(given.trl)
    return given


def positive(kind: type) -> Any:
    """A parser of a number above 0."""

    def parse_number(text: str) -> Any:
        try:
            number = kind(text)
        except ValueError:
            number = 0
        if number <= 0:
            raise argparse.ArgumentTypeError(f"{text}: give a positive {'whole number' if kind is int else 'number'}")
        return number

    return parse_number


def parse_setting(text: str) -> tuple[str, Any]:
    """A name and its value, which is JSON or else a word."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text} is not NAME=VALUE, as beta=0.0")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def read_ours(file: str) -> dict[str, Any]:
    """The `table` and `config` of a file that `python -m verl.bench step --dump` wrote."""
    try:
        ours = json.loads(Path(file).read_text())
        table, config = ours["table"], ours["config"]
        is_step = bool(table["whole step"]["seconds"] and table.get("update", {}).get("seconds"))
        is_step &= config["data"]["rollout_batch_size"] > 0 and config["worker"]["rollout"]["n"] > 0
        if not is_step:
            raise ValueError("nothing was trained")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise argparse.ArgumentTypeError(f"{file} is not what a step wrote with --dump: {reason}") from None
    return ours


def check_trl() -> None:
    """Ends without TRL, and warns of another version than this is written for.

    Raises:
        SystemExit: TRL is not installed.
    """
    try:
        found = version("trl")
    except PackageNotFoundError:
        raise SystemExit(f"TRL {TRL} is not installed: {INSTALL}") from None
    if found.rpartition(".")[0] != TRL.rpartition(".")[0]:
        print(f"Warning: this is written for TRL {TRL}, not for {found}: {INSTALL}", file=sys.stderr, flush=True)


def measure(given: argparse.Namespace) -> None:
    """Runs TRL's steps and prints the table."""
    import torch

    from verl.bench.peers import Load, Phases, hold_memory, make_trainer
    from verl.bench.setting import prepare

    unused = {"shape": [], "gpus": None, "frames": 0}
    setting = prepare(argparse.Namespace(**vars(given) | unused | {"overrides": scale_prompts(given)}))
    is_gpu = setting.device == "cuda"
    data, rollout = setting.config.data, setting.config.worker.rollout
    picture_tokens = setting.pictures[1] // setting.processor.image_processor.merge_size**2
    load = Load(
        data.rollout_batch_size,
        setting.config.worker.actor.global_batch_size,
        rollout.n,
        setting.prompt_tokens,
        picture_tokens,
        data.max_response_length,
        given.micro or rollout.n,
    )
    phases = Phases(torch.cuda.synchronize if is_gpu else lambda: None)
    if given.limit:
        watch(given.limit, lambda: phases.describe(load))
    with hold_memory(setting.config.trainer.memory_gb if is_gpu else None):
        try:
            make_trainer(load, setting, phases, given).train()
        except torch.OutOfMemoryError as error:
            raise SystemExit(
                f"TRL ran out of memory: {phases.describe(load)}\n{error}\n"
                f"Give a smaller --micro than {load.micro}, or fewer --prompts than {load.prompts}"
            ) from None
    device = torch.cuda.get_device_name() if is_gpu else "CPU"
    seconds, counts = phases.medians(), dict(phases.counts)
    sizes = f"{load.prompts} prompts x {load.samples} responses, {load.updates} optimizer steps"
    print(f"\n{device}: {len(phases.steps)} steps of {sizes}; medians of those after the first")
    print(", ".join(f"{name} {count}" for name, count in counts.items() if count))
    print("\n".join(compare(seconds, load.prompts, given.ours)), flush=True)
    if is_gpu:
        print(f"peak of PyTorch's memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB, without the engine's")
    for line in differences(load, given.ours, setting.config.trainer.memory_gb):
        print(line)
    if given.dump:
        result = {"device": device, "prompts": load.prompts, "seconds": seconds, "steps": phases.steps}
        Path(given.dump).write_text(json.dumps(result | {"counts": counts}, indent=1))


def scale_prompts(given: argparse.Namespace) -> list[str]:
    """The overrides with --prompts: optimizer steps of as many prompts as in the file, or of all if they are fewer."""
    import yaml

    from verl.config.records import Config

    if not given.prompts:
        return given.overrides
    # Not by the loader of configurations: the model that the file names may not have been made yet.
    actor = (yaml.safe_load(Path(given.config).read_text()).get("worker") or {}).get("actor") or {}
    update = min(actor.get("global_batch_size", Config().worker.actor.global_batch_size), given.prompts)
    sizes = {"data.rollout_batch_size": given.prompts, "data.val_batch_size": given.prompts}
    sizes |= {"worker.actor.global_batch_size": update}
    return [*(f"{key}={size}" for key, size in sizes.items()), *given.overrides]


def watch(limit_s: float, describe: Any) -> None:
    """Ends the process after so many seconds with what `describe` returns."""

    def stop() -> None:
        print(f"stopped after {limit_s:g} s: {describe()}", flush=True)
        os._exit(STOPPED)  # an engine in this process cannot be interrupted

    timer = threading.Timer(limit_s, stop)
    timer.daemon = True
    timer.start()


def compare(theirs: dict[str, float], prompts: int, ours: dict[str, Any] | None) -> list[str]:
    """Lines of the table: seconds of a step and of a prompt, TRL's and ours, and TRL's as a multiple of ours.

    Args:
        theirs: phase -> seconds of a step of `prompts` prompts.
        ours: from read_ours.
    """
    columns = ["TRL, s", "s/prompt", *(["ours, s", "s/prompt", "times"] if ours else [])]
    lines = [f"{'phase':20}" + "".join(f"{column:>11}" for column in columns)]
    for name, seconds in theirs.items():
        line = f"{name:20}{seconds:11.2f}{seconds / prompts:11.4f}"
        if ours:
            our_seconds = ours["table"].get(name, {}).get("seconds") or 0.0
            our_share = our_seconds / ours["config"]["data"]["rollout_batch_size"]
            line += f"{our_seconds:11.2f}{our_share:11.4f}"
            line += f"{seconds / prompts / our_share:11.2f}" if our_share > 0 else f"{'':11}"
        lines.append(line.rstrip())
    return lines


def differences(load: Any, ours: dict[str, Any] | None, memory_gb: float | None = None) -> list[str]:
    """Warnings of sizes by which the two loads differ other than by the number of prompts.

    Args:
        memory_gb: GiB of the GPU that TRL could have; None: all.
    """
    if not ours:
        return []
    data, worker = ours["config"]["data"], ours["config"]["worker"]
    pairs = {
        "responses of a prompt": (load.samples, worker["rollout"]["n"]),
        "response tokens": (load.response_tokens, data.get("max_response_length")),
        "prompt tokens, at most": (load.prompt_tokens, data.get("max_prompt_length")),
        "prompts of an optimizer step": (load.update, worker.get("actor", {}).get("global_batch_size")),
        "GiB of the GPU to be had": (memory_gb, ours["config"].get("trainer", {}).get("memory_gb")),
    }
    return [f"Warning: {name}: {one} of TRL's, {two} of ours" for name, (one, two) in pairs.items() if one != two]


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Cost of recording for a training step, and equality of what is learned: pairs of toy runs with and without it.

    python3 scripts/bench_recording.py [--pairs 3] [--steps 10] [--folder runs/bench_recording]

The runs of a pair take turns at being first. Every metric but times and memory must be equal to the last digit; the
last line is the median of the pairs' ratios of median step times, the first step of a run left out.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the checkout's packages before installed ones

VARYING = ("timing_", "perf/", "recording/", "checks/", "checkpoint/")
"""Beginnings of names of metrics that are no function of the seed."""


def train(folder: Path, name: str, rule: str, steps: int) -> list[dict[str, Any]]:
    """Returns the metrics of a run's steps."""
    run, data = folder / name, folder / "data"
    command = [sys.executable, "-m", "verl.trainer.main", "config=configs/toy_cpu.yaml"]
    command += [f"data.train_files={data}@train", f"data.val_files={data}@val", f"trainer.max_steps={steps}"]
    command += [f"trainer.save_checkpoint_path={run}", f"trainer.rollouts_to_keep={rule}", "trainer.logger=[file]"]
    command += ["trainer.val_before_train=false", "trainer.val_freq=-1", "trainer.save_freq=-1"]
    with (folder / f"{name}.log").open("w") as log:
        subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=True)
    return [json.loads(line) for line in (run / "experiment_log.jsonl").read_text().splitlines()]


def find_differences(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> list[str]:
    """Returns the metrics that differ, with their step."""
    if len(first) != len(second):
        return [f"{len(first)} and {len(second)} steps"]
    return [
        f"step {one['step']}: {key} is {one.get(key)} and {other.get(key)}"
        for one, other in zip(first, second, strict=True)
        for key in sorted(one.keys() | other.keys())
        if not key.startswith(VARYING) and one.get(key) != other.get(key)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_recording"))
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "data").is_dir():
        rows = ["--out", str(folder / "data"), "--seed", "3", "--train", "512", "--val", "16"]
        subprocess.run([sys.executable, "-m", "spatialthinker.synthetic", *rows], cwd=ROOT, check=True)
    ratios = []
    for pair in range(options.pairs):
        order = ("all", "none") if pair % 2 == 0 else ("none", "all")
        runs = {rule: train(folder, f"{pair}_{rule}", rule, options.steps) for rule in order}
        if differences := find_differences(runs["all"], runs["none"]):
            print("\n".join(differences))
            return 1
        seconds = {rule: statistics.median(step["timing_s/step"] for step in runs[rule][1:]) for rule in runs}
        ratios.append(seconds["all"] / seconds["none"])
        lost = {key: runs["all"][-1].get(f"recording/{key}") for key in ("failed_steps", "dropped_steps")}
        print(f"pair {pair + 1}: {seconds['all']:.2f} s with, {seconds['none']:.2f} s without; {lost}", flush=True)
    print(f"equal to the last digit; step time with recording {statistics.median(ratios):.4f} times that without")
    return 0


if __name__ == "__main__":
    sys.exit(main())

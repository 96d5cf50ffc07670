"""Scores recorded rollouts and measures the rewards' speed.

    python -m spatialthinker.rewards score rollouts.jsonl --reward spatial_sgg --out scores.jsonl
    python -m spatialthinker.rewards score rollouts.jsonl --explain
    python -m spatialthinker.rewards summary rollouts.jsonl
    python -m spatialthinker.rewards bench
    python -m spatialthinker.rewards list

A line of the file is a JSON object with `response`, `ground_truth` and, where the reward reads them, `problem` and
`response_length`.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from spatialthinker.output import print_any_text
from spatialthinker.rewards import REWARDS, ROW_CHECKS, TEXT_REWARDS, RewardInput, bench, bench_typed, format_failure
from spatialthinker.rewards.explain import EXPLANATIONS, explain

USER_ERROR = 2
BATCH = 1024
PERCENTILES = (5, 25, 50, 75, 95)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line, by default the process's own; returns the exit code, 2 for a fault in the file."""
    print_any_text()
    options = _parser().parse_args(argv)
    if argv is None and "OMP_NUM_THREADS" not in os.environ:
        # numpy has read it by now, and on tables this small its threads cost double: start again with one
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        for line in options.run(options):
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
    except (OSError, ValueError, ModuleNotFoundError) as error:
        sys.stderr.write(f"{error}\n")
        return USER_ERROR
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m spatialthinker.rewards", description="Score recorded rollouts.")
    commands = parser.add_subparsers(required=True, metavar="{score,summary,bench,list}")
    score = commands.add_parser("score", help="write the scores of recorded rollouts as JSONL")
    summary = commands.add_parser("summary", help="print means, percentiles and the share of each format failure")
    speed = commands.add_parser("bench", help="print responses per second on one core")
    names = commands.add_parser("list", help="print the rewards, each with the first line of its description")
    for command in (score, summary):
        command.add_argument("file", type=Path, help="rollouts, one JSON object a line")
        command.add_argument("--truth", default="ground_truth", help="key of the ground truth (%(default)s)")
        command.add_argument("--kwargs", type=json.loads, default={}, help="the reward's keyword arguments as JSON")
    for command in (score, summary, speed):
        command.add_argument("--reward", choices=REWARDS, default="spatial_sgg")
    score.add_argument("--explain", action="store_true", help="print what was read and compared as text")
    score.add_argument("--out", type=Path, help="file for the scores (standard output)")
    speed.add_argument("--size", type=int, default=4096, help="responses a batch (%(default)s)")
    speed.add_argument("--seconds", type=float, default=1.0, help="time spent on each row (%(default)s)")
    score.set_defaults(run=_score)
    summary.set_defaults(run=_summarize)
    speed.set_defaults(run=_measure)
    described = [f"{name:<16}{(reward.__doc__ or '').splitlines()[0]}" for name, reward in REWARDS.items()]
    names.set_defaults(run=lambda _: described)
    return parser


def _measure(options: argparse.Namespace) -> Iterator[str]:
    report = bench_typed.report_typed if options.reward in bench_typed.ROWS else bench.report
    return report(options.reward, options.size, options.seconds)


def _read(path: Path, truth_key: str, reward: str) -> list[RewardInput]:
    """Returns the rollouts of a file; ValueError names the line that is at fault."""
    inputs = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                item = RewardInput(row["response"], row[truth_key], row.get("problem", ""), row.get("response_length"))
                if not isinstance(item.response, str) or not isinstance(item.ground_truth, _truth_types(reward)):
                    raise ValueError(f"response and {truth_key} must be strings")
                if reward in ROW_CHECKS:
                    ROW_CHECKS[reward](item.ground_truth, item.problem)
            except KeyError as error:
                raise ValueError(f"{path}:{number}: no key {error}") from None
            except (TypeError, AttributeError):
                raise ValueError(f"{path}:{number}: not a JSON object") from None
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
            inputs.append(item)
    if not inputs:
        raise ValueError(f"{path}: no rollouts")
    return inputs


def _truth_types(reward: str) -> type:
    return str if reward in TEXT_REWARDS else object


def _scores(inputs: list[RewardInput], options: argparse.Namespace) -> Iterator[dict[str, float]]:
    from tqdm import tqdm

    with tqdm(total=len(inputs), unit="response", disable=None) as progress:
        for start in range(0, len(inputs), BATCH):
            batch = inputs[start : start + BATCH]
            yield from REWARDS[options.reward](batch, **options.kwargs)
            progress.update(len(batch))


def _score(options: argparse.Namespace) -> Iterator[str]:
    inputs = _read(options.file, options.truth, options.reward)
    if options.explain and options.reward not in EXPLANATIONS:
        raise ValueError(f"--explain tells about the rewards {', '.join(EXPLANATIONS)}, not about {options.reward}")
    with options.out.open("w", encoding="utf-8") if options.out else nullcontext() as out:
        for number, (item, scores) in enumerate(zip(inputs, _scores(inputs, options), strict=True), start=1):
            if out:
                out.write(json.dumps(scores) + "\n")
            elif not options.explain:
                yield json.dumps(scores)
            if options.explain:
                terms = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
                yield "\n".join([f"response {number}: {terms}", *explain(options.reward, item), ""])


def _summarize(options: argparse.Namespace) -> Iterator[str]:
    inputs = _read(options.file, options.truth, options.reward)
    results = list(_scores(inputs, options))
    yield f"{len(inputs)} responses, {options.reward}"
    yield _row("", ["mean", *(f"p{p}" for p in PERCENTILES)])
    for name in results[0]:
        values = np.array([scores[name] for scores in results])
        yield _row(name, [f"{figure:.4f}" for figure in (values.mean(), *np.percentile(values, PERCENTILES))])
    if options.reward == "spatial_sgg":
        reasons = Counter(filter(None, (format_failure(item.response) for item in inputs)))
        yield f"format failures: {sum(reasons.values()) / len(inputs):.2%}"
        yield from (f"  {reason:<24}{count / len(inputs):>8.2%}" for reason, count in reasons.most_common())


def _row(name: str, cells: Sequence[Any]) -> str:
    return f"{name:<16}" + "".join(f"{cell:>9}" for cell in cells)


if __name__ == "__main__":
    sys.exit(main())

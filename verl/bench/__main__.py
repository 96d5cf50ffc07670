"""`python -m verl.bench step|rollout|ablation --config FILE`: see `verl.bench.measure`; `plan`: `verl.bench.plan`."""

import sys

from verl.bench import measure, plan


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark or the plan that the command line names; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    return plan.main(words[1:]) if words[:1] == ["plan"] else measure.main(words)


if __name__ == "__main__":
    sys.exit(main())

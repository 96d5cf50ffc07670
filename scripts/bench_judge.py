"""Cost of a judge behind an API for a step: its calls run while passes as long as they take the ranks' time.

python scripts/bench_judge.py --latency 1 --concurrency 64 --responses 256 --failing 0.2
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout's packages before installed ones

JUDGE = """
import asyncio, random
async def main(items, latency):
    await asyncio.sleep(latency)
    if random.random() < items[0]["ground_truth"]:
        raise ConnectionError("the judge did not answer")
    return [{"overall": 0.5}]
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=1.0, help="seconds of a call; default: %(default)s")
    parser.add_argument("--concurrency", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--responses", type=int, default=256, help="of a step, in groups of 8; default: %(default)s")
    parser.add_argument("--failing", type=float, default=0.2, help="share of calls that fail; default: %(default)s")
    parser.add_argument("--steps", type=int, default=3, help="default: %(default)s")
    given = parser.parse_args()
    from verl.reward import CallLimits, FileReward, RewardManager

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "judge.py"
        file.write_text(JUDGE)
        reward = FileReward(str(file), "main", {"latency": given.latency})
        limits = CallLimits(concurrency=given.concurrency)
        manager = RewardManager(reward, str(ROOT / "configs" / "toy_model"), 1, limits=limits)
        try:
            manager.probe("an answer", "a question", 0.0)  # the processes have started
            for failing in (0.0, given.failing):
                measure(manager, failing, given)
        finally:
            manager.close()


def measure(manager: Any, failing: float, given: argparse.Namespace) -> None:
    """Prints the seconds of steps with and without the judge, and what came back."""
    from verl.reward.items import ScoringGroup

    passes_s = given.latency * -(-given.responses // given.concurrency)
    groups = [ScoringGroup(["an answer"] * 8, "a question", failing, str(row)) for row in range(given.responses // 8)]
    for step in range(given.steps):
        started = time.monotonic()
        pending = manager.submit_groups(groups)
        time.sleep(passes_s)  # the log-probs, on other processes
        scores = pending.result()["overall"]
        seconds = time.monotonic() - started
        counts = ", ".join(f"{name} {number:g}" for name, number in pending.counts.items())
        print(
            f"step {step + 1}, {failing:.0%} failing: passes {passes_s:.2f} s, step {seconds:.2f} s "
            f"(+{seconds / passes_s - 1:.1%}), {int(scores.isnan().sum())} of {scores.numel()} lost; {counts}",
            flush=True,
        )


if __name__ == "__main__":
    main()

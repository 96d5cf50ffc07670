"""Measure the local engines of evaluation/evals.py on synthetic scenes: seconds to answer (load apart), peak memory.

python3 scripts/bench_evaluation.py --items 500 --max_tokens 160 [--model_path MODEL]
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from spatialthinker.schema import parquet_path, write_parquet
from spatialthinker.synthetic import generate

ROOT = Path(__file__).resolve().parents[1]


def measure(provider: str, args: argparse.Namespace, data: Path, out: Path) -> tuple[float, float]:
    """Return (seconds to answer all items, peak memory in GiB) of one run in a process of its own."""
    command = [sys.executable, "evaluation/evals.py", "--dataset", "stvqa", "--template", "spatial_thinker_full"]
    command += ["--data_path", str(data), "--model_path", args.model_path, "--provider", provider]
    command += ["--batch_size", str(args.batch_size), "--max_tokens", str(args.max_tokens), "--output_dir", str(out)]
    log = out / f"{provider}.log"
    with log.open("w") as handle:
        process = subprocess.Popen([*command, "--custom_filename", provider], cwd=ROOT, stdout=handle, stderr=handle)
        _, status, usage = os.wait4(process.pid, 0)
    text = log.read_text()
    found = re.search(r"answered in ([\d.]+) s", text)
    if os.waitstatus_to_exitcode(status) or found is None:
        raise SystemExit(text[-3000:])
    return float(found[1]), usage.ru_maxrss / 2**20


def main() -> None:
    """Print one line for each engine and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--batch_size", type=int, default=4, help="of huggingface (default: 4)")
    parser.add_argument("--max_tokens", type=int, default=160)
    parser.add_argument("--model_path", default="configs/toy_model")
    parser.add_argument("--providers", default="vllm,huggingface")
    args = parser.parse_args()
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        rows = [row for _, row in generate(args.items, seed=5, split="val")]
        write_parquet(rows, parquet_path(data, "val"))
        for provider in args.providers.split(","):
            seconds[provider], peak_gb = measure(provider, args, data, Path(folder))
            rate = args.items / seconds[provider]
            print(f"{provider:12} {seconds[provider]:8.1f} s {rate:8.1f} items/s, peak {peak_gb:.2f} GiB", flush=True)
    if len(seconds) > 1:
        first, second = seconds
        print(f"{first} is {seconds[second] / seconds[first]:.1f} times as fast as {second}")


if __name__ == "__main__":
    main()

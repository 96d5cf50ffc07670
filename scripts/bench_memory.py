#!/usr/bin/env python3
"""Host memory of a step's batch over prompts and responses per prompt: images must count once per prompt.

    python3 scripts/bench_memory.py [--prompts 64 128] [--samples 1 4 16] [--response_tokens 512] [--image_kb 192]

The driver's way of a step, over real Ray and two ranks on this machine: collate prompts with one noise image each,
send them to be answered, unite, balance, send groups with their images to the ranks. Each line is measured in a
process and a cluster of its own: the images and response tokens of the batch, what the driver holds in memory of its
own over that before the batch, and the object store over that before, while the ranks hold what they were sent; both
also without the tokens, which alone may grow with n. The last line fits both by least squares over all lines.
"""

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout's packages before installed ones


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--response_tokens", type=int, default=512)
    parser.add_argument("--image_kb", type=int, default=192)
    parser.add_argument("--one_line", action="store_true", help="measure the first line in this process, as JSON")
    options = parser.parse_args()
    response_tokens, image_kb = options.response_tokens, options.image_kb
    if options.one_line:
        from verl.bench.step_memory import measure_alone

        print(json.dumps(measure_alone(options.prompts[0], options.samples[0], response_tokens, image_kb)))
        return
    print("                          tokens   driver   without   store   without")
    print("prompts   n   images MB       MB       MB    tokens      MB    tokens")
    rows = []
    for prompts, samples in itertools.product(options.prompts, options.samples):
        command = [sys.executable, __file__, "--one_line", f"--prompts={prompts}", f"--samples={samples}"]
        command += [f"--response_tokens={response_tokens}", f"--image_kb={image_kb}"]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        images, tokens, driver, store = json.loads(out.splitlines()[-1])
        rows.append((prompts, prompts * samples * response_tokens, driver, store))
        line = f"{prompts:7} {samples:3} {images:11.1f} {tokens:8.1f} {driver:8.1f} {driver - tokens:9.1f}"
        print(f"{line} {store:7.1f} {store - tokens:9.1f}", flush=True)
    table = np.array(rows)
    for name, column in (("driver", 2), ("object store", 3)):
        (per_prompt, per_token), *_ = np.linalg.lstsq(table[:, :2], table[:, column] * 1e6, rcond=None)
        print(f"{name}: {per_prompt / 1000:.0f} kB a prompt + {per_token:.1f} bytes a response token")


if __name__ == "__main__":
    main()

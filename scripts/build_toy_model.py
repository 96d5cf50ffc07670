"""Build the toy Qwen2.5-VL from nothing: tokenizer, processor, and weights trained on written replies.

    python scripts/build_toy_model.py --out configs/toy_model                  # minutes on one GPU
    python scripts/build_toy_model.py --out /tmp/toy --steps 5 --rows 512      # smoke test on a CPU

First it learns from gold replies. Supervised learning alone lets such a model write perfect replies about pictures it
ignores. Two things tie them to the image: a side task for the vision encoder (the object in each cell and its box),
and more weight on the tokens that depend on the image. The gap between the loss with the right images and with
shuffled ones shows whether it does.

Then it learns for a moment from a careless teacher (`careless_reply`), who often ticks the first option, draws boxes
roughly and sometimes skips the reasoning. What comes out sees well and answers badly, which is where a policy starts
that reinforcement learning can improve within minutes.
"""

import argparse
import math
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout's packages before installed ones

from spatialthinker.versions import find_version_faults


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the toy model's folder: tokenizer, processor, weights.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="go on from this toy model's folder instead of random weights")
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--steps", type=int, default=8000, help="steps on gold replies")
    parser.add_argument("--seconds", type=float, default=math.inf, help="time for them; the learning rate follows it")
    parser.add_argument("--careless_steps", type=int, default=400, help="steps on the careless teacher's replies")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--image_weight", type=float, default=3.0, help="loss weight of image-dependent tokens")
    parser.add_argument("--cell_weight", type=float, default=0.3, help="first weight of the tower's side task")
    parser.add_argument("--examine_every", type=int, default=250)
    parser.add_argument("--examine_rows", type=int, default=512)
    parser.add_argument("--save_at", type=float, nargs="*", default=[0.55, 0.65, 0.75], help="greedy accuracies")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    if faults := find_version_faults(("torch", "torchvision", "torchaudio", "transformers")):
        parser.error("\n".join(faults))
    from toy.training import build

    build(options)


if __name__ == "__main__":
    main()

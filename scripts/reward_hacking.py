"""Draws what a small policy learns under the spatial reward with and without its count term and gates.

    python scripts/reward_hacking.py --out docs/reward_hacking.png

The policy is a softmax over the number of boxes that it writes for each true object, trained by the policy gradient
with group-relative advantages on synthetic rows. Responses are real texts, scores come from the real reward, and the
reward's keywords are all that differs between the curves. One thing is assumed and not learned: room spent on boxes
is missing for thought, so every doubling of the boxes costs THOUGHT_LOST of the chance to answer right. A doubling
adds 0.04 to 0.07 to the spatial term, 0.014 to 0.03 to the ungated reward, so boxes pay while it costs less than 0.03
to 0.06 of accuracy; at THOUGHT_LOST = 0.02 the policy hacks. That and how far accuracy falls
is the assumption's doing; that boxes multiply where they are cheap is the reward's.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from spatialthinker.response import section
from spatialthinker.rewards import REWARDS, RewardInput
from spatialthinker.schema import VqaRow
from spatialthinker.synthetic import generate

VARIANTS: dict[str, dict] = {
    "format, accuracy": dict(count_weight=0.0, spatial_weight=0.0),
    "+ spatial, no count, no gate": dict(count_weight=0.0, spatial_weight=0.4, accuracy_gate=False),
    "+ count (no gate)": dict(accuracy_gate=False),
    "+ gate (the full reward)": {},
}
"""The paper's build-up of its reward, each a line of keywords; without the count its weight goes to the boxes."""

BOX_COUNTS = np.array([1, 2, 4, 8, 16])
SKILL, THOUGHT_LOST = 0.8, 0.02
JITTER = 0.35
"""Spread of a written box around the true one, in sides of the true one."""
GROUPS, SAMPLES = 24, 8
LEARNING_RATE = 0.8


def write_response(row: VqaRow, boxes_per_object: int, rng: np.random.Generator) -> tuple[str, bool]:
    """Returns a response that writes so many boxes for each true object, and whether its answer is right."""
    scene = json.loads(section(row.answer_option_text, "scene") or "")
    objects = []
    for item in scene["objects"]:
        x1, y1, x2, y2 = item["bbox"]
        for centre_x, centre_y, scale in rng.normal(0.0, JITTER, (boxes_per_object, 3)):
            width, height = (x2 - x1) * np.exp(scale), (y2 - y1) * np.exp(scale)
            x, y = x1 + centre_x * (x2 - x1), y1 + centre_y * (y2 - y1)
            label = item["id"].split(".")[0]
            bbox = [round(float(v), 1) for v in (x, y, x + width, y + height)]
            objects.append({"id": f"{label}.{len(objects) + 1}", "bbox": bbox})
    is_right = bool(rng.random() < SKILL - THOUGHT_LOST * np.log2(boxes_per_object))
    answer = row.answer_option_text_only if is_right else "(Z) something else"
    text = json.dumps(scene | {"objects": objects})
    return f"<observe>o</observe>\n<scene>{text}</scene>\n<think>t</think>\n<answer>{answer}</answer>", is_right


def train(rows: list[VqaRow], kwargs: dict, steps: int, seed: int) -> np.ndarray:
    """Returns reward, accuracy and boxes per true object of each step. [steps, 3]"""
    rng = np.random.default_rng(seed)
    logits = np.array([1.0, 0.0, 0.0, 0.0, 0.0])
    curve = []
    for _ in range(steps):
        policy = np.exp(logits) / np.exp(logits).sum()
        actions = rng.choice(len(BOX_COUNTS), p=policy, size=(GROUPS, SAMPLES))
        drawn = rng.choice(len(rows), GROUPS)
        written = [
            write_response(rows[row], int(BOX_COUNTS[action]), rng)
            for row, group in zip(drawn, actions, strict=True)
            for action in group
        ]
        inputs = [
            RewardInput(text, rows[row].answer_option_text, rows[row].problem)
            for row, (text, _) in zip(np.repeat(drawn, SAMPLES), written, strict=True)
        ]
        scores = np.array([s["overall"] for s in REWARDS["spatial_sgg"](inputs, **kwargs)]).reshape(GROUPS, SAMPLES)
        advantages = (scores - scores.mean(1, keepdims=True)) / (scores.std(1, keepdims=True) + 1e-6)
        one_hot = np.eye(len(BOX_COUNTS))[actions]
        logits = logits + LEARNING_RATE * (advantages[..., None] * (one_hot - policy)).mean((0, 1))
        right = np.mean([is_right for _, is_right in written])
        curve.append((scores.mean(), right, BOX_COUNTS[actions].mean()))
    return np.array(curve)


def draw_curves(curves: dict[str, np.ndarray], path: Path) -> None:
    """Writes the figure: one panel for each of reward, accuracy and boxes, running means over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    titles = ("reward that is trained on", "accuracy", "boxes per true object")
    window = min(20, len(next(iter(curves.values()))))
    for column, (panel, title) in enumerate(zip(panels, titles, strict=True)):
        for name, curve in curves.items():
            panel.plot(np.convolve(curve[:, column], np.ones(window) / window, mode="valid"), label=name)
        panel.set(title=title, xlabel="step")
        panel.grid(alpha=0.3)
    panels[2].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("docs/reward_hacking.png"))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if options.steps < 1:
        parser.error(f"got --steps {options.steps}; at least 1")
    rows = [row for _, row in generate(64, options.seed)]
    curves = {}
    for name, kwargs in VARIANTS.items():
        curves[name] = train(rows, kwargs, options.steps, options.seed)
        tail = max(1, options.steps // 10)
        first, last = curves[name][:tail].mean(0), curves[name][-tail:].mean(0)
        print(
            f"{name:30} reward {first[0]:.3f} -> {last[0]:.3f}  accuracy {first[1]:.3f} -> {last[1]:.3f}  "
            f"boxes {first[2]:.1f} -> {last[2]:.1f}",
            flush=True,
        )
    draw_curves(curves, options.out)


if __name__ == "__main__":
    sys.exit(main())

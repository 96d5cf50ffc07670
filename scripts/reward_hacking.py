"""Draws reward hacking: GRPO on the spatial reward with and without its count term and gate.

    python scripts/reward_hacking.py --out docs/reward_hacking.png

A small writer stands for the model. It sees every object of a synthetic row with an error of PERCEPTION_ERROR, writes
the box it sees and as many scattered guesses as it likes under the same label, and then answers from the scene that it
wrote: of several boxes with the asked label it takes any one, and it counts them all. What it learns is one softmax
over the number of boxes an object and their scatter. Responses are real texts, scores come from the real reward, and
advantages are the trainer's own; the curves differ by the reward's keywords alone, one by the advantage estimator.

No term makes boxes cost accuracy. They do on questions that are answered from the written scene, such as how many
there are; on all others the answers of a group agree, and there an extra box is the only difference that the
group's deviation is divided by. Two constants remain, and both are swept: the error of perception, and the share of
the answers that are read from the written scene rather than from what was seen.
"""

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout's packages before installed ones

from spatialthinker.rewards import REWARDS, RewardInput
from spatialthinker.schema import LETTERS, VqaRow
from spatialthinker.shapes import DEFAULT_CANVAS
from spatialthinker.synthetic import PLACES, Puzzle, generate, reference_scene

Floats = NDArray[np.float64]

BOX_COUNTS = (1, 2, 4, 8, 16)
SCATTERS = (0.0, 0.1, 0.2, 0.4)
CHOICES = tuple(product(BOX_COUNTS, SCATTERS))
"""Actions of the writer: boxes for each object, and the spread of the further ones in sides of the first."""

PERCEPTION_ERROR = 0.2
"""Spread of a seen box around the true one, in sides of the true one (centre) and in its logarithm (size)."""
READ_SHARE = 1.0
"""Share of the answers that are read from the written scene; the others are read from the boxes as they were seen."""
SWEEPS = {
    "error": ("error of perception", (0.05, 0.1, 0.2, 0.4, 0.8)),
    "read_share": ("share of answers read from the scene", (0.0, 0.25, 0.5, 0.75, 1.0)),
}
"""Argument of `train` -> its name in the figure and its values."""

CATEGORIES = ("relation", "existence", "instance_location", "distance", "count")
"""The questions of the synthetic rows that boxes alone can answer, in equal numbers."""
ROWS, GROUPS, SAMPLES = 200, 24, 8
LEARNING_RATE = 2.0


@dataclass(frozen=True)
class Setting:
    """Training settings of a writer: keywords of the reward, and the advantage estimator."""

    reward: dict[str, float | bool]
    estimator: str = "grpo"
    """A name of verl.algos.advantages.GROUP_ESTIMATORS."""
    learning_rate: float = LEARNING_RATE


UNGATED = {"count_weight": 0.0, "accuracy_gate": False}
SETTINGS = {
    "format, accuracy": Setting({"count_weight": 0.0, "spatial_weight": 0.0}),
    "+ spatial, no count, no gate": Setting(UNGATED),
    "the same, Dr. GRPO": Setting(UNGATED, "dr_grpo", 4 * LEARNING_RATE),
    "+ count, no gate": Setting({"accuracy_gate": False}),
    "+ gate: the full reward": Setting({}),
}
"""The paper's build-up of its reward. Dr. GRPO's advantages are not divided and so smaller: a larger rate."""
SWEPT = ("+ spatial, no count, no gate", "+ gate: the full reward")


def centre(box: Sequence[float]) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def side_of(first: Sequence[float], second: Sequence[float]) -> str:
    """Position of the first box relative to the second."""
    (x, y), (other_x, other_y) = centre(first), centre(second)
    if abs(x - other_x) >= abs(y - other_y):
        return "left of" if x < other_x else "right of"
    return "above" if y < other_y else "below"


def read_answer(puzzle: Puzzle, boxes: Sequence[Sequence[float]], number: int) -> str:
    """Returns the option that these boxes, one for each object of the question, and their number in the scene say."""
    match puzzle.category:
        case "count":
            return str(min(number, 4))
        case "relation":
            return side_of(boxes[0], boxes[1])
        case "existence":
            return "yes" if f" {side_of(boxes[0], boxes[1])} the " in puzzle.question else "no"
        case "distance":
            anchor, first, second = map(centre, boxes)
            nearer = 1 if math.dist(anchor, first) <= math.dist(anchor, second) else 2
            return puzzle.shapes[puzzle.evidence[nearer]].name
        case "instance_location":
            x, y = centre(boxes[0])
            ninth = (
                x / DEFAULT_CANVAS.width * 1.5 - 0.25,
                y / DEFAULT_CANVAS.height * 1.5 - 0.25,
            )  # centres at 0, 1/2, 1
            return min((puzzle.answer, *puzzle.wrong), key=lambda place: math.dist(ninth, PLACES[place]))
    raise ValueError(f"no box answers a question of the category {puzzle.category!r}")


def moved(boxes: Floats, spread: float, rng: np.random.Generator) -> Floats:
    """Returns boxes whose centres and log sizes are moved at random. [..., 4]"""
    sides, noise = boxes[..., 2:] - boxes[..., :2], rng.normal(0.0, spread, (*boxes.shape[:-1], 4))
    centres = (boxes[..., :2] + boxes[..., 2:]) / 2 + noise[..., :2] * sides
    half = sides * np.exp(noise[..., 2:]) / 2
    return np.concatenate([centres - half, centres + half], axis=-1)


class Writer:
    """Writes responses to one row, whose objects it has seen once."""

    def __init__(self, puzzle: Puzzle, row: VqaRow, error: float, read_share: float, rng: np.random.Generator) -> None:
        scene = reference_scene(puzzle)
        true = np.array([item["bbox"] for item in scene["objects"]], dtype=np.float64)
        self.puzzle, self.row, self.rng = puzzle, row, rng
        self.labels = [item["id"].partition(".")[0] for item in scene["objects"]]
        self.relations = json.dumps(scene["relationships"])
        self.read_share = read_share
        self.seen = moved(true, error, rng)  # [objects, 4]

    def write(self, num_boxes: int, scatter: float) -> RewardInput:
        """Returns a response with so many boxes for each object, the seen one first."""
        copies = np.repeat(self.seen[:, None], num_boxes, axis=1)
        copies[:, 1:] = moved(copies[:, 1:], scatter, self.rng)
        if self.rng.random() < self.read_share:
            picked = copies[np.arange(len(copies)), self.rng.integers(num_boxes, size=len(copies))]
            answer = read_answer(self.puzzle, picked.tolist(), num_boxes * len(copies))
        else:
            answer = read_answer(self.puzzle, self.seen.tolist(), len(copies))
        used, objects = Counter(), []
        for label, boxes in zip(self.labels, copies.round(1).tolist(), strict=True):
            for box in boxes:
                used[label] += 1
                objects.append(f'{{"id": "{label}.{used[label]}", "bbox": {box}}}')
        scene = f'{{"objects": [{", ".join(objects)}], "relationships": {self.relations}}}'
        letter = LETTERS[self.row.options.index(answer)]
        text = f"<observe>o</observe>\n<scene>{scene}</scene>\n<think>t</think>\n<answer>({letter}) {answer}</answer>"
        return RewardInput(text, self.row.answer_option_text, self.row.problem)


def train(
    rows: Sequence[tuple[Puzzle, VqaRow]], setting: Setting, steps: int, seed: int, error: float, read_share: float
) -> Floats:
    """Returns reward, accuracy and boxes per true object of each step. [steps, 3]"""
    import torch

    from verl.algos.advantages import GROUP_ESTIMATORS

    estimate = GROUP_ESTIMATORS[setting.estimator]
    rng = np.random.default_rng(seed)
    counts = np.array([number for number, _ in CHOICES])
    logits = -np.log2(counts)  # at the start every doubling is e times rarer
    curve = []
    for _ in range(steps):
        policy = np.exp(logits - logits.max())
        policy /= policy.sum()
        actions = rng.choice(len(policy), p=policy, size=(GROUPS, SAMPLES))
        inputs = []
        for group, index in zip(actions.tolist(), rng.choice(len(rows), GROUPS), strict=True):
            puzzle, row = rows[index]
            writer = Writer(puzzle, row, error, read_share, rng)
            inputs += [writer.write(*CHOICES[action]) for action in group]
        results = REWARDS["spatial_sgg"](inputs, **setting.reward)
        scores = torch.tensor([result["overall"] for result in results], dtype=torch.float64).reshape(GROUPS, SAMPLES)
        advantages = estimate(scores).numpy()
        gradient = advantages[..., None] * (np.eye(len(policy))[actions] - policy)  # on-policy: the ratio is 1
        logits = logits + setting.learning_rate * gradient.mean((0, 1))
        accuracy = np.mean([result["accuracy"] for result in results])
        curve.append((scores.mean(), accuracy, counts[actions].mean()))
    return np.array(curve)


def last(curves: Floats) -> Floats:
    """Returns the means over the last tenth of the steps. [..., 3]"""
    return curves[..., -max(1, curves.shape[-2] // 10) :, :].mean(-2)


def draw_figure(curves: dict[str, Floats], sweeps: dict[str, dict[str, Floats]], path: Path) -> None:
    """Writes the figure: curves over steps above, ends over the swept constants below; bands from least to most."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 7.2), layout="constrained")
    panels = figure.subplots(2, 4)

    def band(panel, x, lines: Floats, name: str) -> None:  # lines: [seeds, len(x)]
        colour = f"C{list(SETTINGS).index(name)}"
        panel.plot(x, lines.mean(0), color=colour, label=name, marker="o" if len(x) < 10 else None)
        panel.fill_between(x, lines.min(0), lines.max(0), color=colour, alpha=0.15, linewidth=0)

    titles = ("reward that is trained on", "accuracy", "boxes per true object")
    for column, (panel, title) in enumerate(zip(panels[0], titles, strict=False)):
        for name, runs in curves.items():
            window = min(20, runs.shape[1])
            smooth = np.stack([np.convolve(run, np.ones(window) / window, mode="valid") for run in runs[..., column]])
            band(panel, np.arange(smooth.shape[1]) + window, smooth, name)
        panel.set(title=title, xlabel="step")
    panels[0, 3].axis("off")
    panels[0, 3].legend(*panels[0, 0].get_legend_handles_labels(), loc="center left", frameon=False)
    for panel, ((constant, ends), column) in zip(panels[1], product(sweeps.items(), (1, 2)), strict=True):
        label, values = SWEEPS[constant]
        for name in SWEPT:
            band(panel, values, ends[name][..., column], name)
        panel.set(title=f"{titles[column]} at the end", xlabel=label)
    for panel in panels.flat:
        panel.grid(alpha=0.3)
    for panel in (*panels[0, 2:3], panels[1, 1], panels[1, 3]):
        panel.set_yscale("log", base=2)
        panel.set_yticks(BOX_COUNTS, map(str, BOX_COUNTS))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/reward_hacking.png"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args(argv)
    for name in ("steps", "seeds"):
        if getattr(options, name) < 1:
            parser.error(f"got --{name} {getattr(options, name)}; at least 1")
    rows = list(generate(ROWS, seed=0, categories=CATEGORIES))
    total = options.seeds * (len(SETTINGS) + len(SWEPT) * sum(len(values) for _, values in SWEEPS.values()))
    with tqdm(total=total, unit="run", disable=None) as progress:

        def runs(name: str, error: float = PERCEPTION_ERROR, read_share: float = READ_SHARE) -> Floats:
            """Curves of every seed. [seeds, steps, 3]"""
            curves = []
            for seed in range(options.seeds):
                curves.append(train(rows, SETTINGS[name], options.steps, seed, error, read_share))
                progress.update()
            return np.stack(curves)

        curves = {name: runs(name) for name in SETTINGS}
        for name, seeds in curves.items():
            first, end = seeds[:, : max(1, options.steps // 10)].mean(1), last(seeds)
            cells = (f"{a:.2f} -> {b:.2f}" for a, b in zip(first.mean(0), end.mean(0), strict=True))
            spread = f"{end[:, 2].min():.1f} to {end[:, 2].max():.1f}"
            tqdm.write("{:30} reward {}  accuracy {}  boxes {}".format(name, *cells) + f" ({spread})")
        sweeps: dict[str, dict[str, Floats]] = {constant: {} for constant in SWEEPS}
        for (constant, (_, values)), name in product(SWEEPS.items(), SWEPT):
            sweeps[constant][name] = np.stack([last(runs(name, **{constant: value})) for value in values], axis=1)
    draw_figure(curves, sweeps, options.out)


if __name__ == "__main__":
    sys.exit(main())

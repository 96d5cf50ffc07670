"""Throughput of the rewards of typed ground truths, on seeded random rows."""

import json
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from spatialthinker.rewards import REWARDS, RewardInput
from spatialthinker.rewards.bench import (
    IMAGE_SIZE,
    LABELS,
    MIN_BATCHES,
    PREDICATES,
    THOUGHTS,
    random_scene,
    seen_scene,
)

GROUP = 8
"""Responses to one row, as a trainer samples them."""


class Row(NamedTuple):
    """A row's ground truth and problem, and the answers that responses to it give."""

    ground_truth: Any
    question: str
    answers: list[str]
    scenes: list[str] | None = None
    """JSON of the scenes that the responses state."""


def _number_row(rng: random.Random) -> Row:
    true = round(rng.uniform(0.2, 40), 1)
    guesses = [round(true * rng.uniform(0.5, 1.5), rng.choice((1, 2))) for _ in range(GROUP)]
    forms = ("{} m", "{}", "about {} meters", "The distance is {} m.")
    return Row(f"{true} m", "How far is the cat from the dog?", [rng.choice(forms).format(x) for x in guesses])


def _random_box(rng: random.Random) -> list[int]:
    width, height = IMAGE_SIZE
    x, y = rng.randrange(width - 60), rng.randrange(height - 60)
    return [x, y, rng.randrange(x + 20, width), rng.randrange(y + 20, height)]


def _box_row(rng: random.Random) -> Row:
    truth = [{"bbox": _random_box(rng), "label": rng.choice(LABELS)} for _ in range(rng.randint(1, 6))]
    answers = []
    for _ in range(GROUP):
        seen = [{"bbox_2d": [v + rng.randrange(-9, 9) for v in t["bbox"]], "label": t["label"]} for t in truth]
        answers.append(json.dumps(rng.sample(seen, len(seen))))
    return Row(json.dumps(truth), "Find all things.", answers)


def _point_row(rng: random.Random) -> Row:
    width, height = IMAGE_SIZE
    x1, y1, x2, y2 = _random_box(rng)
    counts = [x1 * height + y1, *[y2 - y1, height - y2 + y1] * (x2 - x1)]
    mask = {"size": [height, width], "counts": [*counts[:-1], width * height - sum(counts[:-1])]}
    truth = json.dumps(mask if rng.random() < 0.5 else [x1, y1, x2, y2])
    stated = [[(rng.randint(x1, x2), rng.randint(y1, y2)) for _ in range(rng.randint(1, 5))] for _ in range(GROUP)]
    return Row(truth, "Point at it.", [str(points) for points in stated])


def _order_row(rng: random.Random) -> Row:
    truth = rng.sample(LABELS, rng.randint(3, 6))
    joint = rng.choice((", ", " > ", "\n"))
    return Row(truth, "Order them by depth.", [joint.join(rng.sample(truth, len(truth))) for _ in range(GROUP)])


def _choice_row(rng: random.Random) -> Row:
    options = [f"{side} the {rng.choice(LABELS)}" for side in rng.sample(PREDICATES, 4)]
    question = "Where is it?\nOptions:\n" + "\n".join(f"({x}) {text}" for x, text in zip("ABCD", options, strict=True))
    stated = [(rng.choice(("({}) {}", "{}", "{}. {}", "({})")), rng.randrange(4)) for _ in range(GROUP)]
    return Row(rng.choice("ABCD"), question, [form.format("ABCD"[i], options[i]) for form, i in stated])


def _relation_row(rng: random.Random) -> Row:
    truth = random_scene(rng, rng.randint(2, 8), rng.randint(1, 6))
    scenes = [seen_scene(rng, truth) for _ in range(GROUP)]
    return Row(truth, "How does it all relate?", ["As stated."] * GROUP, scenes)


def _scene_row(rng: random.Random) -> Row:
    """A question on where one thing is, seen from another."""
    scene = random_scene(rng, rng.randint(2, 8), rng.randint(1, 6))
    a, b = (item["id"].split(".")[0].replace("_", " ") for item in json.loads(scene)["objects"][:2])
    options = ("left of it", "right of it", "above it", "below it")
    question = f"Where is the {a} relative to the {b}?\nOptions:\n"
    question += "\n".join(f"({x}) {text}" for x, text in zip("ABCD", options, strict=True))
    answers = [f"({rng.choice('ABCD')})" for _ in range(GROUP)]
    return Row("", question, answers, [seen_scene(rng, scene) for _ in range(GROUP)])


ROWS: dict[str, Callable[[random.Random], Row]] = {
    "numbers": _number_row,
    "points": _point_row,
    "boxes": _box_row,
    "relations": _relation_row,
    "ordering": _order_row,
    "choice": _choice_row,
    "follows_scene": _scene_row,
    "length": _number_row,
}
"""Reward -> a random row of it."""


def typed_inputs(reward: str, rng: random.Random, num_answers: int = GROUP) -> list[RewardInput]:
    """Returns responses to one random row, one for each of its first `num_answers` answers."""
    row = ROWS[reward](rng)
    width, height = IMAGE_SIZE
    problem = f"<image> Answer.\n\nImage size: ({width} x {height})\n\nQ. {row.question}"
    scenes = [f"<scene>\n{scene}\n</scene>\n" for scene in row.scenes] if row.scenes else [""] * GROUP
    return [
        RewardInput(
            f"{scene}<think>\n{THOUGHTS}\n</think>\n<answer>\n{answer}\n</answer>",
            row.ground_truth,
            problem,
            rng.randrange(2500),
        )
        for scene, answer in zip(scenes[:num_answers], row.answers, strict=False)
    ]


def measure_typed(reward: str, batch_size: int, seconds: float, num_answers: int) -> tuple[float, float]:
    """Returns seconds of processor time and of wall time per response: the best of several batches of fresh rows."""
    rng = random.Random(0)
    best_cpu = best_wall = float("inf")
    spent, batches = 0.0, 0
    while spent < seconds or batches < MIN_BATCHES:
        inputs = [item for _ in range(batch_size // num_answers) for item in typed_inputs(reward, rng, num_answers)]
        cpu, wall = time.process_time(), time.perf_counter()
        REWARDS[reward](inputs)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        best_cpu, best_wall = min(best_cpu, cpu / len(inputs)), min(best_wall, wall / len(inputs))
        spent, batches = spent + cpu, batches + 1
    return best_cpu, best_wall


def report_typed(reward: str, batch_size: int, seconds: float) -> Iterator[str]:
    """Yields a table of speeds: groups of responses to one row, and a row for each response."""
    yield f"{reward}, batches of {batch_size} responses, every row fresh, one core"
    titles = ("responses a row", "responses/s", "us/response", "us of wall time")
    yield " ".join(f"{title:>15}" for title in titles)
    for num_answers in (GROUP, 1):
        cpu, wall = measure_typed(reward, batch_size, seconds, num_answers)
        cells = (str(num_answers), f"{1 / cpu:,.0f}", f"{1e6 * cpu:.1f}", f"{1e6 * wall:.1f}")
        yield " ".join(f"{cell:>15}" for cell in cells)

"""Throughput of the rewards on seeded random scenes."""

import json
import random
import time
from collections.abc import Iterator
from timeit import Timer

import numpy as np

from spatialthinker.geometry import OVERLAPS
from spatialthinker.matching import LABEL_COST, label_similarity
from spatialthinker.rewards import REWARDS, RewardInput
from spatialthinker.scene_graph import load_scene

IMAGE_SIZE = (800, 600)
LABELS = (
    "man woman dog cat car bus tree table chair lamp building window door sign traffic_light street_light shirt hat "
    "fire_hydrant hot_dog bag phone cup plate bottle book bed pillow potted_plant surfboard skateboard horse sheep "
    "elephant fence grass sky wave ball racket bike bench pole laptop person"
).split()
PREDICATES = ("left of", "right of", "on", "under", "next to", "near", "holding", "in front of", "behind")
THOUGHTS = "The question asks where one thing is, seen from another. " * 6
MIN_BATCHES = 3
SIZES = ((1, 8), (8, 8), (16, 16), (32, 32), (64, 64), (100, 100))
"""Fewest and most objects of a scene; the first row is what the reward is meant for."""


def random_scene(rng: random.Random, num_objects: int, num_relations: int) -> str:
    """Returns the JSON text of a scene of random objects and relations."""
    width, height = IMAGE_SIZE
    ids = [f"{rng.choice(LABELS)}.{index}" for index in range(1, num_objects + 1)]
    objects = []
    for object_id in ids:
        x, y = rng.randrange(width - 20), rng.randrange(height - 20)
        objects.append({"id": object_id, "bbox": [x, y, rng.randrange(x + 5, width), rng.randrange(y + 5, height)]})
    relations = [
        {"subject": rng.choice(ids), "predicate": rng.choice(PREDICATES), "object": rng.choice(ids)}
        for _ in range(num_relations)
    ]
    return json.dumps({"objects": objects, "relationships": relations})


def seen_scene(rng: random.Random, scene: str) -> str:
    """Returns a scene as a trained model would write it: the same objects, shuffled, boxes moved by 5 % of a side."""
    graph = json.loads(scene)
    rng.shuffle(graph["objects"])
    for item in graph["objects"]:
        x1, y1, x2, y2 = item["bbox"]
        sides = (x2 - x1, y2 - y1) * 2
        item["bbox"] = [round(v + rng.gauss(0, 0.05) * side, 1) for v, side in zip(item["bbox"], sides, strict=True)]
    return json.dumps(graph)


def random_input(
    rng: random.Random, num_objects: tuple[int, int] = (1, 8), max_relations: int = 6, is_near: bool = False
) -> RewardInput:
    """Returns a well-formed response with the right answer to a row, both of fresh random scenes.

    With `is_near` the response's scene is the row's as a trained model would write it.
    """
    scenes = [random_scene(rng, rng.randint(*num_objects), rng.randint(0, max_relations)) for _ in range(2)]
    if is_near:
        scenes[0] = seen_scene(rng, scenes[1])
    problem = f"<image> Answer with a scene graph.\n\nImage size: ({IMAGE_SIZE[0]} x {IMAGE_SIZE[1]})\n\nQ. Where?"
    return RewardInput(
        f"<observe>\nSome things.\n</observe>\n<scene>\n{scenes[0]}\n</scene>\n<think>\n{THOUGHTS}\n</think>\n"
        "<answer>\n(B) left of it\n</answer>",
        f"<scene>{scenes[1]}</scene>\n<answer>(B) left of it</answer>",
        problem,
    )


def measure(
    reward: str, batch_size: int, num_objects: tuple[int, int], seconds: float, is_near: bool = False
) -> float:
    """Returns seconds of processor time per response on one core: the best of several batches of fresh scenes."""
    rng = random.Random(0)
    REWARDS[reward]([random_input(rng) for _ in range(64)])  # loads the vectors
    best, spent, batches = float("inf"), 0.0, 0
    while spent < seconds or batches < MIN_BATCHES:
        inputs = [random_input(rng, num_objects, is_near=is_near) for _ in range(batch_size)]
        start = time.process_time()
        REWARDS[reward](inputs)
        elapsed = time.process_time() - start
        best, spent, batches = min(best, elapsed), spent + elapsed, batches + 1
    return best / batch_size


def measure_assignment(num_objects: tuple[int, int]) -> float:
    """Returns seconds that the Hungarian method alone takes per scene: what no code around it can shorten."""
    from scipy.optimize import linear_sum_assignment

    rng = random.Random(0)
    gains = []
    for _ in range(32):
        truth, scene = (load_scene(random_scene(rng, rng.randint(*num_objects), 0)) for _ in range(2))
        boxes, other = (np.array(graph.boxes) / (IMAGE_SIZE * 2) for graph in (truth, scene))
        labels = ([item.label for item in graph.objects] for graph in (truth, scene))
        gains.append(LABEL_COST * label_similarity(*labels) + OVERLAPS["ciou"](boxes[:, None], other))
    timer = Timer(lambda: [linear_sum_assignment(gain, maximize=True) for gain in gains], timer=time.process_time)
    return min(timer.repeat(repeat=5, number=1)) / len(gains)


def report(reward: str, batch_size: int, seconds: float) -> Iterator[str]:
    """Yields a table of speeds over the size of the scenes.

    Two scenes drawn apart are the dearest to match; those of a trained model's responses resemble their truths.
    """
    yield f"{reward}, batches of {batch_size} responses, every scene fresh, one core"
    titles = ("objects a scene", "responses/s", "us/response", "us/object", "of it assigning", "us/object near")
    yield " ".join(f"{title:>15}" for title in titles)
    times, near_times = [], []
    for low, high in SIZES:
        size = batch_size if high <= SIZES[0][1] else max(min(64, batch_size), batch_size // high)
        num_objects = (low + high) / 2
        response_us = 1e6 * measure(reward, size, (low, high), seconds)
        times.append(response_us / num_objects)
        near_times.append(1e6 * measure(reward, size, (low, high), seconds, is_near=True) / num_objects)
        assigning = 1e6 * measure_assignment((low, high)) / num_objects if reward == "spatial_sgg" else 0.0
        cells = [f"{low} to {high}" if low < high else str(high), f"{1e6 / response_us:,.0f}", f"{response_us:.1f}"]
        cells += [f"{figure:.2f}" for figure in (times[-1], assigning, near_times[-1])]
        yield " ".join(f"{cell:>15}" for cell in cells)
    yield (
        f"an object among {SIZES[-1][1]} takes {times[-1] / times[0]:.2f} times the time of the first row, "
        f"{near_times[-1] / near_times[0]:.2f} times where scenes resemble their truths"
    )

"""How fast the rewards are: seeded random scenes and a stopwatch."""

import json
import random
import time
from collections.abc import Iterator

from spatialthinker.rewards import REWARDS, RewardInput

IMAGE_SIZE = (800, 600)
LABELS = (
    "man woman dog cat car bus tree table chair lamp building window door sign traffic_light street_light shirt hat "
    "fire_hydrant hot_dog bag phone cup plate bottle book bed pillow potted_plant surfboard skateboard horse sheep "
    "elephant fence grass sky wave ball racket bike bench pole laptop person"
).split()
PREDICATES = ("left of", "right of", "on", "under", "next to", "near", "holding", "in front of", "behind")
THOUGHTS = "The question asks where one thing is, seen from another. " * 6
MIN_BATCHES = 3


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


def random_input(rng: random.Random, num_objects: tuple[int, int] = (1, 8), max_relations: int = 6) -> RewardInput:
    """Returns a well-formed response with the right answer to a row, both of fresh random scenes."""
    scenes = [random_scene(rng, rng.randint(*num_objects), rng.randint(0, max_relations)) for _ in range(2)]
    problem = f"<image> Answer with a scene graph.\n\nImage size: ({IMAGE_SIZE[0]} x {IMAGE_SIZE[1]})\n\nQ. Where?"
    return RewardInput(
        f"<observe>\nSome things.\n</observe>\n<scene>\n{scenes[0]}\n</scene>\n<think>\n{THOUGHTS}\n</think>\n"
        "<answer>\n(B) left of it\n</answer>",
        f"<scene>{scenes[1]}</scene>\n<answer>(B) left of it</answer>",
        problem,
    )


def measure(reward: str, batch_size: int, num_objects: tuple[int, int], seconds: float) -> float:
    """Returns responses per second of processor time on one core: the best of several batches of fresh scenes."""
    rng = random.Random(0)
    REWARDS[reward]([random_input(rng) for _ in range(64)])  # loads the vectors
    best, spent, batches = float("inf"), 0.0, 0
    while spent < seconds or batches < MIN_BATCHES:
        inputs = [random_input(rng, num_objects) for _ in range(batch_size)]
        start = time.process_time()
        REWARDS[reward](inputs)
        elapsed = time.process_time() - start
        best, spent, batches = min(best, elapsed), spent + elapsed, batches + 1
    return batch_size / best


def report(reward: str, batch_size: int, seconds: float) -> Iterator[str]:
    """Yields a table of speeds over the size of the scenes."""
    yield f"{reward}, batches of {batch_size} responses, every scene fresh, one core"
    yield f"{'objects a scene':>16} {'responses/s':>12} {'us/response':>12} {'us/object':>12}"
    for num_objects in ((1, 8), (8, 8), (16, 16), (32, 32), (64, 64), (100, 100)):
        size = batch_size if num_objects[1] <= 8 else max(64, batch_size // num_objects[1])
        rate = measure(reward, size, num_objects, seconds)
        label = f"{num_objects[0]} to {num_objects[1]}" if num_objects[0] < num_objects[1] else str(num_objects[0])
        yield f"{label:>16} {rate:>12,.0f} {1e6 / rate:>12.1f} {2e6 / rate / sum(num_objects):>12.2f}"

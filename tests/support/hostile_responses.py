"""Seeded hostile responses: well-formed ones that are cut, spliced, repeated and poisoned, and noise of many kinds."""

import json
import random

from spatialthinker.response import SECTIONS
from spatialthinker.rewards import RewardInput
from spatialthinker.rewards.bench import random_input

NUMBERS = (
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e308", "-0.0", "1e-400", "true", "false", "null", '"7"', "[]",
    "{}", "01", "1.", ".5", "1e", "0x10", "1_000", "９", "٣", "9" * 30, "9" * 400, "-" + "9" * 5000, "1" + "0" * 308,
)  # fmt: skip
FRAGMENTS = (
    "\ud800", "\udfff\ud800", "\0", "\u2028", "\ufeff", "\u202e", "日本語", "العربية", "\U0001f408", "e\u0301" * 20,
    "</", "<", "</answer>", "<answer>", "<scene>", "</scene>", "<think>", "</think>", "<observe>", "```json",
    "\\u0000", "\\ud800", "\\", '"', "'", "{", "}", "[", "]", ",", ":", "[" * 2000, '{"a":' * 2000, "((" * 500,
    "a" * 5000, " " * 5000, "\\boxed{", "\\frac{1}{0}", "\\text{" * 50, "1/0", "9" * 5000, "(A)(B)(C)", "None", "nan",
    "%s%n{0}", "__import__('os')", "9**9**9**9", "\n" * 300, "<answer></answer>" * 200, "(x+x)*" * 300, "$" * 500,
)  # fmt: skip
IDS = (
    "cat",
    "cat.",
    ".1",
    "cat.1.1",
    "dog2.1",
    "a b.1",
    "ca\nt.1",
    "犬.1",
    "cant.1",
    "__.0",
    "x" * 300 + ".1",
    "CAT.٣",
)


def hostile_response(rng: random.Random) -> str:
    """Returns one response; about one in five is still well-formed."""
    kind = rng.random()
    if kind < 0.1:
        return "".join(rng.choice(FRAGMENTS) for _ in range(rng.randrange(12)))
    if kind < 0.2:
        tags = [f"<{rng.choice(('', '/'))}{rng.choice(SECTIONS)}>" for _ in range(rng.randrange(40))]
        return "".join(tag + rng.choice(("", " ", "x", "{}", rng.choice(FRAGMENTS))) for tag in tags)
    text = random_input(rng, (0, 6) if kind < 0.3 else (1, 6), 0 if kind < 0.3 else 4).response
    if kind < 0.55:
        text = _with_scene(text, _poisoned_scene(rng))
    for _ in range(rng.choice((0, 0, 1, 1, 2, 6))):
        text = mutated(text, rng)
    return text


def _with_scene(text: str, scene: str) -> str:
    start, end = text.index("<scene>") + 7, text.index("</scene>")
    return text[:start] + scene + text[end:]


def _poisoned_scene(rng: random.Random) -> str:
    number = rng.choice((1, 2, 5, 10_000 if rng.random() < 0.02 else 300))
    box = [rng.choice(NUMBERS) if rng.random() < 0.1 else str(rng.randrange(-50, 900)) for _ in range(4)]
    name = json.dumps(rng.choice(IDS)) if rng.random() < 0.3 else None
    objects = [f'{{"id": {name or json.dumps(f"cat.{i}")}, "bbox": [{", ".join(box)}]}}' for i in range(number)]
    relation = f'{{"subject": "cat.1", "predicate": {json.dumps(rng.choice(FRAGMENTS))}, "object": "cat.2"}}'
    relations = ", ".join([relation] * rng.randrange(3))
    return rng.choice(
        (
            f'{{"objects": [{", ".join(objects)}], "relationships": [{relations}]}}',
            f'{{"objects": [{", ".join(objects)}]}}',
            f'{{"relationships": [{relations}], "extra": {rng.choice(NUMBERS)}}}',
            f'{{"objects": {rng.choice(NUMBERS)}}}',
        )
    )


def mutated(text: str, rng: random.Random) -> str:
    start = rng.randrange(len(text) + 1)
    end = min(len(text), start + rng.choice((0, 1, 1, 5, 50, 1000)))
    match rng.randrange(6):
        case 0:
            return text[:start] + text[end:]
        case 1:
            return text[:start] + rng.choice(FRAGMENTS) + text[start:]
        case 2:
            return text[:start] + rng.choice(NUMBERS) + text[end:]
        case 3:
            return text[:end] + text[start:]
        case 4:
            return text[:start]
        case _:
            letters = list(text[start:end])
            rng.shuffle(letters)
            return text[:start] + "".join(letters) + text[end:]


def hostile_input(rng: random.Random) -> RewardInput:
    """Returns a hostile response to a sound row."""
    row = random_input(rng, (0, 5) if rng.random() < 0.2 else (1, 5), 0)
    return RewardInput(hostile_response(rng), row.ground_truth, row.problem)

"""Cost estimate of a run without a call: tokens counted on the first scenes, prices from one table.

Tokens are estimated from characters, by the ratios that the last tokenizer published by Anthropic has on these very
texts (the one in `anthropic==0.34`): 4.17 characters a token for the instructions, 3.51 for the schema, 2.46 for a
scene of twelve objects and seven relations, whose request has 297 tokens; complete replies have 87 to 114. Images:
width x height / 750 at Anthropic, 85 + 170 for each tile of 512 pixels at OpenAI, after each provider's downscaling.
What is assumed of a run and not measured, replies asked for again and calls that find the cache, is printed with the
values up to which the result holds; `report` shows what a run really had.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice

from data_gen.generate.options import GenerationOptions
from data_gen.generate.requests import choose_wish, make_request
from data_gen.questions.prompts import REPLY_SCHEMA, SYSTEM_PROMPT
from data_gen.questions.quotas import Steering
from data_gen.scenes.scene import Scene, SceneFault, read_scene
from data_gen.scenes.sources import Source
from spatialthinker.clients.prices import MILLION, Price, Usage, cost_usd, find_price
from spatialthinker.storage.journal import JournalFault

RELEASED_IMAGES = 56_224
RELEASED_USAGE = Usage(input=235_000_000, output=5_000_000)
"""Cost in the released generator's notes for its full run: text only, one call an image, nothing cached."""

SAMPLE_SCENES = 500
PROSE_CHARS, SCHEMA_CHARS, GRAPH_CHARS = 4.1, 3.5, 2.4
TOOL_TOKENS = 320
"""Tokens that Anthropic adds to a request with a forced tool; OpenAI's note on a schema is shorter."""

OUTPUT_TOKENS = 160
"""A reply and the words around a tool's input."""

REPAIR_SHARE, CACHE_SHARE = 0.1, 0.9
"""Assumed: one reply in ten is asked for again; nine calls in ten find the static part cached. Anthropic states hits
of 30 to 98 % for batches, by how close together their requests run; here all thousand of a batch share the part."""

TARGET_SHARE = 0.3
"""Of the released way's price: what caching and batches together are to stay under."""


@dataclass(frozen=True)
class CallShape:
    """Mean tokens of one call."""

    static: int
    """Instructions and schema: the same in every call, and so served by the cache."""
    changing: int
    """Scene and wish."""
    image: int
    output: int


STATIC_TOKENS = round(len(SYSTEM_PROMPT) / PROSE_CHARS + len(json.dumps(REPLY_SCHEMA)) / SCHEMA_CHARS + TOOL_TOKENS)
VG150_SHAPE = CallShape(static=STATIC_TOKENS, changing=320, image=640, output=OUTPUT_TOKENS)
"""A call for an image of Visual Genome: 800 x 600 pixels, twelve objects and seven relations, VG150's means."""


def image_tokens(width: int, height: int, provider: str) -> int:
    """Tokens of an image of this size."""
    if provider == "anthropic":
        scale = min(1.0, 1568 / max(width, height), math.sqrt(1600 * 750 / (width * height)))
        return math.ceil(width * scale * height * scale / 750)
    scale = min(1.0, 2048 / max(width, height))
    scale *= min(1.0, 768 / (min(width, height) * scale))
    return 85 + 170 * math.ceil(width * scale / 512) * math.ceil(height * scale / 512)


def plan_usage(shape: CallShape, num_images: int, repair_share: float, cache_share: float) -> Usage:
    """Tokens of a run: every image once, `repair_share` of them a second time with the reply before added.

    `cache_share` of the calls find the static part in the cache; the others write it there.
    """
    calls = num_images * (1 + repair_share)
    hits = calls * cache_share
    return Usage(
        input=round(calls * (shape.changing + shape.image) + num_images * repair_share * shape.output),
        output=round(calls * shape.output),
        cache_read=round(hits * shape.static),
        cache_write=round((calls - hits) * shape.static),
    )


def measure(source: Source, options: GenerationOptions) -> CallShape:
    """Mean tokens of a call over the first scenes of a source."""
    steering = Steering(options.relation_percent)
    changing, images = [], []
    for index, row in enumerate(islice(source.rows(), min(SAMPLE_SCENES, options.data_cap or SAMPLE_SCENES))):
        try:
            scene: Scene = read_scene(row, index, source.root)
        except SceneFault:
            continue
        if (wish := choose_wish(scene, steering, options.has_image)) is None:
            continue
        steering.add(wish.asked)
        changing.append(len(make_request(scene, wish, options.has_image, 0.0).text) / GRAPH_CHARS)
        images.append(image_tokens(scene.width, scene.height, options.provider) if options.has_image else 0)
    if not changing:
        raise JournalFault(f"--source {options.source}: none of its first scenes carries a question")
    mean = round(sum(changing) / len(changing)), round(sum(images) / len(images))
    return CallShape(STATIC_TOKENS, mean[0], mean[1], OUTPUT_TOKENS)


def released_cost_usd(num_images: int, price: Price) -> float:
    """Dollars of the released generator's run for this many images."""
    return num_images / RELEASED_IMAGES * cost_usd(RELEASED_USAGE, price)


def ways(shape: CallShape, num_images: int) -> dict[str, tuple[Usage, bool]]:
    """Name of a way to run, its tokens, and whether it goes by batch."""
    cached = plan_usage(shape, num_images, REPAIR_SHARE, CACHE_SHARE)
    bare = plan_usage(replace(shape, static=0), num_images, REPAIR_SHARE, 0.0)
    uncached = replace(bare, input=bare.input + cached.cache_read + cached.cache_write)
    return {"no cache": (uncached, False), "cache": (cached, False), "cache and batch": (cached, True)}


def describe(shape: CallShape, num_images: int, model: str) -> str:
    """The table of prices that --dry_run prints, and the arithmetic behind its last line."""
    price = find_price(model)
    if price is None:
        raise JournalFault(f"no price is known of {model!r}; see spatialthinker/clients/prices.py")
    released = released_cost_usd(num_images, price)
    lines = [
        f"{num_images} images, {model}. Tokens a call: {shape.static} static, {shape.changing} changing, "
        f"{shape.image} image, {shape.output} output",
        f"assumed: {REPAIR_SHARE:.0%} asked twice; {CACHE_SHARE:.0%} of calls find the static part cached, "
        "the others write it there",
        f"{'way':<22}{'million in':>12}{'cached':>10}{'out':>8}{'dollars':>10}{'share':>8}",
        f"{'released, text only':<22}{RELEASED_USAGE.input * num_images / RELEASED_IMAGES / 1e6:>12.1f}{0:>10}"
        f"{RELEASED_USAGE.output * num_images / RELEASED_IMAGES / 1e6:>8.1f}{released:>10.2f}{1:>8.0%}",
    ]
    for name, (usage, is_batch) in ways(shape, num_images).items():
        dollars, cached = cost_usd(usage, price, is_batch), (usage.cache_read + usage.cache_write) / 1e6
        tokens = f"{usage.input / 1e6:>12.1f}{cached:>10.1f}{usage.output / 1e6:>8.1f}"
        lines.append(f"{name:<22}{tokens}{dollars:>10.2f}{dollars / released:>8.0%}")
    return "\n".join([*lines, *arithmetic(shape, num_images, price)])


def arithmetic(shape: CallShape, num_images: int, price: Price) -> list[str]:
    """The sum behind "cache and batch", and how far its assumptions may be off before it misses the target."""
    usage = plan_usage(shape, num_images, REPAIR_SHARE, CACHE_SHARE)
    parts = ((getattr(usage, name), getattr(price, name)) for name in ("input", "cache_read", "cache_write", "output"))
    text = " + ".join(f"{tokens / MILLION:.4g} x {dollars:g}" for tokens, dollars in parts)
    least_cached, most_repairs = limits(shape, price)
    return [
        f"cache and batch = ({text}) / 2",
        f"at or under {TARGET_SHARE:.0%} while {least_cached:.0%} of calls or more find the cache, "
        f"or while {most_repairs:.0%} or less are asked twice",
    ]


def limits(shape: CallShape, price: Price) -> tuple[float, float]:
    """The least share of cached calls, and the most repairs, with which the target is met; the other as assumed."""

    def share(repair_share: float, cache_share: float) -> float:
        usage = plan_usage(shape, RELEASED_IMAGES, repair_share, cache_share)
        return cost_usd(usage, price, is_batch=True) / released_cost_usd(RELEASED_IMAGES, price)

    least_cached = _crossing(lambda cached: share(REPAIR_SHARE, cached))
    most_repairs = _crossing(lambda repairs: share(repairs, CACHE_SHARE))
    return min(max(least_cached, 0.0), 1.0), min(max(most_repairs, 0.0), 1.0)


def _crossing(line: Callable[[float], float]) -> float:
    """The argument at which a straight line reaches the target."""
    return (TARGET_SHARE - line(0.0)) / ((line(1.0) - line(0.0)) or math.inf)


def print_price(options: GenerationOptions, source: Source) -> None:
    """Print what the run would cost, and the paper's run by the same prices."""
    if options.provider == "template":
        print("provider template costs nothing")  # noqa: T201
        return
    num_images = min(source.num_rows or RELEASED_IMAGES, options.data_cap or source.num_rows or RELEASED_IMAGES)
    print(describe(measure(source, options), num_images, options.model))  # noqa: T201
    print(f"\nThe paper's run, {RELEASED_IMAGES} images of Visual Genome:")  # noqa: T201
    print(describe(VG150_SHAPE, RELEASED_IMAGES, options.model))  # noqa: T201

"""What a run of the generator costs, before a call is made: the released way's tokens and the planned ones."""

from dataclasses import dataclass

from spatialthinker.prices import Usage

RELEASED_IMAGES = 56_224
RELEASED_USAGE = Usage(input=235_000_000, output=5_000_000)
"""What the released generator's own notes state for its full run: text only, one call an image, nothing cached."""


@dataclass(frozen=True)
class CallShape:
    """Mean tokens of one call."""

    static: int
    """Instructions and schema: the same in every call, and so served by the cache."""
    changing: int
    """Scene and wish."""
    image: int
    output: int


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

"""Questions with something exchanged, to see what an answer rests on: the images, or the scene that a model writes."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from PIL import Image

from evaluation.benchmarks.samples import Sample, decode_image
from spatialthinker.response import section
from spatialthinker.storage.images import encode

GREY = (128, 128, 128)


def blank_images(sample: Sample) -> Sample:
    """Return the question with grey images of the same sizes."""
    return replace(sample, read_encoded=partial(_read_blank, sample.read_encoded, sample.id))


def _read_blank(read_encoded: Callable[[], list[bytes]], item_id: str) -> list[bytes]:
    sizes = [decode_image(data, item_id).size for data in read_encoded()]
    return [encode(Image.new("RGB", size, GREY), "PNG") for size in sizes]


def true_scene(sample: Sample) -> str | None:
    """Return the scene of the row's reference, None where it has none."""
    return section(sample.ground_truth or "", "scene")


def give_scene(sample: Sample, response: str) -> Sample:
    """Return the question with the beginning of its reply given: the model's own with the true scene in it."""
    own, opening, _ = response.partition("<scene>")
    scene = f"<scene>\n{(true_scene(sample) or '').strip()}\n</scene>\n"
    return replace(sample, prefix=f"{own if opening else ''}{scene}")

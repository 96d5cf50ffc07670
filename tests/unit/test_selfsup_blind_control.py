"""The blind control: traces of a row tell nothing about its answer, and would be found if they did."""

import io
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from PIL import Image, ImageDraw

from data_gen.curate.export import export_row
from data_gen.selfsup.blind_control import Verdict, blind_control
from data_gen.selfsup.options import SelfsupOptions
from data_gen.selfsup.pictures import Picture
from data_gen.selfsup.rows import make_rows
from tests.support.pictures import save_textures

NUM_PICTURES = 96
TASKS = ("patch_order", "rotation", "mirroring", "crop_place", "crop_box", "original_crop", "view_match", "view_point")
LEAKY_TASKS = ("rotation", "original_crop")


def make(folder: Path, number: int, tasks: tuple[str, ...] = TASKS) -> list[dict]:
    options = SelfsupOptions("", Path("x.csv"), False, None, tasks, None, len(tasks), None, None, None, 1, 0, False)
    save_textures(folder, number, (320, 240))
    pictures = [Picture(path.name, index, path) for index, path in enumerate(sorted(folder.iterdir()))]
    made = [row for picture in pictures for row in make_rows(picture, options)]
    return [export_row(row.record, row.image) for row in made]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return make(tmp_path_factory.mktemp("textures"), NUM_PICTURES)


def test_no_task_is_answered_from_traces(rows: list[dict]):
    verdicts = blind_control(rows)
    print(*verdicts, sep="\n")
    assert len(verdicts) == 1 + 5 * 2 + 2 * 2 and all(verdict.num_rows >= NUM_PICTURES - 2 for verdict in verdicts)
    assert not [str(verdict) for verdict in verdicts if not verdict.is_passed]


@pytest.mark.nightly
def test_no_task_is_answered_from_the_traces_of_many_rows(tmp_path: Path):
    verdicts = blind_control(make(tmp_path, 1500))
    print(*verdicts, sep="\n")
    assert not [str(verdict) for verdict in verdicts if not verdict.is_passed]


def change(row: dict, work: Callable[[Image.Image], bytes]) -> dict:
    with Image.open(io.BytesIO(row["images"]["bytes"])) as image:
        return row | {"images": {"bytes": work(image.convert("RGB")), "path": None}}


def jpeg(image: Image.Image, quality: int) -> bytes:
    image.save(buffer := io.BytesIO(), "JPEG", quality=quality)
    return buffer.getvalue()


def quality_leak(row: dict) -> dict:
    """Each answer is written with another quality: size of file and grid."""
    return change(row, lambda image: jpeg(image, 60 + 12 * rank(row)))


def border_leak(row: dict) -> dict:
    """A thin line at one side, another for each answer."""

    def draw(image: Image.Image) -> bytes:
        x = (0, image.width - 1)[rank(row) % 2]
        ImageDraw.Draw(image).line((x, 0, x, image.height), fill=(0, 0, 0))
        return jpeg(image, 88)

    return change(row, draw)


def name_leak(row: dict) -> dict:
    return row | {"image_id": f"{row['image_id']}{rank(row)}"}


def order_leak(row: dict) -> dict:
    """The right option comes first, as where nobody shuffles."""
    first = row["answer_text_only"]
    others = [text for text in row["options"] if text != first]
    return row | {"options": [first, *others], "answer_only": "A"}


def grid_leak(row: dict) -> dict:
    """The sheet is moved by some pixels of the grid of its file, by others for each answer."""

    def move(image: Image.Image) -> bytes:
        old = Image.open(io.BytesIO(jpeg(image, 40)))
        return jpeg(old.crop((2 * rank(row) + 1, 0, old.width - 8 + 2 * rank(row), old.height)), 95)

    return change(row, move)


def rank(row: dict) -> int:
    return sorted(row["options"]).index(row["answer_text_only"])


@pytest.mark.parametrize("leak", [quality_leak, border_leak, name_leak, order_leak, grid_leak])
def test_a_generator_that_leaks_is_found(leak: Callable[[dict], dict], rows: list[dict]):
    leaky = [leak(row) for row in rows if row["model"] in LEAKY_TASKS]
    verdicts = blind_control(leaky)
    assert {verdict.task.partition(",")[0] for verdict in verdicts if not verdict.is_passed} == set(LEAKY_TASKS), [
        str(verdict) for verdict in verdicts
    ]


def test_the_bound_is_the_binomial_one():
    assert Verdict("coin", 4, 4, 0.5).p_value == pytest.approx(1 / 16)
    assert Verdict("coin", 4, 0, 0.5).p_value == pytest.approx(1)
    assert Verdict("coin", 14, 14, 0.5).is_passed is False and Verdict("coin", 13, 13, 0.5).is_passed is True


def test_answers_drawn_at_random_pass_and_fixed_ones_fail(rows: list[dict]):
    rng = Random(0)
    chosen = [row for row in rows if row["model"] == "rotation"]
    drawn = [
        row | {"answer_only": rng.choice("ABC"), "answer_text_only": rng.choice(row["options"])} for row in chosen
    ]
    assert all(verdict.is_passed for verdict in blind_control(drawn))
    fixed = [row | {"answer_only": "B"} for row in chosen]
    assert not all(verdict.is_passed for verdict in blind_control(fixed))

"""Answers of rows made from pictures: what the answer says restores the picture."""

import ast
import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from data_gen.selfsup.crops import CELLS, PIECE_PX
from data_gen.selfsup.patches import GRIDS, tile_boxes
from data_gen.selfsup.puzzle import Puzzle, Thing, View
from data_gen.selfsup.sheets import GAP_PX, MARK, dot
from data_gen.selfsup.tasks import TASKS
from data_gen.selfsup.turned import CLOCKWISE
from data_gen.selfsup.views import Change, solve_homography
from tests.support.pictures import drawn_scene, photograph, texture

DIFFICULTIES = (0.0, 0.5, 1.0)
TAG_PX = 20
"""A tag hides so much of a region's top left corner."""


def views() -> list[View]:
    return [View(image.resize((400, 320))) for image in (photograph(), texture(3))]


def make(name: str, view: View, difficulty: float, seed: int) -> Puzzle:
    for attempt in range(20):
        if (puzzle := TASKS[name](view, random.Random(f"{seed}/{attempt}"), difficulty)) is not None:
            return puzzle
    raise AssertionError(f"{name} offers nothing on this picture")


def puzzles(name: str):
    for view in views():
        for difficulty in DIFFICULTIES:
            for seed in range(3):
                yield view, difficulty, make(name, view, difficulty, seed)


def right(puzzle: Puzzle) -> str:
    return puzzle.options[puzzle.answer_index]


def difference(one: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference of two images outside the corner where a tag may lie."""
    values = np.abs(np.asarray(one, float) - np.asarray(other, float))
    values[:TAG_PX, :TAG_PX] = 0
    return values.mean()


def test_the_stated_order_of_patches_restores_the_picture():
    for view, difficulty, puzzle in puzzles("patch_order"):
        rows, columns = GRIDS[min(int(3 * difficulty), 2)]
        order = [int(number) for number in puzzle.answer.split(", ")]
        assert sorted(order) == list(range(1, rows * columns + 1)) and puzzle.reward == "ordering"
        sources = tile_boxes(view.image.size, rows, columns)
        places = tile_boxes(view.image.size, rows, columns, GAP_PX)
        for number, source in zip(order, sources, strict=True):
            assert difference(puzzle.sheet.crop(places[number - 1]), view.image.crop(source)) == 0


def test_turning_back_by_the_stated_angle_restores_the_picture():
    for view, _, puzzle in puzzles("rotation"):
        angle = int(right(puzzle).split()[0])
        changed = [box for box in squares_that_changed(view, puzzle)]
        assert len(changed) == 1
        back = puzzle.sheet.crop(changed[0]).transpose(CLOCKWISE[360 - angle])
        assert np.array_equal(np.asarray(back), np.asarray(view.image.crop(changed[0])))
        for other in CLOCKWISE.keys() - {angle}:
            wrong = puzzle.sheet.crop(changed[0]).transpose(CLOCKWISE[360 - other])
            assert difference(wrong, view.image.crop(changed[0])) > 5


def squares_that_changed(view: View, puzzle: Puzzle) -> list[tuple[int, int, int, int]]:
    """Boxes inside the frames: the smallest box that holds all differences, without the frame."""
    changed = np.any(np.asarray(puzzle.sheet) != np.asarray(view.image), axis=2)
    y, x = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    outer = (x[0], y[0], x[-1] + 1, y[-1] + 1)
    return [(outer[0] + GAP_PX, outer[1] + GAP_PX, outer[2] - GAP_PX, outer[3] - GAP_PX)]


def test_the_named_square_alone_is_mirrored():
    for view, _, puzzle in puzzles("mirroring"):
        number = int(right(puzzle))
        assert sorted(puzzle.options) == list("1234")
        halves = (view.width // 2, view.height // 2)
        for place in range(4):
            left, top = place % 2 * halves[0], place // 2 * halves[1]
            quarter = (left, top, left + halves[0], top + halves[1])
            part = View(view.image.crop(quarter))
            shown = Puzzle(puzzle.sheet.crop(quarter), "", "", "")
            box = squares_that_changed(part, shown)[0]
            before, after = part.image.crop(box), shown.sheet.crop(box)
            turned = after.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            is_mirrored = difference(before, turned) < difference(before, after)
            assert is_mirrored == (place + 1 == number)


def test_the_named_part_holds_the_piece():
    for view, _, puzzle in puzzles("crop_place"):
        (_, box), cell = puzzle.evidence[0], CELLS.index(right(puzzle))
        width, height = view.width // 3, view.height // 3
        left, top = cell % 3 * width, cell // 3 * height
        assert left <= box[0] and box[2] <= left + width and top <= box[1] and box[3] <= top + height
        assert_shows(view, puzzle, box)


def assert_shows(view: View, puzzle: Puzzle, box: tuple[int, int, int, int]) -> None:
    x = view.width + 2 * GAP_PX
    shown = puzzle.sheet.crop((x, 0, x + PIECE_PX, PIECE_PX))
    piece = view.image.crop(box).resize((PIECE_PX, PIECE_PX), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(shown), np.asarray(piece))


def test_the_stated_box_cuts_the_piece():
    for view, _, puzzle in puzzles("crop_box"):
        (box,) = ast.literal_eval(puzzle.answer)
        assert puzzle.reward == "boxes"
        assert_shows(view, puzzle, tuple(box))


def test_the_named_piece_fills_the_hole_and_the_other_one_does_not():
    for view, _, puzzle in puzzles("original_crop"):
        number = int(right(puzzle).split()[1])
        box = hole(view, puzzle)
        side, x = box[2] - box[0], view.width + 2 * GAP_PX
        corners = [(x, 0), (x, side + 2 * GAP_PX)]
        pieces = [puzzle.sheet.crop((x, y, x + side, y + side)) for x, y in corners]
        assert difference(pieces[number - 1], view.image.crop(box)) == 0
        assert difference(pieces[2 - number], view.image.crop(box)) > 5


def hole(view: View, puzzle: Puzzle) -> tuple[int, int, int, int]:
    part = Puzzle(puzzle.sheet.crop((0, 0, *view.image.size)), "", "", "")
    return squares_that_changed(view, part)[0]


def test_a_homography_maps_its_four_corners_and_the_identity_maps_everything():
    corners = [(0.0, 0.0), (4.0, 0.0), (4.0, 3.0), (0.0, 3.0)]
    assert solve_homography(corners, corners) == pytest.approx((1, 0, 0, 0, 1, 0, 0, 0), abs=1e-12)
    targets = [(1.0, 1.0), (3.0, 0.5), (3.5, 2.5), (0.5, 2.0)]
    a, b, c, d, e, f, g, h = solve_homography(corners, targets)
    for (x, y), (u, v) in zip(corners, targets, strict=True):
        w = g * x + h * y + 1
        assert ((a * x + b * y + c) / w, (d * x + e * y + f) / w) == pytest.approx((u, v))


def test_the_map_between_two_views_finds_the_same_pixels():
    view = views()[1]
    change = Change(view.image, [(30.0, 20.0), (370.0, 40.0), (390.0, 300.0), (10.0, 280.0)], view)
    second, image = np.asarray(change.second, float), np.asarray(view.image, float)
    for x, y in ((40, 40), (160, 128), (280, 200)):
        u, v = change.in_picture((x + 0.5, y + 0.5))
        near = image[int(v) - 1 : int(v) + 2, int(u) - 1 : int(u) + 2].mean(axis=(0, 1))
        assert np.abs(second[y - 1 : y + 2, x - 1 : x + 2].mean(axis=(0, 1)) - near).max() < 25
    assert change.seen_in_first((0.0, 0.0)) == pytest.approx((24.0, 16.0))  # 30 and 20 at 320 of 400 pixels


def place_coded() -> View:
    """A picture whose red and green state the place; blue is never as low as in a mark."""
    y, x = np.mgrid[0:320, 0:400]
    blue = 100 + 155 * ((x // 8 + y // 8) % 2)
    return View(Image.fromarray(np.stack([x * 255 / 400, y * 255 / 320, blue], axis=2).astype(np.uint8)))


def place_shown(pixels: np.ndarray, point: tuple[float, float]) -> np.ndarray:
    """The place in the picture, as shares of its sides, that is seen around a point."""
    x, y = map(round, point)
    around = pixels[max(y - 16, 0) : y + 17, max(x - 16, 0) : x + 17].reshape(-1, 3)
    return np.median(around[(around[:, 2] > 90) & (around.min(axis=1) < 250)][:, :2], axis=0) / 255


def find_marks(pixels: np.ndarray) -> list[tuple[float, float]]:
    """Centres of marks, by their colour."""
    is_mark = (pixels == MARK).all(axis=2)
    labels, number = ndimage.label(ndimage.binary_dilation(is_mark, iterations=4))
    return [(float(x), float(y)) for y, x in ndimage.center_of_mass(labels > 0, labels, range(1, number + 1))]


@pytest.mark.parametrize("seed", range(6))
def test_the_stated_pixel_shows_the_place_of_the_ring(seed: int):
    puzzle = make("view_point", place_coded(), 0.5, seed)
    pixels, width = np.asarray(puzzle.sheet, int), (puzzle.sheet.width - 2 * GAP_PX) // 2
    (ring,) = find_marks(pixels[:, :width])
    x1, y1, x2, y2 = ast.literal_eval(puzzle.answer)
    assert x2 - x1 == y2 - y1 == 30
    x, y = (x1 + x2) // 2, (y1 + y2) // 2
    assert puzzle.reward == "points" and x >= width + 2 * GAP_PX
    assert place_shown(pixels, (x, y)) == pytest.approx(place_shown(pixels, ring), abs=0.03)
    assert place_shown(pixels, ring) == pytest.approx((ring[0] / width, ring[1] / puzzle.sheet.height), abs=0.03)


@pytest.mark.parametrize("seed", range(6))
def test_the_named_point_alone_shows_the_place_of_the_ring(seed: int):
    puzzle = make("view_match", place_coded(), 0.5, seed)
    pixels, width = np.asarray(puzzle.sheet, int), (puzzle.sheet.width - 2 * GAP_PX) // 2
    (ring,) = find_marks(pixels[:, :width])
    second = pixels[:, width + 2 * GAP_PX :]
    marks = find_marks(second)
    assert len(marks) == 4
    distances = [np.abs(place_shown(second, mark) - place_shown(pixels, ring)).max() for mark in marks]
    nearest = marks[int(np.argmin(distances))]
    assert sorted(distances)[0] < 0.04 < sorted(distances)[1]
    assert read_number(second, nearest) == right(puzzle).removeprefix("point ")


def read_number(pixels: np.ndarray, mark: tuple[float, float]) -> str:
    """The number in a mark: the one that looks most like it when drawn there."""
    x, y = map(round, mark)

    def distance(number: str) -> float:
        shifts = [(dx, dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1)]
        return min(float(np.abs(drawn(pixels, (x + dx, y + dy), number)).mean()) for dx, dy in shifts)

    return min("1234", key=distance)


def drawn(pixels: np.ndarray, place: tuple[float, float], number: str) -> np.ndarray:
    picture = Image.fromarray(pixels.astype(np.uint8))
    dot(picture, place, number)
    x, y = map(int, place)
    return np.asarray(picture, float)[y - 8 : y + 9, x - 8 : x + 9] - pixels[y - 8 : y + 9, x - 8 : x + 9]


def test_counts_and_boxes_are_those_of_the_annotations():
    things = tuple(Thing("cup", (10 + 40 * i, 20, 40 + 40 * i, 60)) for i in range(3))
    view = View(photograph((400, 320)), (*things, Thing("table", (0, 100, 400, 320))))
    found = make("count", view, 0.5, 0)
    assert (found.answer, found.reward, found.category) == ("3", "numbers", "count") and "'cup'" in found.question
    assert make("count", view, 0.0, 0).answer == "1"
    assert TASKS["count"](view, random.Random(0), 1.0) is None  # nothing is there six times
    found = make("boxes", view, 0.5, 0)
    assert ast.literal_eval(found.answer) == [[10, 20, 40, 60], [50, 20, 80, 60], [90, 20, 120, 60]]


def with_depth() -> View:
    """Depth grows to the right, from 1 m to 5 m."""
    return replace(place_coded(), depth=np.repeat(np.linspace(1, 5, 400, dtype=np.float32)[None], 320, axis=0))


@pytest.mark.parametrize("seed", range(5))
def test_points_are_ordered_by_the_depth_under_them(seed: int):
    for name in ("nearer", "depth_order"):
        puzzle = make(name, with_depth(), 0.4, seed)
        pixels = np.asarray(puzzle.sheet, int)
        marks = sorted(find_marks(pixels))  # from left to right: from near to far
        numbers = [read_number(pixels, mark) for mark in marks]
        if name == "nearer":
            assert right(puzzle) == f"point {numbers[0]}" and len(marks) == 2
        else:
            assert puzzle.answer == ", ".join(numbers) and len(marks) == 4


@pytest.mark.parametrize("seed", range(5))
def test_the_stated_distance_is_the_depth_under_the_ring(seed: int):
    puzzle = make("depth_distance", with_depth(), 0.5, seed)
    (ring,) = find_marks(np.asarray(puzzle.sheet, int))
    assert float(puzzle.answer) == pytest.approx(1 + 4 * ring[0] / 399, abs=0.02) and puzzle.reward == "numbers"
    assert TASKS["depth_distance"](replace(with_depth(), is_metric=False), random.Random(0), 0.5) is None


def test_harder_pairs_of_points_differ_less_in_depth():
    ratios = [[depth_ratio(make("nearer", with_depth(), d, seed)) for seed in range(12)] for d in (0.0, 1.0)]
    assert min(ratios[0]) >= 1.79 and min(ratios[1]) < 1.5


def depth_ratio(puzzle: Puzzle) -> float:
    near, far = (1 + 4 * x / 399 for x, _ in sorted(find_marks(np.asarray(puzzle.sheet, int))))
    return far / near


def test_drawn_scenes_offer_rows_too():
    offered = {name for seed in range(6) for name in TASKS if offers(name, View(drawn_scene(seed).resize((400, 300))))}
    assert {"rotation", "crop_box", "view_point"} <= offered


def offers(name: str, view: View) -> bool:
    return any(TASKS[name](view, random.Random(seed), 0.2) for seed in range(4))


def test_an_empty_picture_offers_nothing():
    view = View(Image.new("RGB", (400, 320), (90, 120, 150)))
    assert [name for name, task in TASKS.items() if task(view, random.Random(0), 0.5) is not None] == []

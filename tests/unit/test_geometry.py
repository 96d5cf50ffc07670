import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spatialthinker.geometry import OVERLAPS, Box, ciou, giou, iou, l1

UNIT = Box(0, 0, 1, 1)
RIGHT_HALF = Box(0.5, 0, 1, 1)
APART = Box(3, 0, 4, 1)


def test_iou_by_hand():
    assert iou(UNIT, UNIT) == pytest.approx(1.0, abs=1e-6)
    assert iou(UNIT, RIGHT_HALF) == pytest.approx(0.5, abs=1e-6)
    assert iou(Box(0, 0, 2, 2), Box(1, 1, 3, 3)) == pytest.approx(1 / 7, abs=1e-6)
    assert iou(UNIT, APART) == 0.0


def test_giou_by_hand():
    assert giou(UNIT, UNIT) == pytest.approx(1.0, abs=1e-6)
    assert giou(UNIT, APART) == pytest.approx(-(4 - 2) / 4, abs=1e-6)


def test_ciou_by_hand():
    assert ciou(UNIT, UNIT) == pytest.approx(1.0, abs=1e-6)
    # equal squares, centres 3 apart, enclosing box 4 x 1
    assert ciou(UNIT, APART) == pytest.approx(-9 / 17, abs=1e-6)
    # same centre, 2 x 1 against 1 x 2: IoU 1/3, only the aspect term besides
    v = 4 / np.pi**2 * (np.arctan(2.0) - np.arctan(0.5)) ** 2
    alpha = v / (1 - 1 / 3 + v)
    assert ciou(Box(-1, -0.5, 1, 0.5), Box(-0.5, -1, 0.5, 1)) == pytest.approx(1 / 3 - alpha * v, abs=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "score"),
    [  # figures measured on the released reward
        (UNIT, Box(0.25, 0.25, 0.75, 0.75), 0.625),
        (UNIT, Box(0, 0, 0.1, 0.1), 0.404),
        (Box(0.5, 0.5, 0.1, 0.1), Box(0.1, 0.1, 0.5, 0.5), 0.5),  # swapped corners
    ],
)
def test_shifted_ciou_as_released(a, b, score):
    assert OVERLAPS["ciou"](a, b) == pytest.approx(score, abs=1e-3)


def test_l1():
    assert l1(UNIT, RIGHT_HALF) == pytest.approx(0.125)


def test_leading_shapes_broadcast():
    rows, columns = np.random.default_rng(0).random((2, 3, 4)), np.random.default_rng(1).random((5, 4))
    for overlap in OVERLAPS.values():
        table = overlap(rows[:, :, None], columns)
        assert table.shape == (2, 3, 5)
        for i, j, k in itertools.product(range(2), range(3), range(5)):
            assert table[i, j, k] == overlap(rows[i, j], columns[k])


coordinates = st.floats(0, 1000, allow_subnormal=False)
boxes = st.tuples(coordinates, coordinates, st.floats(1, 500), st.floats(1, 500)).map(
    lambda t: Box(t[0], t[1], t[0] + t[2], t[1] + t[3])
)


@given(boxes, boxes)
def test_ranges_order_and_symmetry(a, b):
    assert 0.0 <= iou(a, b) <= 1.0
    assert -1.5 <= ciou(a, b) <= giou(a, a) + 1e-6
    assert giou(a, b) <= iou(a, b) + 1e-9
    assert ciou(a, b) <= iou(a, b) + 1e-9
    for overlap in (iou, giou, ciou, l1):
        assert overlap(a, b) == pytest.approx(overlap(b, a), abs=1e-9)


def test_box_properties():
    assert (RIGHT_HALF.width, RIGHT_HALF.height) == (0.5, 1)
    assert RIGHT_HALF.is_proper
    assert not Box(1, 0, 1, 2).is_proper
    assert not Box(1, 0, 0, 2).is_proper

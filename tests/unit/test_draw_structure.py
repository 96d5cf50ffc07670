"""Rooms and imports of the packages: their limits, and the drawing in the architecture page."""

from pathlib import Path

import pytest
from draw_structure import draw, find_arrows, find_backward_arrows

PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"
MOST = {"verl": (13, 30), "data_gen": (10, 32)}
"""Rooms and arrows that a package may have."""


@pytest.mark.parametrize("package", MOST)
def test_a_package_stays_small_and_is_drawn_on_the_page(package):
    rooms, arrows = find_arrows(package)
    assert len(rooms) <= MOST[package][0] and len(arrows) <= MOST[package][1]
    assert not find_backward_arrows(arrows)
    hint = f"write what `python3 scripts/draw_structure.py {package}` prints into {PAGE.name}"
    assert draw(package) in PAGE.read_text(), hint


def test_arrows_of_a_cycle_lead_backwards():
    cycle = {("a", "b"), ("b", "c"), ("c", "a")}
    assert find_backward_arrows(cycle | {("a", "d"), ("d", "e")}) == cycle

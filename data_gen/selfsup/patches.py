"""Task: the order of shuffled patches."""

from random import Random

from PIL import Image

from data_gen.selfsup.puzzle import PixelBox, Puzzle, View, differ, thumb
from data_gen.selfsup.sheets import GAP, GAP_PX, tag

GRIDS = ((2, 2), (2, 3), (3, 3))
"""Rows and columns for the easy, the medium and the hard third."""


def patch_order(view: View, rng: Random, difficulty: float) -> Puzzle | None:
    """The picture cut into patches that lie in a random order; the answer is their order in the picture."""
    rows, columns = GRIDS[min(int(3 * difficulty), 2)]
    if view.height > view.width:
        rows, columns = columns, rows
    boxes = tile_boxes(view.image.size, rows, columns)
    thumbs = [thumb(view.image.crop(box)) for box in boxes]
    is_clear = all(differ(one, other) for i, one in enumerate(thumbs) for other in thumbs[:i])
    if not is_clear or not all(map(view.is_rich, boxes)):
        return None
    shown = rng.sample(range(len(boxes)), len(boxes))
    places = tile_boxes(view.image.size, rows, columns, GAP_PX)
    sheet = Image.new("RGB", places[-1][2:], GAP)
    for number, (place, source) in enumerate(zip(places, shown, strict=True), 1):
        sheet.paste(view.image.crop(boxes[source]), place[:2])
        tag(sheet, place[:2], str(number))
    order = [1 + shown.index(i) for i in range(len(boxes))]
    question = (
        f"A picture was cut into {rows} rows and {columns} columns of patches, and the patches were shuffled. In "
        "which order do the numbered patches belong, row by row from the top left? Give their numbers, such as "
        f"{', '.join(map(str, rng.sample(range(1, 1 + len(boxes)), len(boxes))))}."
    )
    return Puzzle(sheet, question, "relation", "ordering", answer=", ".join(map(str, order)))


def tile_boxes(size: tuple[int, int], rows: int, columns: int, gap: int = 0) -> list[PixelBox]:
    """Boxes of equal tiles row by row, with a gap between them."""
    width, height = size[0] // columns, size[1] // rows
    corners = [(c * (width + gap), r * (height + gap)) for r in range(rows) for c in range(columns)]
    return [(x, y, x + width, y + height) for x, y in corners]

"""Tasks: the place of a crop, as a part of the picture and as a box, and the crop that fills a hole."""

from random import Random

from PIL import Image

from data_gen.selfsup.puzzle import PixelBox, Puzzle, View, blend, choose, differ, random_square, thumb
from data_gen.selfsup.sheets import GAP, GAP_PX, beside, frame, tag
from data_gen.selfsup.turned import MIRROR, TRIES

CELLS = (
    *("top left", "top centre", "top right"),
    *("middle left", "centre", "middle right"),
    *("bottom left", "bottom centre", "bottom right"),
)
"""Names of the nine equal parts of a picture, row by row."""
PIECE_PX = 144
"""Side of a piece as it is shown, whatever its size in the picture."""
SHIFT = 0.3
"""Shift of the hardest wrong piece, in sides of it."""


def crop_place(view: View, rng: Random, difficulty: float) -> Puzzle | None:
    """A picture and an enlarged piece of it; the answer is the part it comes from. Harder: a smaller piece."""
    cell_w, cell_h = view.width // 3, view.height // 3
    side = round(blend(0.9, 0.4, difficulty) * min(cell_w, cell_h))
    for _ in range(TRIES):
        cells = rng.sample(range(9), 4)
        x, y = rng.randint(0, cell_w - side), rng.randint(0, cell_h - side)
        corners = [(cell % 3 * cell_w + x, cell // 3 * cell_h + y) for cell in cells]
        boxes = [(left, top, left + side, top + side) for left, top in corners]
        pieces = [thumb(view.image.crop(box)) for box in boxes]
        is_clear = all(differ(one, other) for i, one in enumerate(pieces) for other in pieces[:i])
        if is_clear and all(map(view.is_rich, boxes)):
            break
    else:
        return None
    sheet, _ = beside([view.image, enlarge(view.image, boxes[0])])
    question = (
        "The left picture is whole; the square on the right is a piece of it, shown at another size. Divide the left "
        "picture into three rows and three columns. From which part is the piece?"
    )
    options, index = choose(rng, CELLS[cells[0]], [CELLS[cell] for cell in cells[1:]])
    return Puzzle(sheet, question, "instance_location", "choice", options, index, evidence=(("piece", boxes[0]),))


def crop_box(view: View, rng: Random, difficulty: float) -> Puzzle | None:
    """A picture and an enlarged piece of it; the answer is the piece's box. Harder: a smaller piece."""
    side = round(blend(0.6, 0.2, difficulty) * view.short_side)
    if (box := _rich_square(view, rng, side)) is None:
        return None
    sheet, _ = beside([view.image, enlarge(view.image, box)])
    question = (
        "The left picture is whole; the square on the right is a piece of it, shown at another size. Give the box of "
        "the piece in the left picture as [[x1, y1, x2, y2]] in pixels."
    )
    answer = f"[{list(box)}]"
    return Puzzle(sheet, question, "instance_location", "boxes", answer=answer, evidence=(("piece", box),))


def original_crop(view: View, rng: Random, difficulty: float) -> Puzzle | None:
    """A picture with a hole and two pieces; the answer is the one that was cut out.

    The wrong piece is from elsewhere (easy), the right one turned upside down (medium), or the right one mirrored or
    from a place nearby (hard).
    """
    side = round(blend(0.45, 0.3, difficulty) * view.short_side)
    for _ in range(TRIES):
        if (box := _rich_square(view, rng, side)) is None:
            return None
        right = view.image.crop(box)
        wrong = _wrong_piece(view, rng, difficulty, box)
        if wrong is not None and differ(thumb(right), thumb(wrong)):
            break
    else:
        return None
    number = rng.randint(1, 2)
    pieces = [right, wrong] if number == 1 else [wrong, right]
    picture = view.image.copy()
    picture.paste(GAP, box)
    frame(picture, box)
    column = Image.new("RGB", (side, 2 * side + 2 * GAP_PX), GAP)
    for i, piece in enumerate(pieces):
        column.paste(piece, (0, i * (side + 2 * GAP_PX)))
        tag(column, (0, i * (side + 2 * GAP_PX)), str(i + 1))
    sheet, _ = beside([picture, column])
    question = "A square was cut out of the left picture. Which of the two pieces on the right fills the hole?"
    options, index = choose(rng, f"piece {number}", [f"piece {3 - number}"])
    return Puzzle(sheet, question, "relation", "choice", options, index)


def enlarge(image: Image.Image, box: PixelBox) -> Image.Image:
    """A piece of a picture at the size at which pieces are shown."""
    return image.crop(box).resize((PIECE_PX, PIECE_PX), Image.Resampling.BICUBIC)


def _rich_square(view: View, rng: Random, side: int) -> PixelBox | None:
    for _ in range(TRIES):
        if view.is_rich(box := random_square(view, rng, side)):
            return box
    return None


def _wrong_piece(view: View, rng: Random, difficulty: float, box: PixelBox) -> Image.Image | None:
    side = box[2] - box[0]
    right = view.image.crop(box)
    if difficulty < 1 / 3:
        other = random_square(view, rng, side)
        return view.image.crop(other) if view.is_rich(other) else None
    if difficulty < 2 / 3:
        return right.transpose(Image.Transpose.ROTATE_180)
    if rng.random() < 0.5:
        return right.transpose(MIRROR)
    x, y = (corner + rng.choice((-1, 1)) * round(SHIFT * side) for corner in box[:2])
    is_inside = 0 <= x <= view.width - side and 0 <= y <= view.height - side
    return view.image.crop((x, y, x + side, y + side)) if is_inside else None

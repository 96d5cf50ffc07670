"""Tasks: a region that was turned, and a region that was mirrored."""

from random import Random

from PIL import Image

from data_gen.selfsup.puzzle import PixelBox, Puzzle, View, blend, choose, differ, random_square, thumb
from data_gen.selfsup.sheets import GAP_PX, frame, tag

CLOCKWISE = {90: Image.Transpose.ROTATE_270, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_90}
"""Degrees clockwise and Pillow's name, which counts the other way."""
MIRROR = Image.Transpose.FLIP_LEFT_RIGHT
TRIES = 12


def rotation(view: View, rng: Random, difficulty: float) -> Puzzle | None:
    """A square of the picture turned in its place; the answer is the angle. Harder: a smaller square."""
    side = round(blend(0.7, 0.25, difficulty) * view.short_side)
    for _ in range(TRIES):
        box = random_square(view, rng, side)
        region = view.image.crop(box)
        turned = {angle: region.transpose(turn) for angle, turn in CLOCKWISE.items()}
        if view.is_rich(box) and all(differ(thumb(region), thumb(image)) for image in turned.values()):
            break
    else:
        return None
    angle = rng.choice(list(CLOCKWISE))
    sheet = view.image.copy()
    sheet.paste(turned[angle], box[:2])
    frame(sheet, box)
    question = (
        "The framed square was cut out of the picture, turned, and put back. "
        "By how many degrees clockwise was it turned?"
    )
    wrong = [f"{other} degrees" for other in CLOCKWISE if other != angle]
    options, index = choose(rng, f"{angle} degrees", wrong)
    return Puzzle(sheet, question, "orientation", "choice", options, index)


def mirroring(view: View, rng: Random, difficulty: float) -> Puzzle | None:
    """Four framed squares, one of them mirrored left to right; the answer is its number. Harder: smaller squares."""
    side = round(blend(0.38, 0.18, difficulty) * view.short_side)
    boxes = [_square_in_quarter(view, rng, side, place) for place in range(4)]
    if None in boxes:
        return None
    boxes = [box for box in boxes if box is not None]
    mirrored = rng.randrange(4)
    sheet = view.image.copy()
    sheet.paste(view.image.crop(boxes[mirrored]).transpose(MIRROR), boxes[mirrored][:2])
    for number, box in enumerate(boxes, 1):
        frame(sheet, box)
        tag(sheet, box[:2], str(number))
    options, index = choose(rng, str(mirrored + 1), [str(i + 1) for i in range(4) if i != mirrored])
    question = "One of the four framed squares was mirrored left to right. Which one?"
    return Puzzle(sheet, question, "orientation", "choice", options, index)


def _square_in_quarter(view: View, rng: Random, side: int, place: int) -> PixelBox | None:
    """A square in a quarter of the picture that looks different when mirrored, as all four must."""
    left, top = place % 2 * (view.width // 2), place // 2 * (view.height // 2)
    room_x, room_y = view.width // 2 - side - 2 * GAP_PX, view.height // 2 - side - 2 * GAP_PX
    for _ in range(TRIES):
        x, y = left + GAP_PX + rng.randint(0, room_x), top + GAP_PX + rng.randint(0, room_y)
        box = (x, y, x + side, y + side)
        region = view.image.crop(box)
        if view.is_rich(box) and differ(thumb(region), thumb(region.transpose(MIRROR))):
            return box
    return None

"""Pictures of scene graphs on their images, and pages of HTML that need no file beside them.

The reference is drawn dashed in blue, the prediction solid in orange: the two stay apart in grey and for colour-blind
readers. Everything is drawn on an enlarged canvas, so that a picture of 112 x 112 pixels stays legible.
"""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import ImageFont

from spatialthinker.response import SECTIONS
from spatialthinker.scene_graph import Relation, SceneGraph
from spatialthinker.storage.images import encode, load_image, open_image, orientation

LINE_COLORS = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#e69f00", "#56b4e9")
"""Of curves on a light ground: Okabe and Ito's, which colour-blind readers tell apart, and a darker purple."""
DARK_LINE_COLORS = ("#56b4e9", "#e69f00", "#2fd0a2", "#e08bc4")
"""The first four on a dark ground."""
PREDICTED_COLOR = "#e8590c"
REFERENCE_COLOR = "#1864ab"
CANVAS_PX = 448
"""The longer side of a canvas, the same for all, so that lines and labels are."""

FONT_PX = 20
BROWSER_FORMATS = ("PNG", "JPEG", "GIF", "WEBP")
LABEL_PAD_PX = 3
_PIECES = Path(__file__).parent
_OPENING = re.compile(f"<({'|'.join(SECTIONS)})>")

Rectangle = tuple[float, float, float, float]
Labelled = tuple[str, Rectangle, bool]
"""An object's id, its box on the canvas, and whether it was predicted."""


@dataclass(frozen=True)
class Layout:
    """Boxes of both graphs and their names on the canvas of one image."""

    width: int
    height: int
    boxes: list[Labelled]
    labels: list[Labelled]


def lay_out(
    size: tuple[int, int],
    predicted: SceneGraph | None = None,
    reference: SceneGraph | None = None,
    *,
    with_labels: bool = True,
) -> Layout:
    """Return the layout of both graphs, whose boxes are in pixels of an image of this size.

    Corners in the wrong order are swapped and boxes beyond the border end at it, so that whatever a model predicted
    can be looked at.
    """
    scale = CANVAS_PX / max(size)
    width, height = (round(side * scale) for side in size)

    def on_canvas(box: Sequence[float]) -> Rectangle:
        x1, x2 = sorted(min(max(x * scale, 0), width - 1) for x in (box[0], box[2]))
        y1, y2 = sorted(min(max(y * scale, 0), height - 1) for y in (box[1], box[3]))
        return x1, y1, x2, y2

    boxes = [
        (item.id, on_canvas(item.box), is_predicted)
        for graph, is_predicted in ((reference, False), (predicted, True))
        for item in (graph.objects if graph else ())
    ]
    return Layout(width, height, boxes, _place_labels((width, height), boxes) if with_labels else [])


def color_of(is_predicted: bool) -> str:
    """Return the colour of a box and its name."""
    return PREDICTED_COLOR if is_predicted else REFERENCE_COLOR


def render_page(template: Path, **values: Any) -> str:
    """Return the page of a Jinja template, which may extend page.html.jinja and use pieces.html.jinja beside this."""
    environment = _templates(template.parent)
    return environment.get_template(template.name).render(values)


def render_style() -> str:
    """Return the style sheet of every page."""
    return _templates(_PIECES).get_template("look.css.jinja").render()


def _templates(folder: Path) -> jinja2.Environment:
    """Return the templates of a folder and those beside this file."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, _PIECES]),
        autoescape=True,  # a model's response is never markup
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"line_colors": list(zip(LINE_COLORS, DARK_LINE_COLORS, strict=False))}
    environment.globals |= {"color_of": color_of, "font_px": FONT_PX, "label_pad_px": LABEL_PAD_PX}
    environment.filters |= {"data_uri": data_uri, "relation_text": relation_text, "sections": split_sections}
    return environment


def _place_labels(size: tuple[int, int], boxes: Sequence[Labelled]) -> list[Labelled]:
    """Return every box's name with its rectangle; a reference that a prediction of its id overlaps shares its name."""
    placed: list[Labelled] = []
    predicted = [(text, box) for text, box, is_predicted in boxes if is_predicted]
    for text, box, is_predicted in boxes:
        if not is_predicted and any(text == other and _overlap(box, near) > 0 for other, near in predicted):
            continue
        place = _place_label(size, text, box, [other for _, other, _ in placed], [other for _, other, _ in boxes])
        placed.append((text, place, is_predicted))
    return placed


def _place_label(
    size: tuple[int, int], text: str, box: Rectangle, taken: Sequence[Rectangle], boxes: Sequence[Rectangle]
) -> Rectangle:
    """Return the rectangle at the box that covers least of the labels so far, then least of the boxes."""
    left, top, right, bottom = _load_font().getbbox(text)
    width, height = right - left + 2 * LABEL_PAD_PX, bottom - top + 2 * LABEL_PAD_PX
    x1, y1, x2, y2 = box
    corners = [(x, y) for y in (y1 - height, y2, y1, y2 - height) for x in (x1, x2 - width)]
    corners += [(x, y) for x in (x2, x1 - width) for y in (y1, y2 - height)]
    places = [(min(max(x, 0), max(size[0] - width, 0)), min(max(y, 0), max(size[1] - height, 0))) for x, y in corners]

    candidates = [(x, y, x + width, y + height) for x, y in places]
    costs = list(zip(_covered(candidates, taken), _covered(candidates, boxes), strict=True))
    return candidates[costs.index(min(costs))]


def _covered(places: Sequence[Rectangle], others: Sequence[Rectangle]) -> list[float]:
    """Return the area of the others that each place covers: hundreds of boxes need thousands of overlaps."""
    a, b = np.array(places)[None], np.array(others).reshape(-1, 1, 4)
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])  # [others, places, 2]
    return np.maximum(sides, 0).prod(-1).sum(0).tolist()


@cache
def _load_font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(FONT_PX)


def _overlap(a: Rectangle, b: Rectangle) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def relation_text(relation: Relation) -> str:
    """Return "circle.1 left of square.2"."""
    return f"{relation.subject} {relation.predicate} {relation.object}"


def data_uri(picture: bytes, kind: str = "png") -> str:
    """Return the picture file as a `data:` address, so that a page needs no file beside it."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def image_uri(picture: bytes) -> str:
    """Return the `data:` address of an image file of any kind, as a browser shows it upright."""
    with open_image(picture) as image:
        if image.format in BROWSER_FORMATS and orientation(image) == 1:
            return data_uri(picture, image.format.lower())
    return data_uri(encode(load_image(picture), "PNG"))


def split_sections(text: str) -> list[tuple[str, str]]:
    """Return a text as pieces (section, text): a section with its tags, and "" for what lies outside all of them.

    The pieces joined are the text.
    """
    pieces: list[tuple[str, str]] = []
    position, ends = 0, dict.fromkeys(map(str, SECTIONS), 0)
    for opening in _OPENING.finditer(text):
        tag = opening[1]
        if opening.start() < position or ends[tag] < 0:  # within a section, or never closed
            continue
        ends[tag] = text.find(f"</{tag}>", opening.end())
        if ends[tag] < 0:
            continue
        if opening.start() > position:
            pieces.append(("", text[position : opening.start()]))
        position = ends[tag] + len(f"</{tag}>")
        pieces.append((tag, text[opening.start() : position]))
    return [*pieces, ("", text[position:])] if position < len(text) else pieces


def question_of(problem: str) -> str:
    """Return the question of a prompt without the instructions in front of it."""
    return problem.rpartition("\nQ. ")[2].strip()

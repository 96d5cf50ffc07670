"""Pictures of scene graphs on their images, and the few HTML pieces that a self-contained page needs.

The reference is drawn dashed in blue, the prediction solid in orange: the two stay apart in grey and for colour-blind
readers. Everything is drawn on an enlarged copy, so that a picture of 112 x 112 pixels stays legible.
"""

import base64
import html
import math
from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw, ImageFont

from spatialthinker.scene_graph import Relation, SceneGraph
from spatialthinker.storage.images import encode

PREDICTED_COLOR = "#e8590c"
REFERENCE_COLOR = "#1864ab"
_HALO_COLOR = "#ffffff"
MIN_SIDE_PX = 448
"""The longer side of a drawing: smaller images are enlarged by a whole factor."""

_LINE_PX = 3
_DASH_PX = 10
_FONT_PX = 20
_LABEL_PAD_PX = 3

Rectangle = tuple[float, float, float, float]
Labelled = tuple[str, Rectangle, bool]
"""An object's id, its box on the canvas, and whether it was predicted."""


def draw_scene(
    image: Image.Image,
    predicted: SceneGraph | None = None,
    reference: SceneGraph | None = None,
    min_side_px: int = MIN_SIDE_PX,
) -> Image.Image:
    """Return an enlarged copy of the image with the boxes and labels of both graphs.

    Boxes are in pixels of `image`. Corners in the wrong order are swapped and boxes beyond the border end at it, so
    that whatever a model predicted can be looked at.
    """
    scale = max(1, math.ceil(min_side_px / max(image.size)))
    canvas = image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS)
    pen = ImageDraw.Draw(canvas)
    boxes = _labelled(predicted, reference, scale, canvas.size)
    for width, is_halo in ((_LINE_PX + 2, True), (_LINE_PX, False)):  # every halo first: none may hide a line
        for _, box, is_predicted in boxes:
            color = PREDICTED_COLOR if is_predicted else REFERENCE_COLOR
            _draw_box(pen, box, _HALO_COLOR if is_halo else color, width, is_dashed=not (is_predicted or is_halo))
    _draw_labels(pen, canvas.size, boxes)
    return canvas


def svg_scene(
    picture: str, size: tuple[int, int], predicted: SceneGraph | None = None, reference: SceneGraph | None = None
) -> str:
    """Return what `draw_scene` draws as an SVG element, with `picture` (of `svg_image`, or a reuse of it) below.

    Boxes are in pixels of an image of this size.
    """
    scale, canvas = _svg_canvas(size)
    boxes = _labelled(predicted, reference, scale, canvas)
    shapes = [picture]
    for width, is_halo in ((_LINE_PX + 2, True), (_LINE_PX, False)):
        for _, (x1, y1, x2, y2), is_predicted in boxes:
            color = PREDICTED_COLOR if is_predicted else REFERENCE_COLOR
            dash = "" if is_predicted or is_halo else f' stroke-dasharray="{_DASH_PX}"'
            shapes.append(
                f'<rect x="{x1:.0f}" y="{y1:.0f}" width="{x2 - x1:.0f}" height="{y2 - y1:.0f}" fill="none" '
                f'stroke="{_HALO_COLOR if is_halo else color}" stroke-width="{width}"{dash}/>'
            )
    for text, (x1, y1, x2, y2), is_predicted in _place_labels(canvas, boxes):
        color = PREDICTED_COLOR if is_predicted else REFERENCE_COLOR
        shapes.append(
            f'<rect x="{x1:.0f}" y="{y1:.0f}" width="{x2 - x1:.0f}" height="{y2 - y1:.0f}" fill="{color}"/>'
            f'<text x="{x1 + _LABEL_PAD_PX:.0f}" y="{(y1 + y2) / 2:.0f}" dominant-baseline="central" fill="#ffffff" '
            f'font-size="{_FONT_PX}" textLength="{x2 - x1 - 2 * _LABEL_PAD_PX:.0f}" '
            f'lengthAdjust="spacingAndGlyphs">{escape(text)}</text>'
        )
    return f'<svg viewBox="0 0 {canvas[0]} {canvas[1]}" role="img">{"".join(shapes)}</svg>'


def svg_image(element_id: str, uri: str, size: tuple[int, int]) -> str:
    """Return an SVG image of this size in pixels; `<use href="#ID"/>` shows it again without holding it again."""
    _, (width, height) = _svg_canvas(size)
    name = escape(element_id)
    return f'<image id="{name}" href="{uri}" width="{width}" height="{height}" preserveAspectRatio="none"/>'


def _svg_canvas(size: tuple[int, int]) -> tuple[float, tuple[int, int]]:
    """Return units per pixel and the canvas: its longer side is the same for all, so that lines and labels are."""
    scale = MIN_SIDE_PX / max(size)
    return scale, (round(size[0] * scale), round(size[1] * scale))


def _labelled(
    predicted: SceneGraph | None, reference: SceneGraph | None, scale: float, size: tuple[int, int]
) -> list[Labelled]:
    return [
        (item.id, _on_canvas(item.box, scale, size), is_predicted)
        for graph, is_predicted in ((reference, False), (predicted, True))
        for item in (graph.objects if graph else ())
    ]


def _on_canvas(box: Sequence[float], scale: float, size: tuple[int, int]) -> Rectangle:
    x1, x2 = sorted(min(max(x * scale, 0), size[0] - 1) for x in (box[0], box[2]))
    y1, y2 = sorted(min(max(y * scale, 0), size[1] - 1) for y in (box[1], box[3]))
    return x1, y1, x2, y2


def _draw_box(pen: ImageDraw.ImageDraw, box: Rectangle, color: str, width: int, is_dashed: bool) -> None:
    if not is_dashed:
        pen.rectangle(box, outline=color, width=width)
        return
    x1, y1, x2, y2 = box
    sides = [((x1, y1), (x2, y1)), ((x2, y1), (x2, y2)), ((x2, y2), (x1, y2)), ((x1, y2), (x1, y1))]
    for (ax, ay), (bx, by) in sides:
        length = max(abs(bx - ax), abs(by - ay), 1.0)
        for start in range(0, math.ceil(length), 2 * _DASH_PX):
            ends = (start / length, min(start + _DASH_PX, length) / length)
            pen.line([(ax + (bx - ax) * t, ay + (by - ay) * t) for t in ends], fill=color, width=width)


def _draw_labels(pen: ImageDraw.ImageDraw, size: tuple[int, int], boxes: Sequence[Labelled]) -> None:
    font = ImageFont.load_default(_FONT_PX)
    for text, place, is_predicted in _place_labels(size, boxes):
        left, top, _, _ = font.getbbox(text)
        pen.rectangle(place, fill=PREDICTED_COLOR if is_predicted else REFERENCE_COLOR)
        corner = (place[0] + _LABEL_PAD_PX - left, place[1] + _LABEL_PAD_PX - top)
        pen.text(corner, text, fill="#ffffff", font=font)


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
    left, top, right, bottom = ImageFont.load_default(_FONT_PX).getbbox(text)
    width, height = right - left + 2 * _LABEL_PAD_PX, bottom - top + 2 * _LABEL_PAD_PX
    x1, y1, x2, y2 = box
    corners = [(x, y) for y in (y1 - height, y2, y1, y2 - height) for x in (x1, x2 - width)]
    corners += [(x, y) for x in (x2, x1 - width) for y in (y1, y2 - height)]
    places = [(min(max(x, 0), max(size[0] - width, 0)), min(max(y, 0), max(size[1] - height, 0))) for x, y in corners]

    def cost(place: Rectangle) -> tuple[float, float]:
        return sum(_overlap(place, other) for other in taken), sum(_overlap(place, other) for other in boxes)

    return min(((x, y, x + width, y + height) for x, y in places), key=cost)


def _overlap(a: Rectangle, b: Rectangle) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def relation_text(relation: Relation) -> str:
    """Return "circle.1 left of square.2"."""
    return f"{relation.subject} {relation.predicate} {relation.object}"


def png_bytes(image: Image.Image) -> bytes:
    """Return the image as a PNG file."""
    return encode(image, "PNG", optimize=True)


def data_uri(picture: bytes, kind: str = "png") -> str:
    """Return the picture file as a `data:` address, so that a page needs no file beside it."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def escape(text: object) -> str:
    """Return the text fit for HTML and for attribute values: a model's response is never markup."""
    return html.escape(str(text), quote=True)


def html_image(png: bytes, description: str, dark_png: bytes | None = None) -> str:
    """Return an image element; `dark_png` replaces the picture where the reader's screen is dark."""
    light = f'<img src="{data_uri(png)}" alt="{escape(description)}">'
    if dark_png is None:
        return light
    return f'<picture><source srcset="{data_uri(dark_png)}" media="(prefers-color-scheme: dark)">{light}</picture>'


def html_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table whose first column is text and whose other columns are figures; second lines are small."""

    def cell(value: object) -> str:
        first, _, second = escape(value).partition("\n")
        return f"<td>{first}" + (f"<br><small>{second}</small>" if second else "") + "</td>"

    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(cell(value) for value in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def html_scene_key() -> str:
    """Return the legend of `draw_scene`."""
    return (
        '<p class="key"><span class="swatch predicted"></span>predicted '
        '<span class="swatch reference"></span>reference</p>'
    )


def html_page(title: str, body: str, style: str = "") -> str:
    """Return a complete page: one column on a phone, light or dark as the reader's screen is, no outside file."""
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<meta charset="utf-8">{viewport}<title>{escape(title)}</title><style>{_STYLE}{style}</style>'
    return f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{body}\n</body>\n</html>\n'


_STYLE = f"""
:root {{ color-scheme: light dark; --ink: #1b1f24; --soft: #5c6670; --paper: #ffffff; --card: #f5f6f8;
  --line: #d9dde2; --good: #2b8a3e; --bad: #c92a2a; --predicted: {PREDICTED_COLOR}; --reference: {REFERENCE_COLOR}; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e6e8eb; --soft: #a3adb8; --paper: #14171a; --card: #1e2328;
  --line: #343b43; --good: #69db7c; --bad: #ff8787; --reference: #4dabf7; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 1100px; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.6rem; line-height: 1.2; margin: 0.5rem 0; }}
h2 {{ font-size: 1.25rem; margin: 2rem 0 0.5rem; border-bottom: 1px solid var(--line); padding-bottom: 0.25rem; }}
h3 {{ font-size: 1rem; margin: 0 0 0.5rem; }}
p {{ margin: 0.5rem 0; max-width: 75ch; }}
.soft {{ color: var(--soft); }}
.good {{ color: var(--good); font-weight: 600; }}
.bad {{ color: var(--bad); font-weight: 600; }}
.grid {{ display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }}
.stack {{ display: grid; gap: 1rem; }}
.card {{ background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 0.75rem; min-width: 0; }}
img {{ display: block; max-width: 100%; height: auto; border-radius: 4px; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.3rem 0.8rem 0.3rem 0; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }}
td small {{ color: var(--soft); }}
th:first-child, td:first-child {{ text-align: left; }}
@media (max-width: 560px) {{ th, td {{ white-space: normal; padding-right: 0.4rem; }} }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; margin: 0.5rem 0; font: 0.85rem/1.45 ui-monospace, monospace; }}
details summary {{ cursor: pointer; color: var(--soft); }}
.swatch {{ display: inline-block; width: 1.6em; height: 0; vertical-align: middle; margin: 0 0.3em 0 0.8em; }}
.swatch.predicted {{ border-top: 3px solid var(--predicted); }}
.swatch.reference {{ border-top: 3px dashed var(--reference); }}
"""

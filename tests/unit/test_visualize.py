"""Boxes land where the graph says, labels stay on the picture, and text never becomes markup."""

import pytest
from PIL import Image, ImageColor

from spatialthinker.scene_graph import Relation, SceneGraph, parse_scene
from spatialthinker.visualize import (
    MIN_SIDE_PX,
    PREDICTED_COLOR,
    REFERENCE_COLOR,
    data_uri,
    draw_scene,
    html_image,
    html_page,
    html_table,
    png_bytes,
    relation_text,
    svg_image,
    svg_scene,
)


def scene(*boxes: list[float]) -> SceneGraph:
    objects = ", ".join(f'{{"id": "shape.{i}", "bbox": {box}}}' for i, box in enumerate(boxes))
    graph = parse_scene(f'{{"objects": [{objects}], "relationships": []}}')
    assert graph is not None
    return graph


def colors_on_column(picture: Image.Image, x: int) -> set[tuple[int, ...]]:
    return {picture.getpixel((x, y)) for y in range(picture.height)}  # type: ignore[misc]


def test_small_pictures_are_enlarged_by_a_whole_factor():
    assert draw_scene(Image.new("RGB", (112, 112))).size == (448, 448)
    assert draw_scene(Image.new("RGB", (100, 60))).size == (500, 300)
    assert draw_scene(Image.new("RGB", (800, 600))).size == (800, 600)


def test_boxes_are_drawn_at_their_place_in_their_colour():
    blank = Image.new("RGB", (112, 112), "black")
    predicted, reference = (ImageColor.getrgb(color) for color in (PREDICTED_COLOR, REFERENCE_COLOR))
    picture = draw_scene(blank, predicted=scene([28, 28, 56, 84]))
    assert predicted in colors_on_column(picture, 28 * 4) and predicted in colors_on_column(picture, 56 * 4)
    assert colors_on_column(picture, 100 * 4) == {(0, 0, 0)}
    both = draw_scene(blank, scene([10, 50, 40, 80]), scene([60, 50, 90, 80]))
    assert predicted in colors_on_column(both, 10 * 4) and reference in colors_on_column(both, 60 * 4)
    assert blank.getpixel((28, 28)) == (0, 0, 0)  # the image itself stays as it is


@pytest.mark.parametrize("box", [[90, 90, 20, 20], [-50, -50, 500, 500], [200, 200, 300, 300], [5, 5, 5, 5]])
def test_whatever_a_model_predicts_can_be_drawn(box):
    picture = draw_scene(Image.new("RGB", (112, 112)), predicted=scene(box))
    assert picture.size == (MIN_SIDE_PX, MIN_SIDE_PX)
    assert ImageColor.getrgb(PREDICTED_COLOR) in {color for _, color in picture.getcolors(1 << 20) or ()}


def test_nothing_to_draw_leaves_the_picture():
    picture = draw_scene(Image.new("RGB", (448, 448), "red"), None, scene())
    assert colors_on_column(picture, 100) == {(255, 0, 0)}


def test_html_is_escaped_and_complete():
    page = html_page("a <b> title", html_table(("x", "<y>"), [("1", "a & b")]))
    assert page.startswith("<!doctype html>") and "a &lt;b&gt; title" in page
    assert "&lt;y&gt;" in page and "a &amp; b" in page and 'name="viewport"' in page
    png = png_bytes(Image.new("RGB", (4, 4)))
    assert data_uri(png).startswith("data:image/png;base64,iVBOR")
    assert html_image(png, 'a "quote"', png).count("data:image/png") == 2
    assert "&quot;quote&quot;" in html_image(png, 'a "quote"')


def test_relation_text():
    assert relation_text(Relation("circle.1", "left of", "square.2")) == "circle.1 left of square.2"


def test_svg_scenes_are_scaled_to_one_canvas_and_hold_no_markup():
    picture = svg_image('x"<', "data:image/png;base64,AA==", (896, 448))
    assert 'id="x&quot;&lt;"' in picture and 'width="448" height="224"' in picture
    graph = scene([100, 50, 300, 150])
    drawn = svg_scene(picture, (896, 448), predicted=graph, reference=graph)
    assert drawn.startswith('<svg viewBox="0 0 448 224"') and drawn.count(picture) == 1
    box = 'x="50" y="25" width="100" height="50" fill="none"'
    assert drawn.count(box) == 4  # two boxes and their halos
    assert drawn.count("stroke-dasharray") == 1 and drawn.count("<text") == 1  # the reference shares the name
    foreign = parse_scene('{"objects": [{"id": "<b>", "bbox": [0, 0, 9, 9]}]}', is_reference=True)
    assert "<b>" not in svg_scene("", (112, 112), reference=foreign)

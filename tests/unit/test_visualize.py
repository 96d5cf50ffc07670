"""Boxes land where the graph says, labels stay on the picture, and text never becomes markup."""

from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from spatialthinker.scene_graph import Relation, SceneGraph, parse_scene
from spatialthinker.storage.images import encode
from spatialthinker.visualize import (
    CANVAS_PX,
    PREDICTED_COLOR,
    REFERENCE_COLOR,
    _covered,
    data_uri,
    image_uri,
    lay_out,
    relation_text,
    render_page,
    render_style,
)

PNG = encode(Image.new("RGB", (4, 4)), "PNG")


def scene(*boxes: list[float]) -> SceneGraph:
    objects = ", ".join(f'{{"id": "shape.{i}", "bbox": {box}}}' for i, box in enumerate(boxes))
    graph = parse_scene(f'{{"objects": [{objects}], "relationships": []}}')
    assert graph is not None
    return graph


def page_of(folder: Path, body: str, **values: object) -> str:
    """A page whose body is this template text, with all pieces at hand."""
    (folder / "test.html.jinja").write_text(
        '{% extends "page.html.jinja" %}'
        '{% from "pieces.html.jinja" import picture, response, scene, scene_key, table %}'
        "{% block body %}" + body + "{% endblock %}"
    )
    return render_page(folder / "test.html.jinja", title="a <b> title", **values)


def drawn(folder: Path, *graphs: SceneGraph | None, size: tuple[int, int] = (112, 112)) -> ElementTree.Element:
    """The SVG element of a predicted and a reference graph."""
    page = page_of(folder, "{{ scene(layout, 'data:,', 'x\"<') }}", layout=lay_out(size, *graphs))
    return ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + len("</svg>")])


def outlines(svg: ElementTree.Element) -> list[tuple[str, ...]]:
    """Place and kind of the outlines, halos left out."""
    found = [rect.attrib for rect in svg.findall("rect") if not rect.get("class", "").startswith("halo")]
    return [tuple(rect[name] for name in ("x", "y", "width", "height", "class")) for rect in found]


@pytest.mark.parametrize(
    ("size", "canvas"), [((112, 112), (448, 448)), ((100, 60), (448, 269)), ((800, 600), (448, 336))]
)
def test_every_picture_gets_a_canvas_of_one_longer_side(tmp_path, size, canvas):
    layout = lay_out(size)
    assert (layout.width, layout.height) == canvas and max(canvas) == CANVAS_PX
    assert drawn(tmp_path, size=size).get("viewBox") == f"0 0 {canvas[0]} {canvas[1]}"


def test_boxes_are_drawn_at_their_place_in_their_colour(tmp_path):
    svg = drawn(tmp_path, scene([28, 28, 56, 84]), scene([60, 50, 90, 80]))
    assert outlines(svg) == [
        ("240", "200", "120", "120", "box reference"),
        ("112", "112", "112", "224", "box predicted"),
    ]
    style = render_style()
    assert f".picture .box.predicted {{ stroke: {PREDICTED_COLOR}; }}" in style
    assert f".picture .box.reference {{ stroke: {REFERENCE_COLOR}; stroke-dasharray: 10; }}" in style
    halos = [rect for rect in svg.findall("rect") if rect.get("class", "").startswith("halo")]
    assert [rect.get("x") for rect in halos] == ["240", "112"]
    assert list(svg)[1:3] == halos  # below every line


@pytest.mark.parametrize("box", [[90, 90, 20, 20], [-50, -50, 500, 500], [200, 200, 300, 300], [5, 5, 5, 5]])
def test_whatever_a_model_predicts_can_be_drawn(tmp_path, box):
    (found,) = outlines(drawn(tmp_path, scene(box)))
    x, y, width, height = map(int, found[:4])
    assert 0 <= x <= x + width <= CANVAS_PX and 0 <= y <= y + height <= CANVAS_PX
    (label,) = lay_out((112, 112), scene(box)).labels
    assert all(0 <= edge <= CANVAS_PX for edge in label[1])


def test_nothing_to_draw_leaves_the_picture(tmp_path):
    assert [part.tag for part in drawn(tmp_path, None, scene())] == ["image"]


def test_html_is_escaped_and_complete(tmp_path):
    page = page_of(tmp_path, "{{ table(['x', '<y>'], [('1', 'a & b\nsmall')]) }}")
    assert page.startswith("<!doctype html>") and "a &lt;b&gt; title" in page
    assert "&lt;y&gt;" in page and "a &amp; b<br><small>small</small>" in page and 'name="viewport"' in page
    assert PREDICTED_COLOR in page and REFERENCE_COLOR in page
    assert data_uri(PNG).startswith("data:image/png;base64,iVBOR") and image_uri(PNG) == data_uri(PNG)
    both = page_of(tmp_path, "{{ picture(png, png, 'a \"quote\"') }}", png=PNG)
    assert both.count("data:image/png") == 2 and "a &#34;quote&#34;" in both


def test_relation_text():
    assert relation_text(Relation("circle.1", "left of", "square.2")) == "circle.1 left of square.2"


def test_scenes_share_names_and_an_image_and_hold_no_markup(tmp_path):
    graph = scene([100, 50, 300, 150])
    svg = drawn(tmp_path, graph, graph, size=(896, 448))
    assert svg.find("image").attrib["id"] == 'x"<' and svg.find("image").attrib["height"] == "224"  # type: ignore[union-attr]
    assert [found[:4] for found in outlines(svg)] == [("50", "25", "100", "50")] * 2
    assert [text.text for text in svg.findall("g/text")] == ["shape.0"]  # the reference shares the name
    foreign = parse_scene('{"objects": [{"id": "<b>", "bbox": [0, 0, 9, 9]}]}', is_reference=True)
    page = page_of(tmp_path, "{{ scene(layout, name='first') }}", layout=lay_out((112, 112), reference=foreign))
    assert (
        "&lt;b&gt;" in page and "<b>" not in page.replace("a &lt;b&gt; title", "") and '<use href="#first"/>' in page
    )


def test_a_response_keeps_its_text_and_colours_its_sections(tmp_path):
    text = "<b>x</b><think>\nwhy</think>\n<answer>(A)</answer> end"
    page = page_of(tmp_path, "{{ response(text) }}", text=text)
    drawn = ElementTree.fromstring(page[page.index("<pre") : page.index("</pre>") + len("</pre>")])
    assert "".join(drawn.itertext()) == text
    assert [span.get("class") for span in drawn] == ["outside", "section think", "", "section answer", "outside"]


def test_labels_avoid_what_is_covered_already():
    places = [(0.0, 0.0, 10.0, 10.0), (20.0, 0.0, 30.0, 10.0)]
    assert _covered(places, [(5.0, 5.0, 25.0, 8.0), (-5.0, -5.0, 1.0, 1.0)]) == [5 * 3 + 1, 5 * 3]
    assert _covered(places, []) == [0, 0]

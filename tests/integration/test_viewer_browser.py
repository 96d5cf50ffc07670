"""The viewer's page in a real browser: what a reader does, and rollouts that attack."""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spatialthinker.scene_graph import parse_scene
from spatialthinker.visualize import lay_out, render_page
from tests.support.browser import Tab, serve
from tests.support.recorded_runs import write_log, write_old_run, write_recorded_run
from verl.viewer.main import main
from verl.viewer.page_files import FOLDER
from verl.viewer.run import Run
from verl.viewer.server import Server

pytestmark = pytest.mark.integration

FIRST = "#/sample?run=0&kind=train&step=1&group=0&sample=0"
ATTACKS = [
    "<script>window.ran = 1</script>",
    "</script><script>window.ran = 2</script><!--",
    '"><img src=x onerror="window.ran = 3">',
    "javascript:window.ran=4",
    "<svg/onload=window.ran=5>",
    "'-window.ran=6-'",
    "{{window.ran=7}}${window.ran=8}`",
    '<a href="javascript:window.ran=9">x</a>',
]
ATTACK = " ".join(ATTACKS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [write_recorded_run(folder / name, seed=seed) for seed, name in enumerate(("alpha", "beta"))]


@pytest.fixture(scope="module")
def server(runs: list[Path]) -> Iterator[Server]:
    with serve(runs) as server:
        yield server


def count(tab: Tab, text: str) -> None:
    """Wait until the page counts this."""
    tab.page.wait_for_selector(f"#count:text-is('{text}')")


def shown(tab: Tab, part: str) -> None:
    """Wait until the page shows a view whose address has this part."""
    tab.page.wait_for_selector(f"#main[data-address*='{part}']:not([aria-busy])")


def test_a_run_opens_with_its_curves_and_a_point_opens_its_step(tab, server):
    tab.go(server.url)
    assert tab.page.locator("h1").all_inner_texts() == ["alpha", "beta"]
    assert "no_variance" in tab.page.locator(".checks").first.inner_text()
    curve = tab.page.locator("figure", has_text="reward/overall").locator("svg")
    curve.focus()
    for key in ("ArrowLeft", "ArrowLeft", "Enter"):
        tab.page.keyboard.press(key)
    tab.page.wait_for_url(re.compile("step=2"))
    count(tab, "16 rollouts in 4 groups")
    tab.page.go_back()
    curve = tab.page.locator("figure", has_text="reward/overall").locator("svg")
    box = curve.bounding_box()
    curve.click(position={"x": box["width"] - 10, "y": box["height"] / 2})
    tab.page.wait_for_url(re.compile("kind=train&step=3"))


def test_a_group_shows_its_image_with_boxes_rewards_and_advantages(tab, server):
    tab.go(server.url, "#/rollouts?run=0&kind=train&step=3")
    group = tab.page.locator("article").first
    assert group.locator(".sample").count() == 4
    sample = group.locator(".sample").last
    assert sample.locator("rect.box.predicted").count() > 0 and sample.locator("rect.box.reference").count() > 0
    assert {"format", "count", "accuracy", "spatial", "advantage"} <= set(sample.inner_text().split())
    image = sample.locator("image").get_attribute("href")
    assert tab.page.request.get(server.url + image).headers["content-type"] == "image/png"
    sample.click()
    tab.page.wait_for_selector("h1:has-text('sample 3')")
    for part in ("Objects", "Relations", "Response", "Ground truth", "mean ratio"):
        assert part in tab.page.locator("#main").inner_text()
    assert "<observe>" in tab.page.locator(".section.observe").last.inner_text()


def test_a_failed_format_says_why(tab, server):
    tab.go(server.url, "#/rollouts?run=0&failure=*")
    tab.page.locator(".sample:not(.faded)").first.click()
    assert "no closed section <observe>" in tab.page.locator(".why").inner_text()


def test_filters_combine_and_stand_in_the_address(tab, server):
    tab.go(server.url, "#/rollouts?run=0")
    count(tab, "48 rollouts in 12 groups")
    tab.page.select_option("[name=step]", "2")
    count(tab, "16 rollouts in 4 groups")
    tab.page.select_option("[name=right]", "yes")
    shown(tab, "right=yes")
    rights = tab.page.locator(".sample:not(.faded) .verdict").all_inner_texts()
    assert rights and set(rights) == {"right"}
    tab.page.fill("[name=text]", "no such text anywhere")
    count(tab, "0 rollouts in 0 groups")
    assert "text=no+such+text" in tab.page.url
    assert tab.page.evaluate("document.activeElement.name") == "text"  # typing goes on
    tab.page.click("a.clear")
    count(tab, "48 rollouts in 12 groups")
    tab.page.click("summary:has-text('ranges')")
    tab.page.fill("[name='min.part:accuracy']", "1")
    tab.page.wait_for_url(re.compile("min.part%3Aaccuracy=1"))


def test_filters_changed_at_once_all_count(tab, server):
    tab.go(server.url, "#/rollouts?run=0")
    choose = "(one) => { one.value = one.options[1].value; one.dispatchEvent(new Event('change')); }"
    tab.page.evaluate(f"['kind', 'right'].map((name) => document.querySelector(`[name=${{name}}]`)).forEach({choose})")
    shown(tab, "kind=train&right=yes")


def test_odd_rollouts_are_found(tab, server):
    for odd in ("right_bad_boxes", "wrong_good_boxes"):
        tab.go(server.url, "#/rollouts?run=0")
        tab.page.select_option("[name=odd]", odd)
        shown(tab, odd)
        for text in tab.page.locator(".sample:not(.faded)").all_text_contents():
            iou = float(re.findall(r"IoU\s([\d.]+)", text)[0])
            assert (iou <= 0.5) == (odd == "right_bad_boxes") and ("right" in text) == (odd == "right_bad_boxes")


def test_two_runs_stand_beside_each_other_on_the_same_prompts(tab, server):
    tab.go(server.url, "#/compare?run=0&other=1")
    count(tab, "4 prompts in both, of 4 and 4")
    pair = tab.page.locator(".pair").first
    assert [title.split(":")[0] for title in pair.locator("h3").all_inner_texts()] == ["alpha", "beta"]
    assert pair.locator(".question").count() == 1 and "difference" in pair.inner_text()


def test_one_prompt_is_shown_over_the_steps(tab, server):
    tab.go(server.url, FIRST)
    tab.page.click("text=this prompt over the steps")
    tab.page.wait_for_selector("h1:has-text('One prompt')")
    steps = [re.findall(r"step (\d)", title)[0] for title in tab.page.locator("article h3").all_inner_texts()]
    assert steps == ["1", "2", "3"]


def test_everything_is_reached_by_keys(tab, server):
    tab.go(server.url)
    press = tab.page.keyboard.press
    press("r")
    tab.page.wait_for_selector("#count")
    press("j")
    press("j")
    press("k")
    press("Enter")
    tab.page.wait_for_selector("h1:has-text('sample 0')")
    press("ArrowRight")
    tab.page.wait_for_selector("h1:has-text('sample 1')")
    press("?")
    tab.page.wait_for_selector("dialog[open]")
    press("Escape")
    tab.page.wait_for_selector("dialog[open]", state="hidden")
    press("c")
    tab.page.wait_for_selector(".pair")
    press("/")
    tab.page.keyboard.type("arrow")
    tab.page.wait_for_url(re.compile("text=arrow"))
    press("Escape")
    press("o")
    tab.page.wait_for_selector(".chart")


def test_dark_and_light_follow_the_system_and_the_switch(browser, server):
    colours = {}
    for scheme in ("light", "dark"):
        tab = Tab(browser, color_scheme=scheme)
        tab.go(server.url)
        paint = "getComputedStyle(document.body).backgroundColor"
        colours[scheme] = [tab.page.evaluate(paint)]
        for _ in range(2):
            tab.page.keyboard.press("t")
            colours[scheme].append(tab.page.evaluate(paint))
        tab.page.reload()
        tab.page.wait_for_selector("h1")
        assert tab.page.evaluate(paint) == colours[scheme][-1]  # the choice is kept
        tab.context.close()
    light, dark = colours["light"][0], colours["dark"][0]
    assert light != dark and colours == {"light": [light, light, dark], "dark": [dark, light, dark]}


def test_a_response_of_64_kb_is_shown_whole(tab, tmp_path):
    text = "word " * 13_107

    def lengthen(row: dict[str, Any]) -> None:
        row["response"] = text

    folder = write_recorded_run(tmp_path / "run", steps=[1], num_groups=1, num_samples=2, edit=lengthen)
    with serve([folder]) as server:
        tab.go(server.url, FIRST)
        assert tab.page.locator(".response").text_content() == text
        assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_run_of_the_older_form_opens(tab, tmp_path):
    write_old_run(tmp_path / "old", num_rows=3)
    with serve([tmp_path / "old"]) as server:
        tab.go(server.url)
        assert "recorded no rollouts" in tab.page.locator(".problems").inner_text()
        tab.page.click("text=newest: val step 4")
        count(tab, "3 rollouts in 3 groups")
        tab.page.locator(".sample").last.click()
        tab.page.wait_for_selector(".large rect.box.predicted")


def attack(row: dict[str, Any]) -> None:
    """Put attacks into every text of a recorded row."""
    for name in ("uid", "source", "category", "failure", "answer", "response", "kept", "stop_reason"):
        row[name] = f"{ATTACK} {row[name]}"
    row["uid"] += str(row["group"])
    row["problem"] = f"{ATTACK}\nQ. {ATTACK}\nOptions:\n{ATTACK}"
    row["ground_truth"] = ATTACK
    row["boxes"] = row["boxes"].replace("red", "<img src=x onerror=window.ran=10>").replace("left of", "<script>")
    row[f"part:{ATTACKS[0]}"] = 0.5
    row["token_ids"], row["token_ratios"] = [1, 2], [0.5, 2.0]


@pytest.mark.parametrize("place", ["served", "exported"])
def test_hostile_rollouts_run_nothing(tab, tmp_path, place):
    folder = tmp_path / "<img src=x onerror=window.ran=11>"
    write_recorded_run(folder, steps=[1, 2], num_groups=3, num_samples=2, edit=attack)
    write_log(folder, [3], **{attack: 1.0 for attack in ATTACKS}, **{f"reward/{ATTACKS[2]}": 1.0})
    line = '{"step": 2, "check": "<script>window.ran=12</script>", "message": "<img src=x onerror=window.ran=13>"}\n'
    with (folder / "rollouts" / "checks.jsonl").open("a") as file:
        file.write(line)
    (folder / "rollouts" / "about.json").write_text('{"reward": "<script>window.ran=14</script>", "rule": "<b>"}')
    if place == "exported":
        assert main([str(folder), str(folder), "--export", str(tmp_path / "page.html")]) == 0
        visit(tab, (tmp_path / "page.html").as_uri())
    else:
        with serve([folder, folder]) as server:
            visit(tab, server.url)


def visit(tab: Tab, url: str) -> None:
    """Open every view, and all that can be opened in it."""
    views = ["#/", "#/rollouts?run=0", FIRST, "#/compare?run=0&other=1", "#/rollouts?run=0&source=<script>&kind=<b>"]
    for view in views:
        tab.go(url, view)
        tab.page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        assert tab.page.locator("#main script, #main img[src=x], #main a[href^='javascript']").count() == 0
    tab.go(url, "#/rollouts?run=0")
    assert ATTACKS[1] in tab.page.locator("article").first.inner_text()
    tab.page.click("text=over the steps >> nth=0")
    tab.page.wait_for_selector("h1:has-text('One prompt')")
    assert ATTACKS[0] in tab.page.locator("#main").inner_text()
    assert tab.page.evaluate("typeof window.ran") == "undefined"


def test_an_exported_page_stands_alone(tab, runs, tmp_path):
    page = tmp_path / "page.html"
    where = "kind=train&step=3&sort=-score"
    assert main([*map(str, runs), "--export", str(page), "--where", where, "--limit", "3"]) == 0
    tab.go(page.as_uri(), "#/rollouts?run=1")
    count(tab, "12 rollouts in 3 groups")
    tab.page.locator(".sample").first.click()
    tab.page.wait_for_selector(".large rect.box.reference")
    assert tab.page.locator(".large image").get_attribute("href").startswith("data:image/")
    tab.page.keyboard.press("o")
    tab.page.wait_for_selector(".chart")
    tab.page.keyboard.press("c")
    tab.page.wait_for_selector(".pair")
    assert {url.partition(":")[0] for url in tab.requests} <= {"file", "data", "about"}


def test_the_page_and_the_templates_draw_a_scene_alike(browser, tmp_path):
    """One layout, two painters: shapes, places, classes and names agree."""
    text = '{"objects": [{"id": "%s.1", "bbox": [%s]}, {"id": "b.2", "bbox": [33.3, 5, 70, 61.7]}]}'
    graphs = [parse_scene(text % parts) for parts in (("cat", "10, 10, 50.5, 40"), ("dog", "12, 8, 49, 44"))]
    layout = lay_out((113, 77), *graphs)
    (tmp_path / "static.html.jinja").write_text(
        '{% extends "page.html.jinja" %}{% from "pieces.html.jinja" import scene %}'
        "{% block body %}{{ scene(layout, 'data:,') }}{% endblock %}"
    )
    tab = Tab(browser)
    tab.page.set_content(render_page(tmp_path / "static.html.jinja", title="static", layout=layout))
    for name in ("dom.js", "scene.js"):
        tab.page.add_script_tag(path=str(FOLDER / name))
    shapes = """(svg) => [...svg.querySelectorAll("rect:not(.blank), text, image")].map((one) => [
        one.tagName, one.getAttribute("class"), one.parentNode.getAttribute("class"),
        one.tagName === "text" && one.textContent,
        ...["x", "y", "width", "height", "textLength"].map((name) => Number(one.getAttribute(name)))])"""
    static = tab.page.evaluate(f"({shapes})(document.querySelector('svg'))")
    values = {"width": layout.width, "height": layout.height, "boxes": layout.boxes, "labels": layout.labels}
    drawn = tab.page.evaluate(f"(layout) => ({shapes})(drawScene(layout, 'data:,'))", values)
    tab.context.close()
    assert len(static) == len(drawn) == 1 + 2 * 4 + 2 * len(layout.labels)
    for one, other in zip(static, drawn, strict=True):
        assert one[:4] == other[:4] and all(abs(a - b) <= 1 for a, b in zip(one[4:], other[4:], strict=True))


def test_a_wrong_address_shows_why_and_keeps_the_filters(browser, server):
    tab = Tab(browser)
    tab.go(server.url, "#/rollouts?run=0&step=<script>")
    assert "'<script>' is no number" in tab.page.locator("#main > section > .bad").inner_text()
    tab.page.click("a.clear")
    count(tab, "48 rollouts in 12 groups")
    tab.go(server.url, "#/sample?run=0&kind=train&step=99&group=0&sample=0")
    assert (
        "no sample 0 of group 0 in train step 99"
        in tab.page.locator("#main .bad, #main.bad, #main > .bad").inner_text()
    )
    tab.context.close()


def test_the_first_page_asks_for_little(tab, server):
    tab.go(server.url, "#/rollouts?run=0")
    time.sleep(0.5)
    asked = [url.removeprefix(server.url).partition("?")[0] for url in tab.requests]
    assert len([name for name in asked if name.startswith("image/")]) <= 8  # once for each group, not each sample


def test_runs_of_the_tests_can_be_read(runs):
    assert Run(runs[0]).name == "alpha"

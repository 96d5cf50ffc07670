"""The page to send holds its selection and nothing that could end its data or reach out."""

import base64
import hashlib
import json
import re
from pathlib import Path

import pytest

from spatialthinker.storage.images import encode
from tests.support.recorded_runs import write_image, write_step
from verl.viewer.main import main

ROW = {"step": 1, "kind": "train", "sample": 0, "uid": "a", "score": 1.0}
HOSTILE = "</script><script>alert(1)</script><!-- <script>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from PIL import Image

    image = write_image(tmp_path / "run", encode(Image.new("RGB", (8, 4), "red"), "PNG"))
    rows = [ROW | {"group": i, "uid": f"row{i}", "score": i / 10, "response": HOSTILE} for i in range(70)]
    rows[3] |= {"images": [image, "f" * 64]}
    write_step(tmp_path / "run", rows)
    return tmp_path / "run"


def export(folder: Path, *options: str) -> tuple[str, dict]:
    """The page and its data."""
    path = folder.parent / "page.html"
    assert main([str(folder), "--export", str(path), *options]) == 0
    page = path.read_text()
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return page, json.loads(text)


def test_the_page_holds_the_groups_that_the_filters_leave(folder):
    _, data = export(folder, "--where", "max.score=2&sort=-score", "--limit", "60")
    assert [group["group"] for group in data["groups"][0]] == list(range(20, -1, -1))
    assert len(data["rollouts"]) == 21 and data["rollouts"]["0/train/1/3/0"]["uid"] == "row3"
    assert len(data["images"]) == 1  # the second image is not there
    assert len(export(folder, "--limit", "60")[1]["groups"][0]) == 60
    assert data["runs"][0]["folder"] == ""  # no path of this machine is sent


def test_no_text_ends_the_data_and_only_the_pages_own_program_runs(folder):
    page, data = export(folder, "--limit", "1")
    assert "".join(text for _, text in data["rollouts"]["0/train/1/0/0"]["sections"]) == HOSTILE
    assert page.count("<script") == page.count("</script>") == 2 and "alert(1)</script>" not in page
    program = page.rpartition("<script>")[2].partition("</script>")[0]
    style = page.partition("<style>")[2].partition("</style>")[0]
    for text in (program, style):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in page
    assert "default-src 'none'" in page and "unsafe" not in page
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", page.partition('id="data"')[0])


@pytest.mark.parametrize("where", ["colour=red", "odd=strange", "sort=colour", "min.score=x"])
def test_a_wrong_filter_is_named_and_no_page_is_written(folder, capsys, where):
    assert main([str(folder), "--export", str(folder / "page.html"), "--where", where]) == 2
    assert where.partition("=")[2] in capsys.readouterr().err or "colour" in where
    assert not (folder / "page.html").exists()

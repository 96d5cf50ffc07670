"""The viewer's server: what it serves, what it refuses, and texts and images of any size."""

import hashlib
import http.client
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from spatialthinker.storage.images import encode
from tests.support.recorded_runs import write_image, write_step
from verl.viewer.main import main
from verl.viewer.page_files import FILES
from verl.viewer.run import Run
from verl.viewer.server import Server, is_own_name

ROW = {"step": 1, "kind": "train", "group": 0, "sample": 0, "uid": "a", "score": 1.0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_step(tmp_path / "run", [ROW])
    (tmp_path / "secret").write_text("secret")
    return tmp_path / "run"


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with Server([Run(folder)], "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


def ask(server: Server, target: str, method: str = "GET", **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=30)  # type: ignore[arg-type]
    connection.putrequest(method, target, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response, body


def ask_json(server: Server, target: str):
    response, body = ask(server, target)
    assert response.status == 200, body
    return json.loads(body)


def test_every_file_of_the_page_is_served_under_a_strict_policy(server):
    for path in FILES:
        response, body = ask(server, path)
        assert response.status == 200 and body
        policy = response.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
        assert response.headers["X-Content-Type-Options"] == "nosniff"
    page = ask(server, "/")[1].decode()
    assert "<script>" not in page and "style=" not in page and "://" not in page


def test_runs_and_rollouts_come_as_json(server):
    (run,) = ask_json(server, "/api/runs")
    assert run["rollouts"] == 1
    found = ask_json(server, "/api/groups?run=0&kind=train&step=1&sort=newest&offset=0&limit=8")
    assert found["total"] == 1 and found["groups"][0]["samples"][0]["score"] == 1.0
    assert ask_json(server, "/api/rollout?run=0&kind=train&step=1&group=0&sample=0")["uid"] == "a"
    assert ask_json(server, "/api/state") == [run["revision"]]


@pytest.mark.parametrize(
    "target",
    [
        "/../secret",
        "/%2e%2e/secret",
        "/image/0/../../../secret",
        "/image/0/..%2f..%2fsecret",
        f"/image/0/{'a' * 64}/../../secret",
        "//secret",
        "/page/index.html",
        "/api/../secret",
        "/rollouts/about.json",
    ],
)
def test_no_address_leads_to_another_file(server, target):
    response, body = ask(server, target)
    assert response.status in (400, 404) and body != b"secret"


@pytest.mark.parametrize(
    ("target", "status", "message"),
    [
        ("/api/nothing", 404, "no such page"),
        ("/api/rollout?run=0&kind=train&step=9&group=0&sample=0", 404, "no sample 0"),
        ("/api/rollout?run=0&kind=train&step=x&group=0&sample=0", 400, "no whole number"),
        ("/api/rollout?run=0&kind=train", 400, "is missing"),
        ("/api/groups?run=7", 404, "no run"),
        ("/api/groups?colour=red", 400, "unknown filter"),
        ("/api/groups?min.part:nothing=1", 400, "no column"),
        ("/api/groups?min.score=high", 400, "no number"),
        ("/api/groups?odd=strange", 400, "known"),
        ("/api/groups?sort=colour", 400, "unknown order"),
        ("/api/prompt?uid=nobody", 404, "no rollout"),
        (f"/image/0/{'0' * 64}?side=320", 404, "no image"),
        (f"/image/0/{'0' * 64}?side=7", 400, "must be one of"),
        ("/api/groups?text=" + "x" * 2000, 400, "characters"),
        ("/api/groups?text=" + "x" * 40_000, 414, "too long"),
        ("/api/groups?" + "a=1&" * 200, 400, ""),
    ],
)
def test_a_wrong_request_gets_a_message(server, target, status, message):
    response, body = ask(server, target)
    assert response.status == status and message in json.loads(body)["error"]


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "", "localhost.evil.example", "127.0.0.1.nip.example"]
)
def test_a_foreign_host_name_is_refused(server, host):
    response, body = ask(server, "/api/runs", Host=host)
    assert response.status == 403 and b"rollouts" not in body


def test_own_names_are_taken():
    assert all(map(is_own_name, ("localhost", "127.0.0.1", "::1", "192.168.0.7")))
    assert not any(map(is_own_name, ("", "evil.example", "localhost.", "0x7f.1")))


def test_requests_that_another_site_makes_are_refused_and_links_are_not(server):
    assert ask(server, "/api/runs", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors")[0].status == 403
    assert ask(server, "/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")[0].status == 200
    assert ask(server, "/api/runs", Sec_Fetch_Site="same-origin", Sec_Fetch_Mode="cors")[0].status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_nothing_but_reading_is_answered(server, method):
    assert ask(server, "/api/runs", method)[0].status == 501


def test_an_image_of_twenty_megapixels_is_served_scaled(server, folder):
    picture = Image.linear_gradient("L").resize((5000, 4000)).convert("RGB")
    name = write_image(folder, encode(picture, "JPEG", quality=60))
    response, body = ask(server, f"/image/0/{name}?side=640")
    assert response.status == 200 and response.headers["Content-Type"] == "image/webp"
    assert Image.open(io.BytesIO(body)).size == (640, 512) and len(body) < 200_000


def test_a_small_image_goes_as_it_is_and_a_turned_one_upright(server, folder):
    small = encode(Image.new("RGB", (40, 20), "red"), "PNG")
    assert ask(server, f"/image/0/{write_image(folder, small)}?side=320")[1] == small
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = write_image(folder, encode(Image.new("RGB", (40, 20), "red"), "JPEG", exif=exif))
    assert Image.open(io.BytesIO(ask(server, f"/image/0/{turned}?side=320")[1])).size == (20, 40)


@pytest.mark.parametrize("data", [b"", b"no image", b"<svg xmlns='http://www.w3.org/2000/svg' onload='x()'/>"])
def test_what_is_no_image_is_never_sent(server, folder, data):
    response, body = ask(server, f"/image/0/{write_image(folder, data)}?side=320")
    assert response.status == 400 and (not data or data not in body)


def test_a_broken_image_leaves_the_rest_of_its_group(server, folder):
    write_step(folder, [ROW | {"step": 2, "images": [write_image(folder, b"no image")], "boxes": "{nonsense"}])
    group = ask_json(server, "/api/groups?step=2")["groups"][0]
    assert group["size"] is None and group["samples"][0]["layout"] is None


def test_a_response_of_64_kb_is_shown_whole(server, folder):
    text = "<scene>" * 3000 + "x" * 44_000
    write_step(folder, [ROW | {"step": 2, "response": text, "response_cut": True, "failure": "missing_scene"}])
    shown = ask_json(server, "/api/rollout?kind=train&step=2&group=0&sample=0")
    assert "".join(piece for _, piece in shown["sections"]) == text and shown["is_cut"]
    assert ask_json(server, "/api/groups?text=xxxx")["rollouts"] == 1


def test_a_new_step_is_served_without_a_restart(server, folder):
    before = ask_json(server, "/api/state")
    write_step(folder, [ROW | {"step": 2}])
    server.RequestHandlerClass.args[0].runs[0].refresh(is_forced=True)  # type: ignore[attr-defined]
    assert ask_json(server, "/api/state") > before and ask_json(server, "/api/runs")[0]["rollouts"] == 2


def test_a_taken_port_and_a_wrong_one_are_named(server, folder, capsys):
    assert main([str(folder), "--port", str(server.server_address[1])]) == 2
    assert "--port 0 takes a free port" in capsys.readouterr().err
    assert main([str(folder), "--port", "70000"]) == 2
    assert "must be from 0" in capsys.readouterr().err


def test_ids_of_images_are_digests(folder):
    data = encode(Image.new("RGB", (4, 4)), "PNG")
    assert write_image(folder, data) == hashlib.sha256(data).hexdigest()

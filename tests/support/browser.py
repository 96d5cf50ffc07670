"""A headless Chromium for tests of the viewer's page, and a server in a thread beside it."""

import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from verl.viewer.run import Run
from verl.viewer.server import Server

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
TIMEOUT_MS = 30_000


def find_browser() -> str:
    """The path of a Chromium; skips the tests where there is none, or no Playwright to drive it."""
    pytest.importorskip("playwright", reason="Playwright is not installed")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium on the path")
    return path


@contextmanager
def open_browser() -> Iterator[Any]:
    """A browser that resolves no name but this machine's."""
    path = find_browser()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = [*FLAGS, "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


class Tab:
    """A page of the browser that keeps what it asked for and what went wrong."""

    def __init__(self, browser: Any, **options: Any):
        self.context = browser.new_context(viewport={"width": 1400, "height": 950}, **options)
        self.context.set_default_timeout(TIMEOUT_MS)
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.faults: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", lambda line: self.faults.append(line.text) if line.type == "error" else None)
        self.page.on("dialog", lambda dialog: (self.faults.append(f"dialog {dialog.message}"), dialog.dismiss()))

    def go(self, url: str, view: str = "#/") -> None:
        """Open a view and wait for it."""
        self.page.goto("about:blank")
        self.page.goto(f"{url}{view}")
        self.page.wait_for_selector("#main:not([aria-busy]) > :not(.soft)")


@contextmanager
def serve(folders: Sequence[Path], port: int = 0) -> Iterator[Server]:
    """A server of runs in a thread; it and its connections end with the block."""
    with Server([Run(folder) for folder in folders], "127.0.0.1", port) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()

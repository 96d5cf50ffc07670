"""A tab of the viewer that stays open: a run that grows, a server or folder that goes away, a night of steps."""

import os
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.support.browser import Tab, serve
from tests.support.recorded_runs import write_log, write_recorded_run, write_step

pytestmark = pytest.mark.integration


def count(tab: Tab, text: str) -> None:
    """Wait until the page counts this."""
    tab.page.wait_for_selector(f"#count:text-is('{text}')")


def test_a_step_of_a_run_that_trains_appears_without_a_reload(tab, tmp_path):
    folder = write_recorded_run(tmp_path / "run", steps=[1], num_groups=2, num_samples=2)
    rows = write_rows(folder)
    with serve([folder]) as server:
        tab.go(server.url, "#/rollouts?run=0")
        count(tab, "4 rollouts in 2 groups")
        tab.page.evaluate("window.mark = 1")
        tab.page.locator(".sample").last.focus()
        write_step(folder, [row | {"step": 2} for row in rows])
        write_log(folder, [2])
        count(tab, "8 rollouts in 4 groups")
        assert tab.page.locator("article h3").first.inner_text().startswith("train step 2")
        assert tab.page.evaluate("window.mark") == 1
        tab.page.wait_for_selector(".status:has-text('live · 2')")
        tab.page.wait_for_selector("[name=step] option[value='2']", state="attached")


def write_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of the first step as plain values."""
    import pyarrow.parquet as pq

    return pq.read_table(folder / "rollouts" / "train_step_000001.parquet").to_pylist()


def test_a_tab_outlives_its_server_and_goes_on(browser, tmp_path):
    tab = Tab(browser)
    folder = write_recorded_run(tmp_path / "run", steps=[1], num_groups=2, num_samples=2)
    rows = write_rows(folder)
    with serve([folder]) as server:
        port = server.server_address[1]
        tab.go(server.url, "#/rollouts?run=0")
    tab.page.wait_for_selector(".status:has-text('trying again')")
    write_step(folder, [row | {"step": 2} for row in rows])
    with serve([folder], port):
        count(tab, "8 rollouts in 4 groups")
        tab.page.wait_for_selector(".status:has-text('live')")
    tab.context.close()
    assert all("ERR_" in fault for fault in tab.faults)  # the browser's own words on a lost connection


def test_a_tab_that_stays_open_holds_no_more_and_more(tab, tmp_path):
    """Sixty redrawings of each view, as many as a night of steps brings, leave as many nodes and listeners as five."""
    folder = write_recorded_run(tmp_path / "run")
    session = tab.context.new_cdp_session(tab.page)
    redraw = "window.dispatchEvent(new HashChangeEvent('hashchange'))"

    def counters(times: int) -> dict[str, int]:
        for _ in range(times):
            tab.page.evaluate(redraw)
            tab.page.wait_for_selector("#main:not([aria-busy])")
        session.send("HeapProfiler.collectGarbage")
        return session.send("Memory.getDOMCounters")

    with serve([folder]) as server:
        for view in ("#/rollouts?run=0", "#/"):
            tab.go(server.url, view)
            few, many = counters(5), counters(60)
            for name in ("nodes", "jsEventListeners"):
                assert many[name] < 1.5 * few[name] + 500, (view, name, few, many)


def watch(tab: Tab, part: str) -> list[str]:
    """Requests from now on whose address has this part."""
    found: list[str] = []
    tab.page.on("request", lambda request: found.append(request.url) if part in request.url else None)
    return found


def pass_time(tab: Tab, seconds: int, tick: int = 2) -> None:
    """Let the page's clock run, with what it asks for answered after each tick."""
    for _ in range(seconds // tick):
        tab.page.clock.run_for(1000 * tick)
        tab.page.wait_for_timeout(20)


def test_a_server_that_is_away_is_asked_rarely(browser, tmp_path):
    tab = Tab(browser)
    tab.page.clock.install()
    folder = write_recorded_run(tmp_path / "run", steps=[1], num_groups=2, num_samples=2)
    with serve([folder]) as server:
        tab.go(server.url, "#/rollouts?run=0")
        asked = watch(tab, "api/")
        pass_time(tab, 60)
        assert 10 <= len(asked) <= 31 and {"state"} == {url.rpartition("/")[2] for url in asked}
    asked = watch(tab, "api/")
    pass_time(tab, 300)
    assert 5 <= len(asked) <= 16
    tab.context.close()


def test_a_tab_that_nobody_sees_draws_nothing_until_it_is_seen(tab, tmp_path):
    tab.page.clock.install()
    folder = write_recorded_run(tmp_path / "run", steps=[1], num_groups=2, num_samples=2)
    rows = write_rows(folder)
    look = "(is) => { Object.defineProperty(document, 'hidden', { value: is, configurable: true }); "
    look += "document.dispatchEvent(new Event('visibilitychange')); }"
    with serve([folder]) as server:
        tab.go(server.url, "#/rollouts?run=0")
        pass_time(tab, 4)
        tab.page.evaluate(look, True)
        asked = watch(tab, "api/")
        for step in range(2, 5):
            write_step(folder, [row | {"step": step} for row in rows])
            time.sleep(1.1)  # the server's own clock
            pass_time(tab, 40)
        assert 3 <= len(asked) <= 10 and {"state"} == {url.rpartition("/")[2] for url in asked}
        tab.page.evaluate(look, False)
        count(tab, "16 rollouts in 8 groups")


def test_a_run_whose_folder_goes_away_says_so_and_comes_back(tab, tmp_path):
    folder = write_recorded_run(tmp_path / "run", steps=[1], num_groups=2, num_samples=2)
    with serve([folder]) as server:
        tab.go(server.url)
        folder.rename(tmp_path / "elsewhere")
        tab.page.wait_for_selector(".problems:has-text('is gone')")
        (tmp_path / "elsewhere").rename(folder)
        tab.page.wait_for_selector("text=newest: train step 1")


def test_thousands_of_steps_leave_the_page_as_large_as_hundreds(tab, tmp_path):
    folder = write_recorded_run(tmp_path / "run", steps=[1], num_groups=1, num_samples=2)
    first = folder / "rollouts" / "train_step_000001.parquet"

    def add(steps: range) -> None:
        for step in steps:
            os.link(first, first.with_name(f"train_step_{step:06d}.parquet"))
        write_log(folder, steps)

    def size(view: str) -> int:
        tab.go(server.url, view)
        return tab.page.evaluate("document.getElementsByTagName('*').length")

    def read() -> None:
        time.sleep(1.1)  # the server's own clock
        urllib.request.urlopen(f"{server.url}api/state", timeout=300).close()

    add(range(2, 301))
    views = ("#/", "#/rollouts?run=0", "#/rollouts?run=0&kind=train&step=7")
    with serve([folder]) as server:
        read()
        few = [size(view) for view in views]
        add(range(301, 2001))
        read()
        many = [size(view) for view in views]
        assert tab.page.locator("[name=step] option").count() == 202  # all, the newest, and the chosen one
        assert tab.page.locator("[name=step]").input_value() == "7"
        tab.page.click("text=step 8 ›")
        count(tab, "2 rollouts in 1 groups")
        tab.go(server.url, "#/rollouts?run=0")
        count(tab, "4000 rollouts in 2000 groups")
    assert many == few

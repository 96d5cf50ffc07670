"""A browser for the tests of the viewer's page."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.browser import Tab, find_browser, open_browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    find_browser()
    with open_browser() as browser:
        yield browser


@pytest.fixture
def tab(browser: Any) -> Iterator[Tab]:
    """A tab in which nothing goes wrong and that asks no other machine."""
    tab = Tab(browser)
    yield tab
    tab.context.close()
    assert not tab.faults
    assert not [url for url in tab.requests if not re.match(r"(http://127\.0\.0\.1:|data:|about:|file:)", url)]

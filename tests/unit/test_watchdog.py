"""A call that does not come back is shown with the stack of its process; one that does leaves nothing."""

import re
import subprocess
import sys
import time

import pytest

from verl.distributed.watchdog import Watchdog, watched


@watched
def inner_loop(seconds: float) -> str:
    time.sleep(seconds)
    return "done"


@watched
def stand_still(seconds: float) -> str:
    return inner_loop(seconds)


@pytest.fixture
def watchdog(tmp_path, monkeypatch):
    monkeypatch.setattr("verl.distributed.watchdog._process", {"is_armed": False, "file": None})
    guard = Watchdog(0.2, tmp_path / "stacks")
    for name, value in guard.environment("actor", 1).items():
        monkeypatch.setenv(name, value)
    return guard


def test_a_stall_writes_the_stack_and_a_quick_call_nothing(watchdog):
    file = watchdog.folder / "actor_rank_1.txt"
    assert stand_still(0) == "done"
    assert file.read_text() == ""
    watchdog.remove_empty()
    assert not watchdog.folder.exists()


def test_the_stack_names_the_line_that_does_not_end(watchdog):
    assert stand_still(0.5) == "done"
    text = (watchdog.folder / "actor_rank_1.txt").read_text()
    assert "in inner_loop" in text and "in stand_still" in text and text.count("Timeout") == 1
    watchdog.remove_empty()
    assert watchdog.folder.exists()
    assert watchdog.caller_timeout_s > watchdog.timeout_s


def test_a_stall_names_the_stacks_only_where_there_are_some(watchdog):
    assert "no process wrote its stack" in watchdog.describe_stacks()
    assert stand_still(0) == "done"  # an empty file
    assert "no process wrote its stack" in watchdog.describe_stacks()
    assert stand_still(0.5) == "done"
    assert str(watchdog.folder) in watchdog.describe_stacks()


def test_without_a_watchdog_nothing_is_armed(monkeypatch):
    monkeypatch.delenv("VERL_WATCHDOG_TIMEOUT_S", raising=False)
    assert stand_still(0) == "done"


ALONE = """
import torch
from verl.distributed.fsdp import init_mesh, open_store
try:
    init_mesh(open_store("127.0.0.1")[0], 0, 2, torch.device("cpu"), start_timeout_s=1)
except RuntimeError as error:
    print(error, flush=True)
"""


@pytest.mark.integration
def test_a_rank_that_nobody_joins_says_so_in_time():
    started = time.monotonic()
    output = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=100).stdout
    assert (
        re.search("rank 0 of 2 on .* cannot talk to the others: the first all-reduce did", output)
        and "GLOO_SOCKET_IFNAME" in output
    )
    assert time.monotonic() - started < 90

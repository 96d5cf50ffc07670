"""Runs over a server whose answers break every rule: nothing ends them, nothing is paid twice, each cent counts."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from data_gen.generate_data import main
from data_gen.journal import newest_lines
from data_gen.questions.records import read_records
from spatialthinker.clients.prices import PRICES, Usage, cost_usd
from spatialthinker.stop_signals import STOP_SIGNALS
from spatialthinker.storage.journal import read_lines

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
MODELS = {"anthropic": "claude-sonnet-4-5", "openai": "gpt-4o"}
KEY = "test-key-0123456789"


class FaultServer:
    """The stand-in for the APIs in its own process, with 30 % of all kinds of faults."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.bill, self.calls = folder / "bill.txt", folder / "calls.txt"
        self.bill.touch()
        self.calls.touch()
        command = [sys.executable, "tests/support/mock_api.py", "--bill", str(self.bill), "--calls", str(self.calls)]
        self.process = subprocess.Popen([*command, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()

    def arguments(self, provider: str) -> list[str]:
        address = self.address + ("/v1" if provider == "openai" else "")
        return [f"--provider={provider}", f"--base_url={address}", f"--model_name={MODELS[provider]}"]

    def stats(self) -> dict[str, int]:
        return json.loads(urllib.request.urlopen(f"{self.address}/stats").read())

    def num_answers(self) -> int:
        return len(self.calls.read_text().split())

    def billed_usd(self, provider: str) -> float:
        """Dollars for what the usage of each answer says."""
        total = 0.0
        for line in self.bill.read_text().splitlines():
            used, is_batch = json.loads(line)
            if not isinstance(used, dict) or None in used.values():
                continue
            if provider == "openai":
                read = used["prompt_tokens_details"]["cached_tokens"]
                usage = Usage(used["prompt_tokens"] - read, used["completion_tokens"], read)
            else:
                usage = Usage(used["input_tokens"], used["output_tokens"], used["cache_read_input_tokens"])
            total += cost_usd(usage, PRICES[MODELS[provider]], is_batch)
        return total


@pytest.fixture
def serve(tmp_path, monkeypatch):
    monkeypatch.setattr("spatialthinker.clients.model_api._FIRST_WAIT_S", 0.02)
    monkeypatch.setattr("spatialthinker.clients.model_api.REQUEST_S", 6.0)
    for name in ("ANTHROPIC_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, KEY)
    servers = []

    def start(*arguments: str) -> FaultServer:
        servers.append(FaultServer(tmp_path, *arguments))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()
        server.process.wait()


EVERY_FAULT = ("--faults", "0.3", "--kinds", "every", "--timeout_s", "0.3")


def preprocess(server: FaultServer, out: Path, provider: str, source: int, *arguments: str) -> int:
    return main(
        ["preprocess_data", *server.arguments(provider), f"--source=synthetic:{source}", f"--out={out}", *arguments]
    )


def check_outcomes(out: Path, number: int) -> list[str]:
    """Statuses of all items, each with a reason where it is no row."""
    lines = list(newest_lines(out.with_suffix(".jsonl")))
    assert len(lines) == number
    assert all(line["status"] == "accepted" or line["reason"] for line in lines)
    written = out.read_text() + out.with_suffix(".jsonl").read_text()
    assert KEY not in written and "\x1b" not in written and "\x00" not in written
    return [line["status"] for line in lines]


def check_cost(server: FaultServer, out: Path, provider: str) -> None:
    counted = sum(line.get("cost_usd", 0.0) for line in read_lines(out.with_suffix(".jsonl")))
    billed = server.billed_usd(provider)
    print(f"{provider}: {counted:.6f} dollars counted, {billed:.6f} billed")
    assert counted == pytest.approx(billed, abs=1e-7 * server.num_answers())


def live(server: FaultServer, out: Path, provider: str, number: int, capsys) -> None:
    """Ten restarts, each a tenth further, and each once more to see that nothing is asked again."""
    for step in range(1, 11):
        cap = number * step // 10
        assert preprocess(server, out, provider, number, f"--data_cap={cap}") == 0
        statuses = check_outcomes(out, cap)
        before = server.stats()["requests"]
        assert preprocess(server, out, provider, number, f"--data_cap={cap}") == 0
        assert "error" in statuses or server.stats()["requests"] == before
    printed = capsys.readouterr()
    assert KEY not in printed.err + printed.out and "\x1b" not in printed.err + printed.out
    assert "Traceback" not in printed.err
    check_cost(server, out, provider)
    statuses = check_outcomes(out, number)
    print(provider, {status: statuses.count(status) for status in set(statuses)}, server.stats(), server.num_answers())
    assert statuses.count("accepted") > 0.85 * number


def batches(server: FaultServer, out: Path, provider: str, number: int, capsys) -> None:
    for _ in range(30):
        assert preprocess(server, out, provider, number, "--batch_api=True") == 0
        printed = capsys.readouterr()
        assert KEY not in printed.err + printed.out and "\x1b" not in printed.err + printed.out
        if "0 batches with 0 images" in printed.out:
            break
    statuses = check_outcomes(out, number)
    before = server.stats()
    for _ in range(10):
        assert preprocess(server, out, provider, number, "--batch_api=True") == 0
    assert server.stats() == before
    check_cost(server, out, provider)
    print(provider, {status: statuses.count(status) for status in set(statuses)}, before, server.num_answers())
    assert statuses.count("accepted") > 0.85 * number and "error" not in statuses
    kept = list(out.with_name("t.batches").iterdir())
    assert len(kept) == before["downloads"]


@pytest.mark.parametrize("run", [live, batches])
@pytest.mark.parametrize("provider", MODELS)
def test_every_item_ends_with_a_row_or_a_reason_and_is_paid_once(serve, tmp_path, capsys, provider, run):
    run(serve(*EVERY_FAULT), tmp_path / "t.csv", provider, 100, capsys)


@pytest.mark.nightly
@pytest.mark.parametrize("run", [live, batches])
@pytest.mark.parametrize("provider", MODELS)
def test_two_thousand_items_end_with_a_row_or_a_reason_and_are_paid_once(
    serve, tmp_path, capsys, provider, run, monkeypatch
):
    # An answer that is given up is billed all the same: the limit must be longer than a loaded server needs.
    monkeypatch.setattr("spatialthinker.clients.model_api.REQUEST_S", 20.0)
    run(serve(*EVERY_FAULT), tmp_path / "t.csv", provider, 2000, capsys)


def test_a_disk_that_stalls_longer_than_the_limit_costs_no_answer(serve, tmp_path, monkeypatch):
    """Answers that come while the process has no turn are read before any limit ends their requests."""
    monkeypatch.setattr("spatialthinker.clients.model_api.REQUEST_S", 2.0)
    monkeypatch.setattr("data_gen.journal._SYNC_S", 0.0)
    stalls = iter([2.5] * 4)
    monkeypatch.setattr("data_gen.journal.os.fsync", lambda _: time.sleep(next(stalls, 0.0)))
    server, out = serve("--latency_s", "0.3"), tmp_path / "t.csv"
    assert preprocess(server, out, "anthropic", 60, "--concurrency=16") == 0
    assert check_outcomes(out, 60) == ["accepted"] * 60 and server.num_answers() == 60
    check_cost(server, out, "anthropic")


def test_validation_over_faults_counts_no_error_as_disagreement(serve, tmp_path, capsys):
    server, out = serve(*EVERY_FAULT), tmp_path / "v.csv"
    assert (
        main(["preprocess_data", "--provider=template", "--source=synthetic:60", f"--out={tmp_path / 't.csv'}"]) == 0
    )
    command = ["validate_with_gpt4o", f"--input_file={tmp_path / 't.csv'}", f"--output_file={out}"]
    for _ in range(10):
        assert main([*command, *server.arguments("openai")]) == 0
    lines = list(newest_lines(out.with_suffix(".jsonl")))
    assert len(lines) == 60
    for line in lines:
        assert line["status"] == "accepted" or line["reason"]
        assert line["status"] != "quarantined" or "agreed 0 times in 4" in line["reason"]
    assert sum(line["status"] == "accepted" for line in lines) > 30
    check_cost(server, out, "openai")


ENVIRONMENT = os.environ | {"ANTHROPIC_API_KEY": KEY, "OPENAI_API_KEY": KEY}


IN_BACKGROUND = ["bash", "-c", """trap "" INT; exec "$@" """, "bash"]
"""Start of a command as a script's `&` starts it: with SIGINT ignored."""


def command(server: FaultServer, out: Path, number: int, *arguments: str) -> list[str]:
    given = [
        "preprocess_data",
        *server.arguments("anthropic"),
        f"--source=synthetic:{number}",
        f"--out={out}",
        *arguments,
    ]
    return [sys.executable, "data_gen/generate_data.py", *given]


@pytest.mark.parametrize("start", [[], IN_BACKGROUND], ids=["foreground", "background"])
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_waits_for_the_answers_under_way(serve, tmp_path, number, start):
    server, out = serve("--latency_s", "1"), tmp_path / "t.csv"
    given = [*start, *command(server, out, 300, "--concurrency=8")]
    process = subprocess.Popen(given, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while server.stats()["requests"] < 16:  # eight are answered, eight under way
        time.sleep(0.05)
    process.send_signal(number)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "answers are under way and waited for, 25 s at most" in message and "stopped; the same command" in message
    lines = [line for line in read_lines(out.with_suffix(".jsonl")) if "key" in line]
    assert sum(len(line["replies"]) for line in lines) == server.num_answers() >= 16
    assert len(list(read_records(out))) == sum(line["status"] == "accepted" for line in lines) > 0


@pytest.mark.parametrize("shell", ["2>&1 | head -c 1", "2>/dev/null | true", "| true"])
def test_a_closed_pipe_loses_no_answer(serve, tmp_path, shell):
    server, out = serve(), tmp_path / "t.csv"
    script = " ".join(command(server, out, 40)) + f" {shell}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert done.returncode in (0, 141)
    lines = [line for line in read_lines(out.with_suffix(".jsonl")) if "key" in line]
    assert sum(len(line["replies"]) for line in lines) == server.num_answers()


def test_few_file_descriptors_slow_a_run_down_and_no_more(serve, tmp_path):
    server, out = serve("--latency_s", "0.02"), tmp_path / "t.csv"
    script = f"ulimit -n 64; {' '.join(command(server, out, 120, '--concurrency=200'))}"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list(read_records(out))) == 120 == server.num_answers()


@pytest.mark.parametrize("out", ["/dev/null/t.csv", "/proc/t.csv", "folder.csv", "rows.txt/t.csv"])
def test_a_place_that_cannot_be_written_is_told_before_anything_is_asked(serve, tmp_path, capsys, out):
    server = serve()
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "rows.txt").touch()
    assert preprocess(server, tmp_path / out, "openai", 5) == 2
    message = capsys.readouterr().err
    assert message.startswith("generate_data: ") and message.count("\n") == 1
    assert server.stats()["requests"] == 0

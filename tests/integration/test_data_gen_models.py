"""Runs over models against a local mock of both APIs: faults, kills, budgets, prices, validation."""

import csv
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_gen.generate_data import main
from data_gen.journal import newest_lines
from data_gen.questions.records import read_records
from spatialthinker.clients.model_api import ApiStop, RequestFault
from spatialthinker.clients.prices import PRICES, Usage, cost_usd
from spatialthinker.clients.providers import APIS
from spatialthinker.storage.journal import read_lines

pytestmark = pytest.mark.integration

MODELS = {"anthropic": "claude-sonnet-4-5", "openai": "gpt-4o"}


class Mock:
    """The mock server in its own process."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.calls = folder / "calls.txt"
        self.calls.touch()
        command = [sys.executable, "tests/support/mock_api.py", "--calls", str(self.calls), *arguments]
        environment = os.environ | {"PYTHONPATH": os.getcwd()}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()

    def counts(self) -> Counter[str]:
        return Counter(self.calls.read_text().split())

    def arguments(self, provider: str) -> list[str]:
        address = self.address + ("/v1" if provider == "openai" else "")
        return [f"--provider={provider}", f"--base_url={address}", f"--model_name={MODELS[provider]}"]


def start(tmp_path_factory: pytest.TempPathFactory, *arguments: str) -> Iterator[Mock]:
    mock = Mock(tmp_path_factory.mktemp("mock"), *arguments)
    yield mock
    mock.process.kill()
    mock.process.wait()


@pytest.fixture(scope="module")
def mock(tmp_path_factory) -> Iterator[Mock]:
    yield from start(tmp_path_factory, "--latency_s", "0.02")


@pytest.fixture(scope="module")
def faulty_mock(tmp_path_factory) -> Iterator[Mock]:
    yield from start(tmp_path_factory, "--latency_s", "0.01", "--faults", "0.3", "--timeout_s", "0.3")


@pytest.fixture(autouse=True)
def keys(monkeypatch) -> None:
    for name in ("ANTHROPIC_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, "test")


def preprocess(mock: Mock, out: Path, number: int, *arguments: str, provider: str = "anthropic") -> int:
    source = f"--source=synthetic:{number}"
    return main(["preprocess_data", *mock.arguments(provider), source, f"--out={out}", *arguments])


@pytest.mark.parametrize("provider", MODELS)
def test_every_scene_gets_a_checked_question(mock, tmp_path, provider):
    out = tmp_path / "t.csv"
    assert preprocess(mock, out, 40, provider=provider) == 0
    records = list(read_records(out))
    assert len(records) == 40
    assert Counter(x["asked"][0] for x in newest_lines(out.with_suffix(".jsonl")))["relation"] == 20
    line = next(newest_lines(out.with_suffix(".jsonl")))
    assert line["usage"]["cache_read"] == 1400 and line["usage"]["output"] == 120 and line["cost_usd"] > 0
    assert line["record"]["provenance"]["model"] == MODELS[provider] and line["replies"]


@pytest.mark.parametrize("provider", MODELS)
def test_with_faults_every_scene_ends_with_a_row_or_a_reason(faulty_mock, tmp_path, provider, monkeypatch):
    monkeypatch.setattr("spatialthinker.clients.model_api._FIRST_WAIT_S", 0.02)
    out = tmp_path / "t.csv"
    assert preprocess(faulty_mock, out, 80, provider=provider) == 0
    lines = list(newest_lines(out.with_suffix(".jsonl")))
    assert len(lines) == 80
    assert all(line["status"] == "accepted" or (line["status"] == "quarantined" and line["reason"]) for line in lines)
    assert sum(line["status"] == "accepted" for line in lines) > 70
    assert any(len(line["replies"]) == 2 for line in lines)


def kill_and_resume(mock: Mock, folder: Path, number: int, num_kills: int, seed: int) -> None:
    """Kill a run at random moments, resume it, and compare with an unbroken one."""
    rng, concurrency = random.Random(seed), 4
    arguments = (f"--concurrency={concurrency}",)
    before = mock.counts()
    assert preprocess(mock, folder / "whole.csv", number, *arguments) == 0
    whole_calls = mock.counts() - before
    before = mock.counts()
    out, journal, context = folder / "broken.csv", folder / "broken.jsonl", multiprocessing.get_context("fork")
    for num_lines in sorted(rng.sample(range(number), num_kills)):
        process = context.Process(target=preprocess, args=(mock, out, number, *arguments))
        process.start()
        while not journal.is_file() or journal.read_bytes().count(b"\n") < num_lines:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.02))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert preprocess(mock, out, number, *arguments) == 0
    assert out.read_bytes() == (folder / "whole.csv").read_bytes()
    calls = mock.counts() - before
    assert set(calls) == set(whole_calls)
    assert calls.total() - whole_calls.total() <= num_kills * concurrency
    keys = [line["key"] for line in read_lines(out.with_suffix(".jsonl")) if "key" in line]
    assert len(keys) == len(set(keys)) == number


def test_a_killed_run_goes_on_and_ends_as_the_unbroken_one(mock, tmp_path):
    kill_and_resume(mock, tmp_path, 60, num_kills=4, seed=0)


@pytest.mark.nightly
def test_fifty_kills(mock, tmp_path):
    kill_and_resume(mock, tmp_path, 800, num_kills=50, seed=1)


@pytest.mark.nightly
@pytest.mark.parametrize("provider", MODELS)
def test_two_thousand_scenes_are_asked_side_by_side_in_flat_memory(tmp_path_factory, tmp_path, provider):
    import resource

    for mock in start(tmp_path_factory, "--latency_s", "1"):
        assert preprocess(mock, tmp_path / "a.csv", 500, "--concurrency=64", provider=provider) == 0
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        assert preprocess(mock, tmp_path / "b.csv", 2000, "--concurrency=64", provider=provider) == 0
        growth_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - peak_mb
        most = int(urllib.request.urlopen(f"{mock.address}/most_under_way").read())
        print(f"{provider}: {most} requests at once, {growth_mb:.1f} MiB more than for 500")
        assert 32 <= most <= 64 and growth_mb < 50


def test_a_budget_ends_the_run_and_a_higher_one_goes_on(mock, tmp_path, capsys):
    out = tmp_path / "t.csv"
    assert preprocess(mock, out, 60, "--max_cost_usd=0.05", "--concurrency=2") == 0
    assert "stopped at --max_cost_usd 0.05" in capsys.readouterr().err
    spent = sum(line["cost_usd"] for line in newest_lines(out.with_suffix(".jsonl")))
    assert 0.03 < spent < 0.06
    assert preprocess(mock, out, 60) == 0
    assert len(list(read_records(out))) == 60


@pytest.mark.parametrize("provider", MODELS)
def test_batches_are_submitted_and_collected_across_runs(faulty_mock, tmp_path, provider, capsys):
    out, before = tmp_path / "t.csv", faulty_mock.counts().total()
    for _ in range(20):
        assert preprocess(faulty_mock, out, 40, "--batch_api=True", provider=provider) == 0
        if "0 batches with 0 images" in capsys.readouterr().out:
            break
    lines = list(newest_lines(out.with_suffix(".jsonl")))
    assert len(lines) == 40 and sum(line["status"] == "accepted" for line in lines) > 30
    assert all(line["status"] == "accepted" or line["reason"] for line in lines)
    assert faulty_mock.counts().total() - before < 40 * 2
    price = PRICES[MODELS[provider]]
    for line in lines:
        assert line["cost_usd"] == pytest.approx(cost_usd(Usage(**line["usage"]), price, is_batch=True), abs=1e-6)


def cut_off_submission(mock: Mock, out: Path, provider: str, has_arrived: bool) -> None:
    """A run that is killed just before or just after the provider has its batch, the id not noted yet."""
    api = APIS[provider]
    send = api._send_batch

    async def killed(*arguments) -> str:
        if has_arrived:
            await send(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)
        return ""

    def run() -> None:
        setattr(api, "_send_batch", killed)  # noqa: B010
        preprocess(mock, out, 12, "--batch_api=True", provider=provider)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("has_arrived", [True, False])
@pytest.mark.parametrize("provider", MODELS)
def test_a_batch_whose_submission_was_cut_off_is_neither_paid_twice_nor_lost(
    mock, tmp_path, provider, has_arrived, capsys, monkeypatch
):
    out, before = tmp_path / "t.csv", mock.counts()
    cut_off_submission(mock, out, provider, has_arrived)
    assert preprocess(mock, out, 12, "--batch_api=True", provider=provider) == 0
    is_told_at_once = has_arrived and provider == "openai"
    assert ("may have arrived" in capsys.readouterr().out) != is_told_at_once
    monkeypatch.setattr("spatialthinker.clients.model_api.ARRIVAL_S", 0.0)
    for _ in range(4):
        assert preprocess(mock, out, 12, "--batch_api=True", provider=provider) == 0
    assert len(list(read_records(out))) == 12
    calls = mock.counts() - before
    assert len(calls) == 12 and set(calls.values()) == {1}


def test_a_wrong_key_or_an_unknown_price_ends_with_one_message(mock, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", "bad-key")
    assert preprocess(mock, tmp_path / "a.csv", 5) == 2
    message = capsys.readouterr().err
    assert "generate_data: claude-sonnet-4-5: Error code: 401" in message and "Traceback" not in message
    assert preprocess(mock, tmp_path / "b.csv", 5, "--model_name=my-model", "--max_cost_usd=1") == 2
    assert "none is known of 'my-model'" in capsys.readouterr().err


def test_validation_keeps_agreement_and_flags_what_needs_no_picture(mock, tmp_path, capsys):
    source = ("--provider=template", "--source=synthetic:24", f"--out={tmp_path / 't.csv'}")
    assert main(["preprocess_data", *source]) == 0
    command = ["validate_with_gpt4o", f"--input_file={tmp_path / 't.csv'}", *mock.arguments("openai")]
    before = mock.counts().total()
    for name, more in (("a.csv", []), ("v.csv", ["--votes=3"]), ("b.parquet", ["--blind_control=drop"])):
        assert main([*command, f"--output_file={tmp_path / name}", *more]) == 0
    once = mock.counts().total()
    assert 24 * (1 + 3 + 1) < once - before
    by_tries = [line for line in newest_lines(tmp_path / "a.jsonl")]
    assert len(by_tries) == 24 and all(len(x["agreements"]) <= 4 for x in by_tries)
    kept = {line["key"] for line in by_tries if line["status"] == "accepted"}
    assert {x["key"] for x in by_tries if any(x["agreements"])} == kept
    assert all(2 * sum(x["agreements"]) > 3 for x in newest_lines(tmp_path / "v.jsonl") if x["status"] == "accepted")
    blind = [line for line in newest_lines(tmp_path / "b.jsonl") if line.get("is_blind")]
    assert blind and all(line["status"] == "quarantined" for line in blind)
    assert len(list(read_records(tmp_path / "b.parquet"))) == 24 - len(blind) - sum(
        not any(line["agreements"]) for line in newest_lines(tmp_path / "b.jsonl")
    )
    assert main([*command, f"--output_file={tmp_path / 'a.csv'}"]) == 0
    assert mock.counts().total() == once
    with (tmp_path / "a.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(kept)


def test_errors_of_the_validator_never_count_as_disagreement(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("spatialthinker.clients.model_api.MAX_TRIES", 2)
    monkeypatch.setattr("spatialthinker.clients.model_api._FIRST_WAIT_S", 0.01)
    source = ("--provider=template", "--source=synthetic:5", f"--out={tmp_path / 't.csv'}")
    assert main(["preprocess_data", *source]) == 0
    dead = ["--provider=openai", "--base_url=http://127.0.0.1:9/v1"]
    command = ["validate_with_gpt4o", f"--input_file={tmp_path / 't.csv'}", f"--output_file={tmp_path / 'v.csv'}"]
    assert main([*command, *dead]) == 0
    lines = list(newest_lines(tmp_path / "v.jsonl"))
    assert [line["status"] for line in lines] == ["error"] * 5 and "no answer after 2 tries" in lines[0]["reason"]


def test_a_missing_key_is_told_before_anything_is_written(tmp_path, capsys, monkeypatch):
    for name in APIS["anthropic"].KEYS:
        monkeypatch.delenv(name, raising=False)
    assert main(["preprocess_data", "--source=synthetic:5", f"--out={tmp_path / 't.csv'}"]) == 2
    assert "set ANTHROPIC_API_KEY" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_a_dry_run_prints_prices_and_calls_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    out = tmp_path / "t.csv"
    assert main(["preprocess_data", "--source=synthetic:20", f"--out={out}", "--dry_run"]) == 0
    text = capsys.readouterr().out
    assert "20 images" in text and "56224 images" in text and "780.00" in text
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 2 MB that this process alone sees, in a namespace of a child that holds it open."""
    command = ["unshare", "-Urm", "sh", "-c", "mount -t tmpfs -o size=2m none /mnt && echo ready && sleep 600"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        pytest.skip("this machine allows no mount in a user namespace")
    yield Path(f"/proc/{process.pid}/root/mnt")
    process.kill()
    process.wait()


def test_a_disk_that_fills_up_while_answers_are_waited_for(mock, small_disk, capsys):
    out, filler = small_disk / "t.csv", small_disk / "filler"
    filler.write_bytes(bytes(1_000_000))
    before = mock.counts()
    assert preprocess(mock, out, 400, "--concurrency=8") == 2
    assert "make room" in capsys.readouterr().err.lower()
    lines = [x for x in read_lines(out.with_suffix(".jsonl")) if "key" in x]
    assert 20 < len(lines) < 400
    assert sum(len(x["replies"]) for x in lines) == (mock.counts() - before).total()
    assert not out.with_name("t.csv.tmp").exists()
    assert preprocess(mock, small_disk / "u.csv", 400, "--concurrency=32") == 2
    assert "has no room for 2 MB of answers" in capsys.readouterr().err


@pytest.mark.parametrize("status, text", [(400, "Your credit balance is too low"), (429, "code: insufficient_quota")])
def test_an_account_without_money_ends_the_run_and_condemns_no_image(status, text):
    class Refusal(Exception):
        status_code = status

    api = APIS["anthropic"]("claude-sonnet-4-5")
    with pytest.raises(ApiStop, match="claude-sonnet-4-5: " + text):
        api._judge(Refusal(text), 1.0)
    with pytest.raises(RequestFault):
        api._judge(type("Refusal", (Exception,), {"status_code": 400})("image too large"), 1.0)

"""Evaluations that are stopped, run out of disk, or lose the reader of their output: what was paid for is kept."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

from evaluation import evals
from evaluation.engines import answering
from evaluation.journal import AnswerJournal, read_journal
from spatialthinker.clients import model_api
from spatialthinker.stop_signals import STOP_SIGNALS
from tests.integration.test_evaluation_api import ROOT, arguments, data_dir, read, serve  # noqa: F401 -- fixtures

pytestmark = pytest.mark.integration


def start(given, **options):
    command = [sys.executable, "evaluation/evals.py", *given]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, **options)


def wait_for_calls(calls, number):
    while not calls.exists() or len(calls.read_text().split()) < number:
        time.sleep(0.05)


def wait_for_requests(address, number):
    while int(urllib.request.urlopen(f"{address}/most_under_way").read()) < number:
        time.sleep(0.05)


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_a_signal_waits_for_answers_under_way(data_dir, tmp_path, serve, signum):  # noqa: F811
    address, calls = serve(latency_s=1)
    given = arguments(data_dir, tmp_path, address, "--num_samples", "40", "--concurrency", "8")
    process = start(given, stdout=subprocess.DEVNULL)
    wait_for_requests(address, 8)
    process.send_signal(signum)
    error = process.communicate()[1]
    assert process.returncode == 128 + signum
    assert "stopping: answers under way have 25 s" in error and "go on with --resume" in error
    assert "Traceback" not in error
    answered = read_journal(tmp_path / "run.jsonl")[1]
    assert 8 <= len(answered) == len(calls.read_text().split()) < 40
    assert evals.main([*given, "--resume"]) == 0
    assert len(read(tmp_path / "run.json")) == len(calls.read_text().split()) == 40


def test_a_terminal_that_is_closed_loses_no_answer(data_dir, tmp_path, serve):  # noqa: F811
    address, calls = serve(latency_s=1)
    given = arguments(data_dir, tmp_path, address, "--num_samples", "40", "--concurrency", "8")
    controller, terminal = os.openpty()
    take_terminal = (
        "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    )
    command = [sys.executable, "-c", take_terminal, sys.executable, "evaluation/evals.py", *given]
    streams = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **streams)
    os.close(terminal)
    wait_for_requests(address, 8)
    os.close(controller)
    assert process.wait(60) == 128 + signal.SIGHUP
    answered = read_journal(tmp_path / "run.jsonl")[1]
    assert 8 <= len(answered) == len(calls.read_text().split()) < 40


def test_a_signal_ends_retries_at_once_and_they_are_no_errors(data_dir, tmp_path, serve):  # noqa: F811
    address, calls = serve(faults=1.0, kinds="500")
    given = arguments(data_dir, tmp_path, address, "--num_samples", "20", "--concurrency", "4")
    process = start(given, stdout=subprocess.DEVNULL)
    for line in process.stderr:
        if "no answer, trying on" in line:
            break
    process.send_signal(signal.SIGTERM)
    error = process.communicate()[1]
    assert process.returncode == 143 and "Traceback" not in error and "evals: stopped" in error
    assert not read_journal(tmp_path / "run.jsonl")[1] and not calls.exists()


def test_a_second_signal_ends_at_once(data_dir, tmp_path, serve):  # noqa: F811
    address, _ = serve(latency_s=60)
    process = start(arguments(data_dir, tmp_path, address, "--num_samples", "4"), stdout=subprocess.DEVNULL)
    wait_for_requests(address, 4)
    process.send_signal(signal.SIGINT)
    assert any("stopping" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate()[1] and process.returncode == 130


@pytest.mark.parametrize("has_room_later", [True, False])
def test_a_full_disk_asks_nothing_more(data_dir, tmp_path, serve, monkeypatch, capsys, has_room_later):  # noqa: F811
    address, calls = serve(latency_s=0.3)
    room = [5]

    def append(journal, line):
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        whole_append(journal, line)

    def give_up(reserve):
        if room[0] < 0 and has_room_later:
            room[0] = 100
        return whole_give_up(reserve)

    whole_append, whole_give_up = AnswerJournal.append, answering.Reserve.give_up
    given = arguments(data_dir, tmp_path, address, "--num_samples", "40", "--concurrency", "8")
    with monkeypatch.context() as patch:
        patch.setattr(AnswerJournal, "append", append)
        patch.setattr(answering.Reserve, "give_up", give_up)
        assert evals.main(given) == 2
    message = capsys.readouterr().err
    assert "cannot be written: No space left on device" in message and "go on with --resume" in message
    asked = len(calls.read_text().split())
    assert len(read_journal(tmp_path / "run.jsonl")[1]) == (asked if has_room_later else 4)
    assert asked < 40 and ("answers are lost" in message) != has_room_later


@pytest.mark.parametrize("place", ["{file}/out", "/proc/out", "{tmp}/" + "x" * 300])
def test_folders_are_tried_before_anything_is_paid(data_dir, tmp_path, serve, capsys, place):  # noqa: F811
    address, calls = serve()
    (tmp_path / "file").touch()
    folder = place.format(file=tmp_path / "file", tmp=tmp_path)
    assert evals.main(arguments(data_dir, folder, address, "--num_samples", "2")) == 2
    output = capsys.readouterr()
    assert "evals: " in output.err and folder[:80] in output.err and "loading" not in output.out
    assert not calls.exists()


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_closed_pipe_ends_in_one_message(data_dir, tmp_path, serve, stream):  # noqa: F811
    address, calls = serve(latency_s=0.2)
    given = arguments(data_dir, tmp_path, address, "--num_samples", "20", "--concurrency", "4")
    log = (tmp_path / "log").open("w+")
    streams = {"stdout": log, "stderr": log, stream: subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "evaluation/evals.py", *given], cwd=ROOT, **streams)
    wait_for_calls(calls, 2)
    getattr(process, stream).close()
    process.wait()
    assert len(calls.read_text().split()) == len(read_journal(tmp_path / "run.jsonl")[1]) == 20
    assert len(read(tmp_path / "run.json")) == 20
    log.seek(0)
    text = log.read()
    assert "Traceback" not in text and "Exception ignored" not in text
    if stream == "stdout":
        assert process.returncode == 141 and "the reader of the output is gone" in text


def test_few_file_descriptors_are_enough(data_dir, tmp_path, serve):  # noqa: F811
    address, _ = serve(latency_s=0.2)
    given = arguments(data_dir, tmp_path, address, "--num_samples", "40", "--concurrency", "32")
    command = ["bash", "-c", 'ulimit -n 64 && exec "$@"', "bash", sys.executable, "evaluation/evals.py", *given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert done.returncode == 0 and len(json.loads((tmp_path / "run.json").read_text())) == 40


def test_an_answer_that_cannot_be_graded_is_paid_once(data_dir, tmp_path, serve, monkeypatch, capsys):  # noqa: F811
    address, calls = serve()
    given = arguments(data_dir, tmp_path, address, "--num_samples", "6", "--resume")
    whole = evals.find_marks

    def find_marks(sample, *others):
        return 1 // (sample.id not in failing) and whole(sample, *others)

    monkeypatch.setattr(evals, "find_marks", find_marks)
    failing = [f"{index:06d}" for index in range(300)]
    assert evals.main(given) == 2
    assert "its answer cannot be graded: ZeroDivisionError" in capsys.readouterr().err
    assert evals.main(given) == 2
    records = read(tmp_path / "run.json")
    assert any(record["status"] == "error" and record["reasoning"] and record["cost_usd"] for record in records)
    failing.clear()
    assert evals.main(given) == 0 and len(calls.read_text().split()) == 6
    assert {record["status"] for record in read(tmp_path / "run.json")} == {"ok"}


@pytest.mark.parametrize("kinds", ["error_body", "forbidden", "page"])
def test_no_server_commands_the_terminal_or_echoes_a_key(data_dir, tmp_path, serve, monkeypatch, capsys, kinds):  # noqa: F811
    monkeypatch.setattr(model_api, "MAX_TRIES", 3)
    address, _ = serve(faults=1.0, kinds=kinds)
    monkeypatch.setenv("OPENAI_API_KEY", "test-key-0123456789")
    assert evals.main(arguments(data_dir, tmp_path, address, "--num_samples", "3")) == 2
    output = "".join(capsys.readouterr()) + "".join(path.read_text() for path in tmp_path.glob("run*"))
    assert not set("\x1b\u202e") & set(output) and "test-key" not in output
    assert "evals: " in output

"""Questions over the official clients against a local server: faults, speed, resume, batches, bad input."""

import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest

from evaluation import evals
from evaluation.benchmarks.rows import BENCHMARKS
from evaluation.benchmarks.samples import load_samples
from evaluation.engines import api
from evaluation.engines.local import ModelOptions
from evaluation.journal import read_journal
from spatialthinker.clients import model_api
from spatialthinker.clients.model_api import ApiRequest, RequestFault, encode_image
from spatialthinker.clients.prices import Price, Usage, cost_usd, find_price
from spatialthinker.clients.providers import APIS, OpenAiApi
from spatialthinker.clients.replies import ReplyError
from spatialthinker.schema import parquet_path, write_parquet
from spatialthinker.synthetic import generate

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
BACKENDS = {"openai": api.OpenAiBackend, "anthropic": api.AnthropicBackend}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_parquet([row for _, row in generate(320, seed=3, split="val")], parquet_path(folder, "val"))
    return folder


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Starts the stand-in with the given options; returns its address and the file of answered requests."""
    processes = []
    for key in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.setenv(key, "test")

    def start(**options):
        calls = tmp_path / "calls.txt"
        command = [sys.executable, "tests/support/mock_api.py", "--calls", str(calls)]
        command += [text for key, value in options.items() for text in (f"--{key}", str(value))]
        processes.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        return processes[-1].stdout.readline().strip(), calls

    yield start
    for process in processes:
        process.kill()


def arguments(data_dir, out_dir, address, *more, provider="openai"):
    base = f"{address}/v1" if provider == "openai" else address
    model = {"openai": "gpt-4o", "anthropic": "claude-sonnet-4-5"}[provider]
    given = ["--dataset", "stvqa", "--template", "reasoning", "--data_path", str(data_dir), "--model_path", model]
    given += ["--provider", provider, "--base_url", base, "--output_dir", str(out_dir), "--custom_filename", "run"]
    return [*given, *more]


def read(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_faults_are_waited_out_and_nothing_is_asked_again_after_an_answer(data_dir, tmp_path, serve, provider):
    address, calls = serve(faults=0.2, kinds="429,500,timeout,cut", timeout_s=0.2)
    given = arguments(data_dir, tmp_path, address, "--num_samples", "60", provider=provider)
    assert evals.main(given) == 0
    records = read(tmp_path / "run.json")
    assert len(records) == 60 and all(record["status"] == "ok" for record in records)
    assert max(Counter(calls.read_text().split()).values()) == 1
    assert all(record["seconds"] > 0 and record["cost_usd"] > 0 for record in records)


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_a_model_answers_the_questions_of_several_data_sets(data_dir, serve, provider):
    address, calls = serve(faults=0.3, kinds="429,500,cut")
    base = f"{address}/v1" if provider == "openai" else address
    backend = BACKENDS[provider](ModelOptions("a-model", "reasoning", base_url=base, concurrency=8))
    samples = load_samples("stvqa", BENCHMARKS["stvqa"], str(data_dir))
    for first in range(0, 30, 10):
        answers = [answer for _, answer in backend.answer(samples[first : first + 10])]
        assert len(answers) == 10 and not any(answer.error for answer in answers)
    assert len(calls.read_text().split()) == 30


def test_as_many_requests_as_allowed_are_under_way_at_once(data_dir, tmp_path, serve):
    address, _ = serve(latency_s=1)
    assert evals.main(arguments(data_dir, tmp_path, address, "--concurrency", "32")) == 0
    assert len(read(tmp_path / "run.json")) == 320
    most = int(urllib.request.urlopen(f"{address}/most_under_way").read())
    assert 16 <= most <= 32  # a busy machine may not fill every place


def test_a_killed_run_loses_at_most_what_was_under_way(data_dir, tmp_path, serve):
    address, calls = serve(latency_s=0.3)
    given = arguments(data_dir, tmp_path, address, "--num_samples", "80", "--concurrency", "8")
    process = subprocess.Popen([sys.executable, "evaluation/evals.py", *given], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not calls.exists() or len(calls.read_text().split()) < 24:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert evals.main([*given, "--resume"]) == 0
    asked = Counter(calls.read_text().split())
    assert len(read(tmp_path / "run.json")) == 80
    assert sum(asked.values()) - 80 <= 8


@pytest.mark.parametrize("more", [["--resume"], []])
def test_two_evaluations_of_one_output_pay_once(data_dir, tmp_path, serve, more):
    address, calls = serve(latency_s=1)
    given = arguments(data_dir, tmp_path, address, "--num_samples", "60", "--concurrency", "8", *more)
    command = [sys.executable, "evaluation/evals.py", *given]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in range(2)]
    messages = [process.communicate()[1].decode() for process in both]
    assert sorted(process.returncode for process in both) == [0, 2]
    loser = messages[both[0].returncode == 0]
    assert "by another process" in loser and "Traceback" not in loser
    assert len(read(tmp_path / "run.json")) == len(calls.read_text().split()) == 60


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_batches_are_submitted_once_and_collected_by_the_same_command(
    data_dir, tmp_path, serve, provider, capsys, monkeypatch
):
    monkeypatch.setattr(api, "MAX_BATCH_ITEMS", 2)
    address, calls = serve()
    given = arguments(data_dir, tmp_path, address, "--num_samples", "5", "--batch_api", provider=provider)
    assert evals.main(given) == 0 and "5 items are submitted as b0, b1, b2" in capsys.readouterr().out
    assert not (tmp_path / "run.json").exists()
    for _ in range(3):
        assert evals.main(given) == 0
        if (tmp_path / "run.json").exists():
            break
    assert len(read(tmp_path / "run.json")) == len(calls.read_text().split()) == 5
    assert evals.main(given) == 0 and len(calls.read_text().split()) == 5  # once more: nothing is asked again


@pytest.mark.parametrize("more", [[], ["--batch_api"]])
def test_the_passes_of_faithfulness_are_paid_once(data_dir, tmp_path, serve, more, capsys):
    address, calls = serve()
    given = arguments(data_dir, tmp_path, address, "--num_samples", "5", "--faithfulness", *more)
    for _ in range(9):
        assert evals.main(given) == 0
        if (tmp_path / "run.json").exists():
            break
    assert len(calls.read_text().split()) == 15
    assert "10 further answers for blank, true_scene, about 0.0" in capsys.readouterr().out
    found = read(tmp_path / "run.summary.json")["faithfulness"]
    assert found["blank"]["n"] == found["true_scene"]["n"] == 5 and found["cost_usd"] > 0
    assert evals.main([*given, "--resume"]) == 0 and len(calls.read_text().split()) == 15


def test_what_failed_in_a_batch_is_in_the_next_one(data_dir, tmp_path, serve):
    address, _ = serve(faults=0.4, kinds="500")
    given = arguments(data_dir, tmp_path, address, "--num_samples", "12", "--batch_api")
    codes = []
    while not codes or {record.status for record in read_journal(tmp_path / "run.jsonl")[1].values()} != {"ok"}:
        codes.append(evals.main(given))
        assert len(codes) < 20
    assert codes[-1] == 0 and 2 in codes  # the items that failed are reported
    assert len(read(tmp_path / "run.json")) == 12
    asked = [record["id"] for record in map(json.loads, (tmp_path / "run.jsonl").read_text().splitlines()[1:])]
    assert len(asked) > 12 and len(set(asked)) == 12


@pytest.mark.parametrize("has_arrived", [True, False])
@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_a_batch_whose_submission_was_cut_off_is_paid_once(
    data_dir, tmp_path, serve, provider, has_arrived, capsys, monkeypatch
):
    address, calls = serve()
    given = arguments(data_dir, tmp_path, address, "--num_samples", "5", "--batch_api", provider=provider)
    send = APIS[provider]._send_batch

    async def cut_off(*arguments):
        if has_arrived:
            await send(*arguments)
        raise ReplyError("status 200 with a page")

    with monkeypatch.context() as patch:
        patch.setattr(APIS[provider], "_send_batch", cut_off)
        assert evals.main(given) == 2 and "the batch may not have arrived" in capsys.readouterr().err
    assert evals.main(given) == 0
    name = "b0" if has_arrived and provider == "openai" else "one that was cut off"
    assert f"5 items are submitted as {name}" in capsys.readouterr().out
    monkeypatch.setattr(model_api, "ARRIVAL_S", 0.0)
    for _ in range(3):
        assert evals.main(given) == 0
    assert len(read(tmp_path / "run.json")) == len(calls.read_text().split()) == 5


def test_a_batch_that_is_gone_holds_no_other_back(data_dir, tmp_path, serve, capsys, monkeypatch):
    monkeypatch.setattr(model_api, "_FIRST_WAIT_S", 0.001)
    address, calls = serve()
    given = arguments(data_dir, tmp_path, address, "--num_samples", "5", "--batch_api")
    assert evals.main(given) == 0
    state = tmp_path / "run.batch.json"
    state.write_text(json.dumps({"gone": ["000000"], **read(state)}))  # a list is the former form
    for _ in range(2):
        assert evals.main(given) == 0
    assert "batch gone cannot be collected" in capsys.readouterr().err
    assert len(read_journal(tmp_path / "run.jsonl")[1]) == len(calls.read_text().split()) == 5
    state.write_text("{}")
    assert evals.main(given) == 0 and len(read(tmp_path / "run.json")) == 5


@pytest.mark.parametrize("text", ["[]", '{"b": [[1]]}', '{"b": 3}', "[" * 5000, '{"b": {"items": []}}', "\xff", ""])
def test_a_damaged_list_of_batches_is_one_message(data_dir, tmp_path, serve, capsys, text):
    address, calls = serve()
    (tmp_path / "run.batch.json").write_text(text, encoding="latin-1")
    given = arguments(data_dir, tmp_path, address, "--num_samples", "2", "--batch_api")
    assert evals.main(given) == 2 and "run.batch.json: damaged" in capsys.readouterr().err
    assert not calls.exists()


def test_an_outage_ends_the_collection_with_one_message(data_dir, tmp_path, serve, capsys, monkeypatch):
    address, _ = serve()
    given = arguments(data_dir, tmp_path, address, "--num_samples", "2", "--batch_api")
    assert evals.main(given) == 0
    monkeypatch.setattr(model_api, "MAX_TRIES", 1)
    given[given.index("--base_url") + 1] = "http://[::1]:9"
    assert evals.main(given) == 2 and "the same command goes on" in capsys.readouterr().err


def test_a_wrong_key_ends_with_the_providers_message(data_dir, tmp_path, serve, monkeypatch, capsys):
    address, _ = serve()
    monkeypatch.setenv("OPENAI_API_KEY", "bad-key")
    assert evals.main(arguments(data_dir, tmp_path, address, "--num_samples", "5")) == 2
    assert "401" in capsys.readouterr().err


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_a_wrong_model_name_ends_with_the_providers_message(data_dir, tmp_path, serve, capsys, provider):
    address, calls = serve()
    given = arguments(data_dir, tmp_path, address, "--model_path", "no-such-model", provider=provider)
    assert evals.main(given) == 2
    assert "there is no no-such-model" in capsys.readouterr().err and not calls.exists()


def test_what_is_paid_for_when_the_account_is_closed_is_kept(data_dir, tmp_path, serve, capsys):
    address, calls = serve(latency_s=0.3, credit=20)
    assert evals.main(arguments(data_dir, tmp_path, address, "--concurrency", "16")) == 2
    assert "no credit left" in capsys.readouterr().err
    _, records = read_journal(tmp_path / "run.jsonl")
    assert len(records) == len(calls.read_text().split()) == 20


def test_a_missing_key_names_its_variable(data_dir, tmp_path, monkeypatch, capsys):
    for key in OpenAiApi.KEYS:
        monkeypatch.delenv(key, raising=False)
    given = arguments(data_dir, tmp_path, "http://x")
    given.remove("--base_url")
    given.remove("http://x/v1")
    assert evals.main(given) == 2
    assert "OPENAI_API_KEY" in capsys.readouterr().err


def test_errors_of_one_kind_end_the_run(data_dir, tmp_path, serve, monkeypatch, capsys):
    address, _ = serve(faults=1.0, kinds="500,cut")
    monkeypatch.setattr(model_api, "MAX_TRIES", 1)
    assert evals.main(arguments(data_dir, tmp_path, address, "--num_samples", "60")) == 2
    error = capsys.readouterr().err
    assert "errors of one kind in a row" in error and "--resume" in error


def picture(mode="RGB", size=(40, 30), form="PNG", orientation=None):
    import io

    from PIL import Image

    image, buffer = Image.new(mode, size), io.BytesIO()
    exif = image.getexif()
    if orientation:
        exif[0x0112] = orientation
    image.save(buffer, form, exif=exif)
    return buffer.getvalue()


def decoded(encoded):
    import base64
    import io

    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def test_images_are_sent_as_they_are_or_upright_and_smaller():
    import base64

    plain = picture()
    assert encode_image(plain, 10**6, 8000) == ("image/png", base64.b64encode(plain).decode())
    kind, data = encode_image(picture(form="JPEG", orientation=6), 10**6, 8000)
    assert kind == "image/png" and decoded(data).size == (30, 40)
    assert decoded(encode_image(picture("CMYK", form="JPEG"), 10**6, 8000)[1]).mode == "RGB"
    assert decoded(encode_image(picture(size=(4000, 1000)), 10**6, 2000)[1]).size == (2000, 500)
    assert len(base64.b64decode(encode_image(picture(size=(3000, 3000)), 2000, 8000)[1])) <= 2000
    with pytest.raises(RequestFault, match="cannot be decoded"):
        encode_image(b"no image", 10**6, 8000)


def test_models_that_fix_their_temperature_are_not_sent_one(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "test")
    request = ApiRequest("hello")
    assert "temperature" not in OpenAiApi("gpt-5-mini").body(request)
    assert OpenAiApi("gpt-4o").body(request)["temperature"] == 0.0


def test_prices_by_hand():
    assert find_price("gpt-4o-2024-11-20") == Price(2.5, 10.0, 1.25, 2.5) and find_price("mystery") is None
    usage = Usage(input=1_000_000, output=100_000, cache_read=2_000_000)
    price = find_price("claude-sonnet-4-5")
    assert price is not None
    assert cost_usd(usage, price) == pytest.approx(3.0 + 1.5 + 0.6)
    assert cost_usd(usage, price, is_batch=True) == pytest.approx(2.55)

"""The whole program on a tiny model: what it writes, how it resumes, what it refuses."""

import dataclasses
import io
import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace

import datasets
import pytest
from PIL import Image

from evaluation import evals
from evaluation.benchmarks.rows import BENCHMARKS
from evaluation.benchmarks.samples import load_samples
from evaluation.command_line import DEFAULT_MODEL, check_arguments, check_model_path, name_output, parse_arguments
from evaluation.engines.local import Answer, HuggingFaceBackend, ModelOptions
from evaluation.engines.replicas import (
    MAX_CPU_WEIGHTS_BYTES,
    DataParallelBackend,
    count_cpu_engines,
    count_replicas,
    join_ray,
)
from spatialthinker.schema import parquet_path, read_parquet, write_parquet
from spatialthinker.synthetic import generate, gold_response
from tests.support.tiny_model_folder import save_tiny_model

ITEMS = 10
SIX_KEYS = ["prompt", "correct_answer", "reasoning", "pred_answer", "correct", "task"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_parquet([row for _, row in generate(ITEMS, seed=3, split="val")], parquet_path(folder, "val"))
    return folder


@pytest.fixture(autouse=True)
def private_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def run(model_dir, data_dir, out_dir, *more):
    arguments = ["--dataset", "stvqa", "--template", "spatial_thinker_full", "--max_tokens", "4", "--batch_size", "4"]
    arguments += ["--data_path", str(data_dir), "--model_path", str(model_dir), "--output_dir", str(out_dir)]
    return evals.main([*arguments, "--custom_filename", "run", *more])


def read_json(path):
    return json.loads(path.read_text())


def test_a_run_writes_journal_records_and_summary(model_dir, data_dir, tmp_path, capsys):
    assert run(model_dir, data_dir, tmp_path) == 0
    records = read_json(tmp_path / "run.json")
    assert all(list(record)[:6] == SIX_KEYS for record in records)
    rows = {f"{index:06d}": row for index, row in enumerate(read_parquet(parquet_path(data_dir, "val")))}
    assert {record["id"] for record in records} == rows.keys()
    for record in records:
        row = rows[record["id"]]
        assert (record["prompt"], record["correct_answer"], record["task"]) == (
            row.problem,
            row.answer_only,
            row.category,
        )
        assert record["finish_reason"] in ("stop", "length") and 0 < record["response_tokens"] <= 4
        assert record["reward"]["overall"] == 0
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert "settings" in lines[0] and len(lines) == ITEMS + 1
    summary = read_json(tmp_path / "run.summary.json")
    assert (summary["items"], summary["answered"], summary["errors"]) == (ITEMS, ITEMS, 0)
    assert summary["accuracy_low"] == 0 < summary["accuracy_high"] < 0.3
    assert "relation" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.tmp"))


def test_the_batch_size_does_not_change_the_answers(model_dir, data_dir, tmp_path):
    for size in ("1", "4"):
        assert run(model_dir, data_dir, tmp_path / size, "--batch_size", size, "--max_tokens", "12") == 0
    texts = [{r["id"]: r["reasoning"] for r in read_json(tmp_path / size / "run.json")} for size in ("1", "4")]
    assert texts[0] == texts[1]


def test_a_killed_run_goes_on_where_it_stopped(model_dir, data_dir, tmp_path, capsys):
    assert run(model_dir, data_dir, tmp_path, "--num_samples", "6") == 0
    journal = tmp_path / "run.jsonl"
    whole = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(whole[:5]) + whole[5][:20])  # settings, four answers, half of the fifth
    (tmp_path / "run.json").unlink()
    capsys.readouterr()
    assert run(model_dir, data_dir, tmp_path, "--resume") == 0
    assert f"4 of {ITEMS} items" in capsys.readouterr().out
    lines = journal.read_bytes().splitlines(keepends=True)
    assert lines[:5] == whole[:5] and len(lines) == ITEMS + 1
    assert len({record["id"] for record in read_json(tmp_path / "run.json")}) == ITEMS
    assert not (tmp_path / "run.jsonl.previous").exists()
    assert run(model_dir, data_dir, tmp_path, "--resume") == 0  # nothing left: no model is loaded
    assert "loading" not in capsys.readouterr().out.split(f"{ITEMS} of {ITEMS} items")[-1]


def test_a_journal_of_other_settings_is_refused(model_dir, data_dir, tmp_path, capsys):
    assert run(model_dir, data_dir, tmp_path, "--num_samples", "2") == 0
    before = (tmp_path / "run.jsonl").read_bytes()
    assert run(model_dir, data_dir, tmp_path, "--resume", "--max_tokens", "5") == 2
    assert "max_tokens: 4 there, 5 now" in capsys.readouterr().err
    assert run(model_dir, data_dir, tmp_path, "--num_samples", "2") == 0  # anew: the old answers are kept aside
    assert (tmp_path / "run.jsonl.previous").read_bytes() == before
    before = (tmp_path / "run.jsonl").read_bytes()
    (tmp_path / "moved").symlink_to(data_dir)
    assert run(model_dir, tmp_path / "moved", tmp_path, "--resume", "--num_samples", "2") == 0  # the same folder
    copy = shutil.copytree(data_dir, tmp_path / "copy")
    assert run(model_dir, copy, tmp_path, "--resume") == 2
    assert f"data_path: '{data_dir}' there, '{copy}' now" in capsys.readouterr().err
    assert run(model_dir, data_dir, tmp_path, "--resume", "--revision", "abc") == 2
    assert "revision: None there, 'abc' now" in capsys.readouterr().err
    other = save_tiny_model(tmp_path / "other", seed=1)
    assert run(other, data_dir, tmp_path, "--resume") == 2
    assert "weights_fingerprint" in capsys.readouterr().err
    assert (tmp_path / "run.jsonl").read_bytes() == before


def test_a_broken_image_is_an_error_of_its_item_and_is_asked_again(model_dir, data_dir, tmp_path, capsys):
    rows = read_parquet(parquet_path(data_dir, "val"))
    broken = [replace(row, images=row.images[:200]) if i == 3 else row for i, row in enumerate(rows)]
    write_parquet(broken, parquet_path(tmp_path / "data", "val"))
    assert run(model_dir, tmp_path / "data", tmp_path) == 2
    assert "item 000003: its image cannot be decoded" in capsys.readouterr().err
    summary = read_json(tmp_path / "run.summary.json")
    assert (summary["answered"], summary["errors"]) == (ITEMS - 1, 1)
    write_parquet(rows, parquet_path(tmp_path / "data", "val"))
    assert run(model_dir, tmp_path / "data", tmp_path, "--resume") == 0
    assert f"{ITEMS - 1} of {ITEMS} items" in capsys.readouterr().out
    assert read_json(tmp_path / "run.summary.json")["errors"] == 0


def test_keys_may_stand_in_a_file(tmp_path, monkeypatch, capsys):
    for name in ("OPENAI_API_KEY", "OPENAI_APIKEY", "OPENAI_KEY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    given = ["--dataset", "stvqa", "--template", "reasoning", "--model_path", "gpt-4o", "--provider", "openai"]
    given += ["--data_path", str(tmp_path / "none"), "--extractor", "openai:gpt-4o"]
    messages = []
    for text in ("", "a line that is none", "OPENAI_API_KEY=sk-0123456789"):
        (tmp_path / ".env").write_text(text)
        assert evals.main(given) == 2
        messages.append(capsys.readouterr().err)
    assert "no API key" in messages[0] and ".env, line 1: write NAME=VALUE" in messages[1]
    assert "none" in messages[2] and "API key" not in messages[2]


def test_gold_answers_score_full_marks(data_dir):
    rows = read_parquet(parquet_path(data_dir, "val"))
    samples = load_samples("stvqa", BENCHMARKS["stvqa"], str(data_dir))
    for row, sample in zip(rows, samples, strict=True):
        record = evals.grade(
            sample, Answer(prompt=row.problem, text=gold_response(row), finish_reason="stop"), BENCHMARKS["stvqa"]
        )
        assert (record.correct, record.kind, record.pred_answer) == (1, "letter", row.answer_only)
        assert record.reward is not None and record.reward["overall"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("box", ["[1e9, 0, 1e9, 5]", "[0, 0, -1e300, 5]", '["a", 0, 1, 2]'])
def test_a_reference_that_cannot_be_scored_keeps_the_paid_answer(data_dir, capsys, box):
    sample = load_samples("stvqa", BENCHMARKS["stvqa"], str(data_dir))[0]
    truth = (
        f'<scene>{{"objects": [{{"id": "a.1", "bbox": {box}}}], "relationships": []}}</scene><answer>(A) x</answer>'
    )
    answer = Answer(prompt=sample.prompt, text="<answer>(A)</answer>", finish_reason="stop")
    sample = dataclasses.replace(sample, ground_truth=truth, id="7\x1b[2J\u202e")
    record = evals.grade(sample, answer, BENCHMARKS["stvqa"])
    assert record.reward is None and record.kind == "letter"
    message = capsys.readouterr().err
    assert "item 7: no reward is measured" in message and not set("\x1b\u202e") & set(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "stvq"], "nearest is 'stvqa'"),
        (["--template", "spatial_thinkr"], "nearest is 'spatial_thinker'"),
        (["--provider", "vlm"], "nearest is 'vllm'"),
        (["--template", "vision"], "stvqa goes with the templates reasoning"),
        (["--num_samples", "0"], "at least 1"),
        (["--batch_size", "0"], "at least 1"),
        (["--temperature", "-1"], "at least 0"),
        (["--model_path", "no/such/folder"], "no/such/folder: no such folder"),
        (["--model_path", "{empty}"], "has no config.json"),
        (["--model_path", "{unmerged}"], "has no weights; merge the checkpoint"),
        (["--data_path", "no/data"], "no/data: no such data file or folder"),
        (["--split", "test"], "no data file of split 'test'"),
    ],
)
def test_bad_input_is_named_and_ends_with_2(arguments, message, model_dir, data_dir, tmp_path, capsys):
    for name in ("empty", "unmerged"):
        (tmp_path / name).mkdir()
    (tmp_path / "unmerged" / "config.json").write_text("{}")
    paths = {name: str(tmp_path / name) for name in ("empty", "unmerged")}
    try:
        code = run(model_dir, data_dir, tmp_path / "out", *(part.format(**paths) for part in arguments))
    except SystemExit as stop:  # argparse
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_small_models_get_an_engine_a_core_where_there_are_items_for_it(tmp_path):
    def count(num_items, cores, model_path=tmp_path):
        return count_cpu_engines(ModelOptions(str(model_path), "reasoning", num_items=num_items), cores)

    weights = tmp_path / "model.safetensors"
    weights.touch()
    assert [count(items, 2) for items in (1, 255, 256, 5000)] == [1, 1, 2, 2]
    assert (count(500, 64), count(10**6, 64), count(10**6, 1)) == (3, 8, 1)
    assert count(5000, 2, "owner/on-the-hub") == 1
    os.truncate(weights, MAX_CPU_WEIGHTS_BYTES + 1)
    assert count(5000, 2) == 1


def test_a_model_without_processor_is_named(model_dir, data_dir, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((model_dir / name).read_bytes())
    assert run(bare, data_dir, tmp_path / "out") == 2
    assert f"evals: {bare}:" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../../x", "/x", "a/../../x", "..", ".json", "", "a\x1b[2J", "a\0"])
def test_an_output_name_stays_in_its_folder(name, capsys):
    given = ["--dataset", "stvqa", "--template", "reasoning", "--custom_filename", name]
    with pytest.raises(SystemExit) as stop:
        parse_arguments(given, None)
    assert stop.value.code == 2 and "--custom_filename: " in capsys.readouterr().err


def test_an_output_name_may_lie_in_a_folder_of_the_output():
    given = ["--dataset", "stvqa", "--template", "reasoning", "--custom_filename"]
    assert name_output(parse_arguments([*given, "a/run.json"], None), "stvqa") == "a/run"
    assert name_output(parse_arguments([*given, "..x"], None), "stvqa") == "..x"


def test_the_released_defaults(capsys):
    assert parse_arguments(["--dataset", "stvqa", "--template", "reasoning"], None).model_path == DEFAULT_MODEL
    for more in (["--template", "reasoning", "--provider", "openai"], []):
        with pytest.raises(SystemExit):
            parse_arguments(["--dataset", "stvqa", *more], None)
        expected = "required: --model_path" if more else "--template is one of"
        assert expected in capsys.readouterr().err
    with pytest.raises(ValueError, match="for an API's model add --provider"):
        check_model_path("gpt-4o-2024-05-13")


@pytest.mark.parametrize("model", ["/", "actor", "huggingface"])
def test_a_model_with_an_odd_name_has_an_output_name(model):
    given = ["--dataset", "stvqa", "--template", "reasoning", "--provider", "openai", "--model_path", model]
    name = name_output(parse_arguments(given, None), "stvqa")
    assert name.startswith("stvqa_") and name.endswith("_reasoning_strict") and "/" not in name


def test_the_records_have_the_released_name_too(model_dir, data_dir, tmp_path):
    given = ["--dataset", "stvqa", "--template", "reasoning", "--max_tokens", "2", "--data_path", str(data_dir)]
    given += ["--model_path", str(model_dir), "--output_dir", str(tmp_path), "--num_samples", "2"]
    (tmp_path / "stvqa_tiny.json").write_text("[]")  # of the released program
    for _ in range(2):
        assert evals.main(given) == 0
        records = read_json(tmp_path / "stvqa_tiny.json")
        assert records == read_json(tmp_path / "stvqa_tiny_reasoning_strict.json")
        assert records[-1]["final_accuracy"] == 0 and "final_std_err" in records[-1]
        assert (tmp_path / "stvqa_tiny.json.previous").read_text() == "[]"


def test_an_item_that_the_processor_refuses_is_an_error_of_its_own(model_dir, data_dir, tmp_path, capsys):
    image = io.BytesIO()
    Image.new("RGB", (3000, 4)).save(image, "PNG")
    rows = read_parquet(parquet_path(data_dir, "val"))
    odd = [replace(row, images=image.getvalue()) if i in (3, 7) else row for i, row in enumerate(rows)]
    write_parquet(odd, parquet_path(tmp_path / "data", "val"))
    assert run(model_dir, tmp_path / "data", tmp_path) == 2
    assert "item 000003: " in capsys.readouterr().err
    summary = read_json(tmp_path / "run.summary.json")
    assert (summary["answered"], summary["errors"]) == (ITEMS - 2, 2)


@pytest.mark.parametrize(("asked", "joined"), [([], "local"), (["--ray_address", "auto"], "auto")])
def test_replicas_join_a_cluster_only_when_asked_to(asked, joined, monkeypatch, tmp_path):
    class Joined(Exception):
        pass

    def init(address=None, **_):
        raise Joined(address)

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    args = parse_arguments(["--dataset", "stvqa", "--template", "reasoning", *asked], None)
    options = ModelOptions("x", "reasoning", ray_address=args.ray_address or "local")
    with pytest.raises(Joined, match=joined):
        DataParallelBackend(HuggingFaceBackend, options, 2)


@pytest.mark.parametrize(
    ("nodes", "options", "needs", "threads"),
    [
        ([{"CPU": 8, "GPU": 4}, {"CPU": 8, "GPU": 2}], {}, [{"CPU": 0, "GPU": 1}] * 6, None),
        ([{"GPU": 3}, {"GPU": 4}, {"CPU": 9}], {"tensor_parallel_size": 2}, [{"CPU": 0, "GPU": 2}] * 3, None),
        ([{"CPU": 2}, {"CPU": 2}], {"num_items": 1000}, [{"CPU": 1}] * 4, 1),
        ([{"CPU": 8}, {"CPU": 8}], {"num_items": 256}, [{"CPU": 8}] * 2, 8),
        ([{"CPU": 3}, {"CPU": 5}], {"num_items": 256}, [{"CPU": 3}] * 2, 3),  # 4 each would leave one out
        ([{"CPU": 2}, {"CPU": 6}], {"num_items": 10}, [{"CPU": 6}], 6),
    ],
)
def test_a_cluster_has_as_many_engines_as_its_machines_have_room_for(nodes, options, needs, threads, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"small")
    model = ModelOptions(str(tmp_path), "reasoning", ray_address="auto", **options)
    assert count_replicas(nodes, model) == (needs, threads)


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([{"GPU": 1}, {"GPU": 1}], "--tensor_parallel_size 2: the cluster's machines have 1 GPUs at most"),
        ([{"CPU": 4}], "--tensor_parallel_size 2: the cluster of --ray_address has no GPUs"),
    ],
)
def test_an_engine_larger_than_every_machine_is_refused(nodes, words):
    with pytest.raises(ValueError, match=words):
        count_replicas(nodes, ModelOptions("x", "reasoning", tensor_parallel_size=2, ray_address="auto"))


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--provider", "openai", "--model_path", "m"], "has no engines"), (["--cuda", "0"], "a GPU of this machine")],
)
def test_an_address_that_would_mean_nothing_is_refused(options, words):
    parts = ["--dataset", "stvqa", "--template", "reasoning", "--ray_address", "auto", *options]
    with pytest.raises(ValueError, match=words):
        check_arguments(parse_arguments(parts, None))


def test_an_address_where_nothing_answers_is_named():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"  # bound, and nobody listens
        with pytest.raises(ValueError, match=f"--ray_address {address}: no Ray cluster answers there"):
            join_ray(address)


def test_output_names_say_what_was_evaluated():
    def name(model_path):
        parts = ["--dataset", "stvqa", "--template", "reasoning", "--model_path", model_path]
        return name_output(parse_arguments(parts, None), "stvqa")

    assert name("Qwen/Qwen2.5-VL-3B-Instruct") == "stvqa_Qwen2.5-VL-3B-Instruct_reasoning_strict"
    assert name("/runs/x/global_step_75/actor/huggingface/") == "stvqa_x_global_step_75_reasoning_strict"


def test_help_is_quick_and_loads_nothing_heavy():
    heavy = "{'torch', 'transformers', 'datasets', 'vllm', 'PIL', 'numpy'}"
    code = f"import sys, evaluation.evals; sys.exit(len({heavy} & sys.modules.keys()))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
    for option, expected in (("--help", "--resume"), ("--list", "mindcube-tiny")):
        start = os.times()
        command = [sys.executable, evals.__file__, option]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        end = os.times()
        assert done.returncode == 0 and expected in done.stdout
        # Processor time, which a busy machine does not lengthen.
        used = end.children_user + end.children_system - start.children_user - start.children_system
        assert used < 0.5, option

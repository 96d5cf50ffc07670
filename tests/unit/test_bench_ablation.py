"""The table of an ablation, and rows that fail."""

import json
from pathlib import Path

import pytest

from verl.bench import ablation as bench_ablation
from verl.bench.ablation import AS_CONFIGURED, COLUMNS, UNDONE, format_rows, run_ablation
from verl.bench.measure import main
from verl.config.loading import load_config

FILES = ["data.train_files=owner/name", "data.val_files=owner/name"]


def table(whole: float) -> dict:
    seconds = {column: whole if column == "whole step" else 1.0 for column in COLUMNS}
    return {"table": {column: {"seconds": value, "peak_gib": 10 * value} for column, value in seconds.items()}}


@pytest.mark.parametrize("name", UNDONE)
def test_a_choice_is_undone_whatever_was_configured(name):
    keys = [key.partition("=")[::2] for key in UNDONE[name]]
    others = {"true": "false", "false": "true", "0": "9"}
    chosen = load_config([*FILES, *(f"{key}={others[value]}" for key, value in keys)])
    undone = load_config([*FILES, *(f"{key}={others[value]}" for key, value in keys), *UNDONE[name]])
    assert undone == load_config([*FILES, *UNDONE[name]]) != chosen


def test_rows_are_multiples_of_the_first_and_a_failed_one_says_so():
    lines = format_rows({AS_CONFIGURED: table(4.0), "layers not fused": table(6.0), "no CUDA graphs": {"fault": "x"}})
    assert [line.split()[-1] for line in lines] == ["GiB", "40.00", "60.00", "failed"]
    assert lines[1].split()[-4:] == ["1.00", "4.00", "1.00", "40.00"]
    assert lines[2].split()[-4:] == ["1.00", "6.00", "1.50", "60.00"]


def test_a_row_that_fails_costs_none_of_the_others(tmp_path, monkeypatch, capsys):
    def run(arguments):
        return {"fault": "ended with code 1:\nout of memory"} if "enforce_eager" in arguments[-1] else table(2.0)

    monkeypatch.setattr(bench_ablation, "_run_row", run)
    dump = tmp_path / "rows.json"
    assert run_ablation(["a=b"], ["no CUDA graphs", "layers not fused"], str(dump)) == 2
    assert list(json.loads(dump.read_text())) == [AS_CONFIGURED, "no CUDA graphs", "layers not fused"]
    assert "out of memory" in capsys.readouterr().out
    assert run_ablation(["a=b"], ["layers not fused"]) == 0


def test_without_the_first_row_there_is_nothing_to_compare(tmp_path, monkeypatch, capsys):
    given = []
    monkeypatch.setattr(bench_ablation, "_run_row", lambda step: given.append(step) or {"fault": "no GPU"})
    dump = tmp_path / "rows.json"
    assert run_ablation(["a=b"], list(UNDONE), str(dump)) == 2
    assert given == [["a=b"]] and "no GPU" in capsys.readouterr().out
    assert json.loads(dump.read_text()) == {AS_CONFIGURED: {"fault": "no GPU"}}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["step", "--undo", "no CUDA graphs"], "a.b=value"), (["ablation", "--against", "one.json"], "one run")],
)
def test_arguments_of_the_other_benchmark_are_refused(arguments, words, tmp_path, monkeypatch, capsys):
    root = Path.cwd()
    monkeypatch.chdir(tmp_path)
    Path("one.json").write_text(json.dumps(table(1.0)))
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--config", str(root / "configs" / "bench_toy_cpu.yaml")])
    assert caught.value.code == 2 and words in capsys.readouterr().err


def test_what_a_row_dies_of_is_shown():
    fault = bench_ablation._run_row(["--config", "configs/bench_toy_cpu.yaml", "worker.no_such_key=1"])["fault"]
    assert fault.startswith("ended with code 2:") and "worker.no_such_key" in fault

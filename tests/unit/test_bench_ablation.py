"""The table of an ablation, and rows that fail."""

import json

from verl import bench_ablation
from verl.bench_ablation import AS_CONFIGURED, COLUMNS, UNDONE, format_rows, run_ablation
from verl.config_loading import load_config

FILES = ["data.train_files=owner/name", "data.val_files=owner/name"]


def table(whole: float) -> dict:
    return {"table": {column: {"seconds": whole if column == "whole step" else 1.0} for column in COLUMNS}}


def test_each_choice_is_undone_whatever_was_configured():
    assert len(UNDONE) == 5
    for keys in UNDONE.values():
        kept = [f"{key.partition('=')[0]}={other}" for key, other in zip(keys, ("true", "true"), strict=False)]
        kept = ["worker.actor.model.activation_budget_gb=9" if "budget" in key else key for key in kept]
        undone = load_config([*FILES, *kept, *keys])
        assert undone == load_config([*FILES, *keys])
        assert undone != load_config(
            [*FILES, *(key.replace("enforce_eager=true", "enforce_eager=false") for key in kept)]
        )


def test_rows_are_multiples_of_the_first_and_a_failed_one_says_so():
    lines = format_rows({AS_CONFIGURED: table(4.0), "layers not fused": table(6.0), "no CUDA graphs": {"fault": "x"}})
    assert [line.split()[-1] for line in lines] == ["times", "1.00", "1.50", "failed"]
    assert lines[2].split()[-3:] == ["1.00", "6.00", "1.50"]
    alone = format_rows({AS_CONFIGURED: {"fault": "x"}, "layers not fused": table(6.0)})
    assert alone[1].endswith("failed") and alone[2].split()[-1] == "6.00"


def test_a_row_that_fails_costs_none_of_the_others(tmp_path, monkeypatch, capsys):
    def run(arguments):
        return {"fault": "ended with code 1:\nout of memory"} if "enforce_eager" in arguments[-1] else table(2.0)

    monkeypatch.setattr(bench_ablation, "_run_row", run)
    dump = tmp_path / "rows.json"
    assert run_ablation(["a=b"], ["no CUDA graphs", "layers not fused"], str(dump)) == 2
    assert list(json.loads(dump.read_text())) == [AS_CONFIGURED, "no CUDA graphs", "layers not fused"]
    assert "out of memory" in capsys.readouterr().out
    assert run_ablation(["a=b"], ["layers not fused"]) == 0


def test_what_a_row_dies_of_is_shown():
    fault = bench_ablation._run_row(["--config", "configs/bench_toy_cpu.yaml", "worker.no_such_key=1"])["fault"]
    assert fault.startswith("ended with code 2:") and "worker.no_such_key" in fault

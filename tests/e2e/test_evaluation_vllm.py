"""The real engine, and that it gives the answers of plain transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spatialthinker.schema import parquet_path, write_parquet
from spatialthinker.synthetic import generate

ROOT = Path(__file__).parents[2]
ITEMS = 24


@pytest.mark.e2e
def test_vllm_and_transformers_give_the_same_greedy_answers(tmp_path):
    write_parquet([row for _, row in generate(ITEMS, seed=5, split="val")], parquet_path(tmp_path / "data", "val"))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    answers = {}
    for provider in ("vllm", "huggingface"):
        command = [sys.executable, "evaluation/evals.py", "--dataset", "stvqa", "--template", "spatial_thinker_full"]
        command += ["--data_path", str(tmp_path / "data"), "--model_path", "configs/toy_model", "--provider", provider]
        command += ["--output_dir", str(tmp_path), "--custom_filename", provider, "--max_tokens", "40"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        records = json.loads((tmp_path / f"{provider}.json").read_text())
        answers[provider] = {record["id"]: (record["reasoning"], record["prompt_tokens"]) for record in records}
    assert len(answers["vllm"]) == ITEMS
    same = sum(answers["vllm"][key] == answers["huggingface"][key] for key in answers["vllm"])
    # Two implementations sum in different orders, so a near tie may fall either way.
    assert same >= ITEMS - 1

"""The real engine, and that it gives the answers of plain transformers."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from spatialthinker.schema import parquet_path, write_parquet
from spatialthinker.synthetic import generate
from tests.support.tiny_model_folder import save_tiny_model

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


@pytest.mark.e2e
@pytest.mark.nightly
def test_a_model_of_linear_attention_is_evaluated_on_a_cpu(tmp_path):
    """In bf16, the one type in which vLLM computes it there."""
    write_parquet([row for _, row in generate(ITEMS, seed=5, split="val")], parquet_path(tmp_path / "data", "val"))
    folder = save_tiny_model(tmp_path / "model", family="qwen3_5")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "evaluation/evals.py", "--dataset", "stvqa", "--template", "spatial_thinker_full"]
    command += ["--data_path", str(tmp_path / "data"), "--model_path", str(folder), "--provider", "vllm"]
    command += ["--output_dir", str(tmp_path), "--custom_filename", "found", "--max_tokens", "8"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    records = json.loads((tmp_path / "found.json").read_text())
    assert len(records) == ITEMS and all(record["response_tokens"] == 8 for record in records)


@pytest.mark.e2e
@pytest.mark.nightly
def test_vllms_own_server_gives_the_answers_of_the_engine(tmp_path):
    write_parquet([row for _, row in generate(ITEMS, seed=5, split="val")], parquet_path(tmp_path / "data", "val"))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    engine = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCH_COMPILE_DISABLE": "1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "configs/toy_model"]
    serve += ["--port", str(port), "--dtype", "float32", "--enforce-eager", "--skip-mm-profiling"]
    serve += ["--max-model-len", "512"]
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(serve, cwd=ROOT, env=environment | engine, stdout=log, stderr=log)
        try:
            wait_for_server(port, server)
            answers = {}
            for provider, more in (("openai", ["--base_url", f"http://127.0.0.1:{port}/v1"]), ("vllm", [])):
                command = [sys.executable, "evaluation/evals.py", "--dataset", "stvqa", "--template", "reasoning"]
                command += ["--data_path", str(tmp_path / "data"), "--model_path", "configs/toy_model"]
                command += ["--provider", provider, "--output_dir", str(tmp_path), "--custom_filename", provider]
                command += ["--max_tokens", "40", *more]
                done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
                assert done.returncode == 0, done.stderr[-3000:]
                records = json.loads((tmp_path / f"{provider}.json").read_text())
                answers[provider] = {record["id"]: record["reasoning"] for record in records}
        finally:
            server.terminate()
            server.wait()
    assert len(answers["vllm"]) == ITEMS
    assert sum(answers["vllm"][key] == answers["openai"][key] for key in answers["vllm"]) >= ITEMS - 1


def wait_for_server(port: int, server: subprocess.Popen, timeout_s: float = 240) -> None:
    for _ in range(int(timeout_s * 2)):
        assert server.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError("the server did not start")

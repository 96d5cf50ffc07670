"""Hub names without a network: one line at once, and one message at the end of the program."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from spatialthinker.network import OFFLINE, PROXIES, use_cache_without_network

ROOT = Path(__file__).resolve().parents[2]
HUB_NAME = "OWNER/NAME"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    """A hub of this machine, which listens; nothing of the caller's environment is left."""
    for name in (*OFFLINE, *PROXIES):
        monkeypatch.delenv(name, raising=False)
    server = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
    return server


def is_offline() -> bool:
    import os

    return all(os.environ.get(name) == "1" for name in OFFLINE)


def test_a_hub_within_reach_changes_nothing(hub, capsys):
    use_cache_without_network([HUB_NAME, None])
    assert not is_offline() and capsys.readouterr().err == ""
    hub.close()


def test_a_hub_out_of_reach_is_said_once_with_the_names(hub, monkeypatch, capsys):
    hub.close()
    for name in OFFLINE:
        monkeypatch.setenv(name, "")  # so that monkeypatch takes them away again
    use_cache_without_network([HUB_NAME, f"{HUB_NAME}@train", HUB_NAME])
    assert is_offline()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "127.0.0.1 cannot be reached" in said
    assert said.count("OWNER/NAME,") == 1 and "OWNER/NAME@train" in said
    use_cache_without_network([HUB_NAME])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("reason", ["local paths", "a proxy", "offline already", "no names"])
def test_nothing_is_tried_where_it_is_not_needed(hub, reason, tmp_path, monkeypatch, capsys):
    hub.close()
    names: list[str | None] = [HUB_NAME]
    if reason == "local paths":
        names = [str(tmp_path), f"{tmp_path}@train"]
    elif reason == "a proxy":
        monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    elif reason == "offline already":
        monkeypatch.setenv(OFFLINE[0], "1")
    else:
        names = [None, ""]
    use_cache_without_network(names)
    assert not is_offline() and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "command",
    [
        f"-m verl.trainer.main data.train_files={HUB_NAME} data.val_files={HUB_NAME} trainer.dry_run=true",
        f"-m verl.trainer.main worker.actor.model.model_path={HUB_NAME} trainer.dry_run=true",
        "evaluation/evals.py --dataset stvqa --template reasoning --model_path configs/toy_model",
        f"evaluation/evals.py --dataset stvqa --template reasoning --model_path {HUB_NAME} --data_path DATA",
        "scripts/sft.py --use_cpu --bf16 false --output_dir DATA/out",
        f"data_gen/generate_data.py preprocess_data --provider=template --source={HUB_NAME}",
    ],
    ids=lambda command: command.partition(" --")[0][:60],
)
def test_programs_end_with_one_message(command, tmp_path):
    from spatialthinker.schema import parquet_path, write_parquet
    from spatialthinker.synthetic import generate

    write_parquet([row for _, row in generate(2, 1, "val")], parquet_path(tmp_path, "val"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # free again when the program starts
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_ENDPOINT": f"http://127.0.0.1:{port}"}
    ended = subprocess.run(
        [sys.executable, *command.replace("DATA", str(tmp_path)).split()],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 2, ended.stderr
    assert "No network: 127.0.0.1 cannot be reached" in ended.stderr
    assert "Traceback" not in ended.stderr and "Retry" not in ended.stderr

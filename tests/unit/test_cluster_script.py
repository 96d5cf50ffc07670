"""The script that starts Ray on several machines, with a stand-in for Ray: never without a token."""

import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RAY = """#!/usr/bin/env bash
echo "$RAY_AUTH_MODE $*" >>"$CALLS"
token=$HOME/.ray/auth_token
case "$*" in
    "get-auth-token --generate") mkdir -p "$HOME/.ray" && touch "$token" ;;
    get-auth-token) [[ -e $token ]] ;;
    *--head*) echo "  ray start --address='10.0.0.1:6379'" ;;
    *) if [[ -e $HOME/refuse ]]; then echo "AuthenticationError: InvalidAuthToken" && exit 1; fi ;;
esac
"""


@pytest.fixture
def cluster(tmp_path):
    """Calls the script in a folder and a home of its own; returns code, output, errors and Ray's calls."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "cluster.sh", tmp_path / "scripts")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ray").write_text(RAY)
    (tmp_path / "bin" / "ray").chmod(0o755)
    calls = tmp_path / "calls"

    def call(*arguments: str) -> tuple[int, str, str, list[str]]:
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        environment = os.environ | {"HOME": str(tmp_path), "CALLS": str(calls), "PATH": path}
        command = ["bash", "scripts/cluster.sh", *arguments]
        ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        made = calls.read_text().splitlines() if calls.exists() else []
        calls.unlink(missing_ok=True)
        return ended.returncode, ended.stdout, ended.stderr, made

    return call


def test_a_head_makes_a_token_first_and_says_how_to_join(cluster):
    code, output, _, calls = cluster("head", "6380")
    assert code == 0 and calls[0] == "token get-auth-token --generate"
    assert calls[1].startswith("token start --head --port=6380 ")
    assert "bash scripts/cluster.sh join 10.0.0.1:6379" in output
    assert "RAY_AUTH_MODE=token RAY_ADDRESS=10.0.0.1:6379 python3 -m verl.trainer.main" in output


def test_joining_needs_the_token_and_an_open_port_and_tells_why_it_failed(cluster, tmp_path):
    name = socket.gethostname()
    code, _, errors, calls = cluster("join", "127.0.0.1:1")
    assert code == 2 and f"no token on {name}; copy ~/.ray/auth_token" in errors and len(calls) == 1
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").touch()
    code, _, errors, _ = cluster("join", "127.0.0.1:1")
    assert code == 2 and f"127.0.0.1:1 cannot be reached from {name}; is the head started there" in errors
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        code, output, _, calls = cluster("join", address)
        assert code == 0 and calls[1].startswith(f"token start --address={address} ")
        assert output == f"{name} has joined {address}\n"
        (tmp_path / "refuse").touch()
        code, _, errors, _ = cluster("join", address)
        assert (
            code == 2 and errors == f"error: {name} could not join {address}: AuthenticationError: InvalidAuthToken\n"
        )


@pytest.mark.parametrize("arguments", [[], ["start"], ["join"], ["join", "first"], ["check"], ["head", "1", "2"]])
def test_other_words_are_refused_with_those_that_are_known(cluster, arguments):
    code, _, errors, calls = cluster(*arguments)
    assert code == 2 and "give head [PORT], join FIRST_MACHINE:PORT or check" in errors and not calls

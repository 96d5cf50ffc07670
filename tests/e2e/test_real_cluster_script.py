"""A real cluster by scripts/cluster.sh, with its token and with another's; it ends with its PID namespace."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMESPACES = ["unshare", "--fork", "--pid", "--mount-proc", "--kill-child"]
CAN_UNSHARE = shutil.which("unshare") is not None and subprocess.run([*NAMESPACES, "true"]).returncode == 0
PROGRAM = """
set -u
bash scripts/cluster.sh head 6399 | sed -n 's/.*RAY_ADDRESS=\\([^ ]*\\).*/\\1/p' >"$HOME/address"
address=$(cat "$HOME/address")
bash scripts/cluster.sh join "$address"; echo "joined: $?"
mkdir -p "$HOME/other/.ray" && printf %064d 0 >"$HOME/other/.ray/auth_token"
HOME=$HOME/other bash scripts/cluster.sh join "$address"; echo "another token: $?"
GLOO_SOCKET_IFNAME=lo bash scripts/cluster.sh check "$address" config=configs/toy_cpu.yaml \
    data.train_files="$HOME" data.val_files="$HOME" trainer.save_checkpoint_path="$HOME/run"; echo "checked: $?"
"""

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.nightly,
    pytest.mark.skipif(not CAN_UNSHARE, reason="unshare of PID and mount namespaces is not allowed here"),
]


@pytest.fixture
def home() -> Iterator[Path]:
    """A short path, for Ray's sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="c") as folder:
        yield Path(folder)


def test_a_cluster_with_a_token_takes_who_has_it_and_checks_out(home):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"HOME": str(home), "RAY_TMPDIR": str(home)}
    command = [*NAMESPACES, "bash", "-c", PROGRAM]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert "joined: 0" in ended.stdout, ended.stderr
    assert "another token: 2" in ended.stdout and "InvalidAuthToken" in ended.stderr
    assert "checked: 0" in ended.stdout and "2 machines, 0 faults" in ended.stdout, ended.stdout + ended.stderr

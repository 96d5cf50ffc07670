"""Rows from pictures over two processes: the same bytes as with one, also after kill -9, and no worker stays."""

import hashlib
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from data_gen.generate_data import main
from data_gen.selfsup import run
from spatialthinker.storage.journal import read_lines
from tests.support.pictures import save_textures

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
BLOCK = 3
PROGRAM = f"""
import sys
from data_gen.selfsup import run
run.BLOCK_PICTURES = {BLOCK}
from data_gen.generate_data import main
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


def test_a_run_goes_on_after_a_kill_and_ends_with_the_same_bytes_as_one_process(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(run, "BLOCK_PICTURES", BLOCK)
    save_textures(tmp_path / "pictures", 30, (320, 240))
    out, whole = tmp_path / "killed" / "rows.csv", tmp_path / "whole" / "rows.csv"
    arguments = ["preprocess_data", "--provider=selfsup", f"--source={tmp_path / 'pictures'}"]
    command = [sys.executable, "-c", PROGRAM, *arguments, "--processes=2", f"--out={out}"]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    while not any(out.with_suffix("").glob("*.parquet")) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for_workers(process.pid)
    assert 0 < len(list(out.with_suffix("").glob("*.parquet"))) < 10

    assert main([*arguments, "--processes=2", f"--out={out}"]) == 0
    assert main([*arguments, "--processes=1", f"--out={whole}"]) == 0
    assert digests(out) == digests(whole) and len(digests(out)) == 11
    keys = Counter(line["key"] for line in read_lines(out.with_suffix(".jsonl")) if "key" in line)
    assert keys.most_common(1)[0][1] == 1 and len(keys) == 240
    before = out.with_suffix(".jsonl").read_bytes()
    assert main([*arguments, "--processes=1", f"--out={out}"]) == 0
    assert out.with_suffix(".jsonl").read_bytes() == before


def digests(out: Path) -> dict[str, str]:
    files = [out, *sorted(out.with_suffix("").glob("*"))]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def wait_for_workers(session: int) -> None:
    """Waits until no process of a killed run's session is left; fails where one stays."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if session not in list(sessions()):
            return
        time.sleep(0.05)
    raise AssertionError("a worker outlived its run")


def sessions():
    """The session of each process that is alive."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has ended meanwhile
            continue
        if state != "Z":
            yield int(session)

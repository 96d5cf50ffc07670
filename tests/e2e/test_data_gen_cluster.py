"""The stages of data generation over Ray Data on a cluster of this machine."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_gen.generate_data import main
from data_gen.journal import newest_lines
from data_gen.questions.records import read_records

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def api(tmp_path) -> Iterator[tuple[str, Path]]:
    """The address of a stand-in for a provider's API, and the file of answered requests."""
    calls = tmp_path / "calls.txt"
    command = [sys.executable, "tests/support/mock_api.py", "--calls", str(calls)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield process.stdout.readline().strip() + "/v1", calls
    process.kill()
    process.wait()


def test_blocks_over_ray_data_give_the_rows_of_their_scenes(cluster, api, tmp_path, capsys):
    out, checked = tmp_path / "t.csv", tmp_path / "v.csv"
    generate = ["preprocess_on_cluster", "--provider=template", "--source=synthetic:90", f"--out={out}"]
    for _ in range(2):  # the second run finds every block done
        assert main([*generate, "--block_rows=40"]) == 0
        records = list(read_records(out))
        assert [r.image_id for r in records] == [f"synthetic-0-{i:06d}" for i in range(90)]
    journals = sorted((tmp_path / "t" / "blocks").glob("*.jsonl"))
    assert [len(path.read_text().splitlines()) - 1 for path in journals] == [40, 40, 10]

    address, calls = api
    validate = ["validate_on_cluster", f"--input_file={out}", f"--output_file={checked}", f"--base_url={address}"]
    for _ in range(2):
        assert main(validate) == 0
        number = len(calls.read_text().split())
    lines = list(newest_lines(checked.with_suffix(".jsonl")))
    assert [x["record"]["image_id"] for x in lines] == [r.image_id for r in records]
    assert number == sum(len(x["agreements"]) for x in lines)
    kept = [x["record"]["image_id"] for x in lines if any(x["agreements"])]
    assert [r.image_id for r in read_records(checked)] == kept and 0 < len(kept) < 90

    assert main(["validate_on_cluster", f"--input_file={tmp_path / 'none.csv'}"]) == 2
    assert "no blocks in" in capsys.readouterr().err


def test_a_block_that_fails_is_told_in_one_message(cluster, tmp_path, capsys):
    blocks = tmp_path / "t" / "blocks"
    blocks.mkdir(parents=True)
    (blocks / "000001.jsonl").write_text("not of this program\n")
    command = ["preprocess_on_cluster", "--provider=template", "--source=synthetic:20", f"--out={tmp_path / 't.csv'}"]
    assert main([*command, "--block_rows=10"]) == 2
    message = capsys.readouterr().err
    assert "a block failed, the same command goes on" in message and "no journal of this program" in message

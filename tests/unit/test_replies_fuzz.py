"""Readers of replies, rows, journals and checkpoints over mutated inputs: no exception that is not documented."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from data_gen.journal import newest_lines
from spatialthinker.storage.journal import JournalFault, read_lines
from tests.support.fuzz_readers import READERS, SEEDS, read_row
from tests.support.hostile_responses import FRAGMENTS, NUMBERS, mutated

BYTES = b"{}[]:,\"'\\\n\r\0 9.-eE\x85\xff\xe2\x80\xa8"


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Data after a few changes of its bytes or of its text."""
    for _ in range(rng.choice((1, 1, 2, 6))):
        place = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0:
                data = data[:place]
            case 1:
                data = data[:place] + bytes([rng.choice(BYTES)]) * rng.choice((1, 1, 3, 40)) + data[place:]
            case 2:
                data = data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]
            case 3:
                lines = data.split(b"\n")
                rng.shuffle(lines)
                data = b"\n".join(lines)
            case _:
                data = mutated(data.decode("utf-8", "surrogateescape"), rng).encode("utf-8", "surrogatepass")
    return data


@pytest.mark.parametrize("name", READERS)
def test_whole_inputs_are_read(name):
    for seed in SEEDS[name]():
        READERS[name](seed)


@pytest.mark.parametrize("name", READERS)
def test_mutated_inputs_raise_nothing_undocumented(name):
    rng, seeds = random.Random(name), SEEDS[name]()
    for _ in range(60 if name == "checkpoint" else 250):
        READERS[name](mutate(rng.choice(seeds), rng))


def test_no_line_of_a_mutated_journal_is_read_as_another(tmp_path):
    """Lines read from a journal with checksums were written to it, or it is refused."""
    rng, path = random.Random(0), tmp_path / "j.jsonl"
    for whole in SEEDS["journal"]()[:2]:
        path.write_bytes(whole)
        written = list(read_lines(path))
        num_refused = 0
        for _ in range(600):
            path.write_bytes(mutate(whole, rng))
            found = []
            try:
                found.extend(line for line in read_lines(path))
            except JournalFault as fault:
                assert str(path) in str(fault)
                num_refused += 1
            assert all(line in written for line in found)
        assert num_refused > 300


def test_a_journal_cut_at_any_byte_loses_the_cut_line_alone(tmp_path):
    path = tmp_path / "j.jsonl"
    whole = SEEDS["journal"]()[0]
    path.write_bytes(whole)
    written = list(newest_lines(path))
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        assert list(newest_lines(path)) == written[: max(0, whole[:cut].count(b"\n") - 1)]


ODD = [None, True, -1, 1e300, 10**400, "", "\0", "\ud800", "a.1", "cat", [], {}, [None], [[1, 2, 3, 4]], {"id": 3}]


def with_odd_leaves(value: object, rng: random.Random) -> object:
    """A JSON value in which about one part in ten is something else."""
    if rng.random() < 0.1:
        return rng.choice([*ODD, rng.choice(FRAGMENTS)])
    if isinstance(value, dict):
        return {key: with_odd_leaves(item, rng) for key, item in value.items() if rng.random() > 0.02}
    if isinstance(value, list):
        return [with_odd_leaves(item, rng) for item in value for _ in range(rng.choice((1, 1, 1, 1, 2)))]
    return value


@pytest.mark.parametrize("seed", range(4))
def test_scenes_with_odd_parts_are_read_whole_or_refused(seed):
    rng = random.Random(seed)
    for _ in range(100):
        row = json.loads(rng.choice(SEEDS["row"]()))
        text = json.dumps(with_odd_leaves(row, rng))
        if rng.random() < 0.5:
            text = text.replace(str(rng.randrange(10)), rng.choice(NUMBERS), 1)
        read_row(text.encode("utf-8", "replace"))


@pytest.mark.nightly
@pytest.mark.parametrize("name", READERS)
def test_guided_fuzzing_finds_nothing_undocumented(name, tmp_path):
    """Ten minutes each, or FUZZ_S seconds; the input that fails lies in the test's folder."""
    pytest.importorskip("atheris")
    script = Path(__file__).parents[1] / "support" / "fuzz.py"
    limits = [f"-max_total_time={os.environ.get('FUZZ_S', '600')}", "-timeout=60", "-rss_limit_mb=8192"]
    done = subprocess.run(
        [sys.executable, str(script), name, *limits], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout[-4000:].decode("utf-8", "replace")

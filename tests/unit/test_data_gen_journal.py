"""The journal: cut-off lines, newest lines, other settings, a full disk."""

import os

import pytest

from data_gen.journal import SceneJournal, newest_lines
from spatialthinker.storage.journal import JournalFault


def line(key: str, status: str = "accepted") -> dict:
    return {"key": key, "index": int(key), "status": status}


def test_a_half_written_line_is_removed_and_no_whole_one_lost(tmp_path):
    path = tmp_path / "j.jsonl"
    with SceneJournal(path, {"a": 1}) as journal:
        for key in "210":
            journal.add(line(key))
        with pytest.raises(JournalFault, match="another process"):
            SceneJournal(path, {"a": 1})
    whole = path.read_bytes()
    for cut in range(1, 30, 7):
        path.write_bytes(whole + whole[-30:-cut])
        with SceneJournal(path, {"a": 1}) as journal:
            assert set(journal.entries) == set("012")
        assert path.read_bytes() == whole
    assert [x["key"] for x in newest_lines(path)] == ["0", "1", "2"]
    with pytest.raises(JournalFault, match="a: 1 there, 2 now"):
        SceneJournal(path, {"a": 2})
    with SceneJournal(path, {"a": 2}, is_overwritten=True) as journal:
        assert journal.entries == {}


def test_the_newest_line_counts_and_errors_are_asked_again(tmp_path):
    with SceneJournal(tmp_path / "j.jsonl", {}) as journal:
        journal.add(line("1", "error"))
        assert not journal.is_settled("1")
        journal.add(line("1", "quarantined"))
        assert journal.is_settled("1") and journal.outcomes() == {"quarantined": 1}
    assert [x["status"] for x in newest_lines(tmp_path / "j.jsonl")] == ["quarantined"]


def test_a_full_disk_costs_no_line_and_no_answer_under_way(tmp_path, monkeypatch, capsys):
    """The reserve is given up for the next line; where others have eaten it, room is waited for."""
    monkeypatch.setattr("data_gen.journal.DISK_WAIT_S", 0.05)
    monkeypatch.setattr("data_gen.journal._DISK_RETRY_S", 0.01)
    with SceneJournal(tmp_path / "j.jsonl", {}, reserve_bytes=1 << 16) as journal:
        journal.add(line("1"))
        journal.check_room()
        real, journal._fd = journal._fd, os.open("/dev/full", os.O_WRONLY)
        with pytest.raises(JournalFault, match="cannot be written: No space left"):
            journal.add(line("2"))
        with pytest.raises(JournalFault, match="every answer so far is saved"):
            journal.check_room()
        journal._fd = real
        journal.add(line("2"))
    assert "is full: waiting for room" in capsys.readouterr().err
    assert [x["key"] for x in newest_lines(tmp_path / "j.jsonl")] == ["1", "2"]

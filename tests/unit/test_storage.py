"""Files that appear complete or not at all, journals that outlive a kill at any byte, images turned upright."""

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from data_gen.journal import SceneJournal, newest_lines
from evaluation.journal import AnswerJournal, Record
from spatialthinker.storage.files import whole_file, write_json, write_text
from spatialthinker.storage.images import BrokenImage, encode, open_image, orientation, upright, upright_size
from spatialthinker.storage.journal import JournalFault, name_differences, read_lines


def test_a_file_appears_complete(tmp_path: Path):
    path = tmp_path / "new" / "facts.json"
    write_json(path, {"name": "é", "n": [1]})
    assert path.read_text(encoding="utf-8") == '{\n  "name": "é",\n  "n": [\n    1\n  ]\n}\n'
    write_text(path, "anew")
    assert path.read_text() == "anew"
    assert os.listdir(path.parent) == ["facts.json"]


@pytest.mark.parametrize(
    "fault", [RuntimeError("bug"), OSError(errno.EACCES, "Permission denied"), KeyboardInterrupt()]
)
def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path, fault: BaseException):
    path = tmp_path / "facts.txt"
    path.write_text("old")
    with pytest.raises(type(fault)) as caught, whole_file(path) as partial:
        partial.write_text("half")
        assert path.read_text() == "old"
        raise fault
    assert caught.value is fault
    assert os.listdir(tmp_path) == ["facts.txt"] and path.read_text() == "old"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_with_the_file(tmp_path: Path, number: int):
    path = tmp_path / "facts.txt"
    with pytest.raises(ValueError, match=r"facts.txt cannot be .*: the disk is full"), whole_file(path) as partial:
        partial.write_text("half")
        raise OSError(number, os.strerror(number))
    assert not os.listdir(tmp_path)


SETTINGS = {"model": "m", "seed": 1}


def add_scenes(path: Path, *keys: str) -> set[str]:
    with SceneJournal(path, SETTINGS) as journal:
        known = set(journal.entries)
        for key in keys:
            journal.add({"key": key, "index": 0, "status": "accepted", "text": "né"})
    return known


def add_answers(path: Path, *keys: str) -> set[str]:
    with AnswerJournal(path, SETTINGS, is_resumed=True) as journal:
        known = set(journal.records)
        for key in keys:
            journal.add(Record("né?", "A", "A", "A", 1, None, id=key))
    return known


@pytest.mark.parametrize("add", [add_scenes, add_answers])
def test_a_journal_cut_at_any_byte_keeps_its_whole_lines(tmp_path: Path, add: Callable[..., set[str]]):
    path = tmp_path / "run.jsonl"
    add(path, "0", "1")
    whole = path.read_bytes()
    assert whole.startswith(b'{"settings": {"model": "m", "seed": 1}, "crc32": "') and "né".encode() in whole
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        num_lines = whole[:cut].count(b"\n")
        assert add(path) == {"0", "1"} - {str(i) for i in range(max(0, num_lines - 1), 2)}
        assert path.read_bytes() == whole[: whole[:cut].rfind(b"\n") + 1] or num_lines == 0
        add(path, *"01"[max(0, num_lines - 1) :])
        assert path.read_bytes() == whole


def test_a_line_that_is_no_json_is_named(tmp_path: Path):
    path = tmp_path / "run.jsonl"
    path.write_text('{"settings": {}}\n{"key"\n{"key": 1}\n')
    with pytest.raises(ValueError, match=r"run\.jsonl, line 2: "):
        list(read_lines(path))
    with pytest.raises(ValueError, match=r"run\.jsonl, line 2: not a line of a journal"):
        AnswerJournal(path, {}, is_resumed=True)
    with pytest.raises(ValueError, match=r"run\.jsonl, line 2: "):
        SceneJournal(path, {})


@pytest.mark.parametrize("add", [add_scenes, add_answers])
def test_no_flipped_byte_of_a_journal_passes_unseen(tmp_path: Path, add: Callable[..., set[str]]):
    """All but one of the last line's end, which makes it a line that was cut off."""
    path = tmp_path / "run.jsonl"
    add(path, "0", "1")
    whole = path.read_bytes()
    for place in range(len(whole) - 1):
        for flip in (1, 32, 255):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
            with pytest.raises(ValueError, match=r"run\.jsonl"):
                add(path)
    path.write_bytes(whole[:-1] + b"x")
    assert add(path) == {"0"}


def without_checksums(data: bytes) -> bytes:
    return re.sub(rb', "crc32": "[0-9a-f]{8}"', b"", data)


@pytest.mark.parametrize("add", [add_scenes, add_answers])
def test_a_journal_without_checksums_is_read_and_gone_on_with(tmp_path: Path, add: Callable[..., set[str]]):
    path = tmp_path / "run.jsonl"
    add(path, "0", "1")
    path.write_bytes(without_checksums(path.read_bytes()))
    assert add(path, "2") == {"0", "1"} and add(path) == {"0", "1", "2"}
    lines = path.read_bytes().splitlines()
    assert [b"crc32" in line for line in lines] == [False, False, False, True]
    path.write_bytes(b"\n".join([*lines, without_checksums(lines[-1]), b""]))
    with pytest.raises(ValueError, match=r"line 5: not a line of a journal \(its checksum is damaged\)"):
        add(path)


@pytest.mark.parametrize(
    "damage",
    [b"[]", b"3", b'{"key": []}', b'{"key": "1", "index": "x", "status": 1}', b'{"key": "1"}', b"[" * 9999]
    + [b'{"key": ' + b"9" * 5000 + b"}", b'\xff\xfe{"', b"\x00", b'"\\ud800"'],
)
def test_a_line_that_is_no_outcome_has_one_message(tmp_path: Path, damage: bytes):
    path = tmp_path / "run.jsonl"
    for data in (b'{"settings": {}}\n' + damage + b"\n", damage + b'\n{"settings": {}}\n'):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"run\.jsonl"):
            SceneJournal(path, {})
        with pytest.raises(ValueError, match=r"run\.jsonl"):
            list(newest_lines(path))
            SceneJournal(path, {})


def test_halves_of_surrogates_outlive_the_journal(tmp_path: Path):
    texts = ["\ud800", "a\udfffb", "\\\ud83d", "\U0001f600 é", "\udfff\ud800"]
    with SceneJournal(tmp_path / "run.jsonl", {}) as journal:
        journal.add({"key": "\udc00", "index": 0, "status": "accepted", "texts": texts})
    (line,) = newest_lines(tmp_path / "run.jsonl")
    assert line["texts"] == texts and line["key"] == "\udc00"


def test_an_open_journal_is_locked_for_every_program(tmp_path: Path):
    path = tmp_path / "run.jsonl"
    with AnswerJournal(path, SETTINGS, is_resumed=False) as journal:
        journal.add(Record("", "A", "A", "A", 1, None, id="0"))
        for is_resumed in (True, False):
            with pytest.raises(JournalFault, match="being written by another process"):
                AnswerJournal(path, SETTINGS, is_resumed)
        with pytest.raises(JournalFault, match="being written by another process"):
            SceneJournal(path, SETTINGS)
    assert add_answers(path) == {"0"}


@pytest.mark.parametrize("is_resumed", [True, False])
def test_a_journal_that_another_run_wrote_meanwhile_is_not_gone_on_with(tmp_path: Path, is_resumed: bool):
    path = tmp_path / "run.jsonl"
    late = AnswerJournal(path, SETTINGS, is_resumed)
    add_answers(path, "0")
    with pytest.raises(JournalFault, match="meanwhile; go on with --resume"), late:
        pass
    assert os.listdir(tmp_path) == ["run.jsonl"] and add_answers(path) == {"0"}


@pytest.mark.parametrize("add", [add_scenes, add_answers])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_journal_is_a_regular_file(tmp_path: Path, add: Callable[..., set[str]], kind: str):
    path = tmp_path / "run.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/null")
    with pytest.raises(JournalFault, match="run.jsonl is no regular file"):
        add(path, "a")


def test_halves_of_surrogates_outlive_a_json_file(tmp_path: Path):
    write_json(tmp_path / "run.json", {"task\udfff": "a\ud800é"})
    assert json.loads((tmp_path / "run.json").read_text()) == {"task\udfff": "a\ud800é"}
    write_text(tmp_path / "run.md", "a\ud800é")
    assert (tmp_path / "run.md").read_text() == "a\\ud800é"


def test_settings_that_differ_are_named_with_both_values():
    assert name_differences({"a": 1, "b": 2}, {"c": None, "b": 3}) == ["a: 1 there, None now", "b: 2 there, 3 now"]


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The write that finds room for ten bytes only."""
    path, write = tmp_path / "run.jsonl", os.write
    with AnswerJournal(path, SETTINGS, is_resumed=False) as journal:
        before = path.read_bytes()
        monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:10]))
        with pytest.raises(OSError, match="No space left"):
            journal.add(Record("", "A", "A", "A", 1, None, id="0"))
        monkeypatch.undo()
        assert path.read_bytes() == before and not journal.is_answered("0")


def jpeg(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(Image.new("RGB", (30, 20), "red"), "JPEG", exif=exif)


@pytest.mark.parametrize("number", range(1, 9))
def test_an_image_is_turned_upright(number: int):
    with open_image(jpeg(number)) as image:
        assert orientation(image) == number
        assert upright_size(image) == upright(image).size == ((20, 30) if number > 4 else (30, 20))
        assert upright(image).mode == "RGB"


@pytest.mark.parametrize("data", [b"", b"no image", jpeg(1)[:200]])
def test_a_broken_image_raises_one_error(data: bytes):
    with pytest.raises(BrokenImage), open_image(data) as image:
        upright(image)

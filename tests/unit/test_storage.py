"""Files that appear complete or not at all, journals that outlive a kill at any byte, images turned upright."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from data_gen.journal import SceneJournal
from evaluation.journal import AnswerJournal, Record
from spatialthinker.storage.files import whole_file, write_json, write_text
from spatialthinker.storage.images import BrokenImage, encode, open_image, orientation, upright, upright_size
from spatialthinker.storage.journal import name_differences, read_lines


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
    assert whole.startswith(b'{"settings": {"model": "m", "seed": 1}}\n') and "né".encode() in whole
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

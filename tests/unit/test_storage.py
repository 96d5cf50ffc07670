"""Files that appear complete or not at all."""

import errno
import os
from pathlib import Path

import pytest

from spatialthinker.storage.files import whole_file, write_json, write_text


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

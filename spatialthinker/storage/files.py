"""Outputs that are never overwritten unasked and never half there."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)


def claim_output(path: Path, is_overwritten: bool) -> Path:
    """The path of an output; ValueError where it exists and may not be overwritten, or cannot be written."""
    if path.exists() and not is_overwritten:
        raise ValueError(f"{path} exists; name another output, or pass --overwrite=True to replace it")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path.parent} cannot be written")
    return path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to; its content becomes `path` at the end, and nothing stays of it after an error.

    A full disk raises ValueError with the name of the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        if error.errno in DISK_IS_FULL:
            message = f"{path} cannot be written: the disk is full; make room and give the command again"
            raise ValueError(message) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file that appears complete or not at all, and lasts once it has appeared."""
    with whole_file(path) as partial, partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears complete or not at all, and lasts once it has appeared.

    A surrogate without its other half becomes its escape, which JSON reads back.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that appears complete or not at all, and lasts once it has appeared."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

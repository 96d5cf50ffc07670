"""Keys of the providers and of the hub: from the environment, or from a file `.env`."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

_SETTING = re.compile(r"""(?:export\s+)?([A-Za-z_]\w*)\s*=\s*(?:"([^"]*)"|'([^']*)'|([^#\s]*))\s*(?:\#.*)?""")
_NO_KEY = "none"
"""The API key for a local server where none is set."""


def read_env_file(path: Path) -> None:
    """Set the variables of a file of NAME=VALUE lines that are not set yet; nothing where there is no file.

    Raises ValueError for a line that is none, without its text: it may hold a key.
    """
    if not path.is_file():
        return
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _SETTING.fullmatch(line.strip())
        if match is None:
            raise ValueError(f"{path}, line {number}: write NAME=VALUE")
        os.environ.setdefault(match[1], next((value for value in match.groups()[1:] if value is not None), ""))


def find_key(names: Sequence[str], base_url: str | None) -> str | None:
    """The first of these environment variables that is set; a server of one's own needs none. None where one lacks."""
    found = (os.environ.get(name, "").strip() for name in names)
    return next(filter(None, found), _NO_KEY if base_url is not None else None)

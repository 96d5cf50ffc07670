"""Text that models, servers and strangers wrote, made fit for files, terminals and tables."""

import re

_NO_SIGN = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"
)
"""Escape sequences of terminals, and control signs other than tab and line ends."""

_DIRECTION = re.compile("[\u202a-\u202e\u2066-\u2069]")
"""Signs that make a terminal or a page show text in another order."""

_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_NUMBER = re.compile(r"[+-]?\d+(?:[.,]\d+)?")


def whole_characters(text: str) -> str:
    """The text without NUL, and with U+FFFD for each surrogate that has no other half: no file holds those."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", "")


def printable(text: str) -> str:
    """The text on one line, without signs that a terminal would obey."""
    return " ".join(_DIRECTION.sub("", _NO_SIGN.sub("", whole_characters(text))).split())


def to_cell(text: str) -> str:
    """The text for a cell of a CSV; a `'` goes before what a spreadsheet would run as a formula."""
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def from_cell(cell: str) -> str:
    """The text that `to_cell` wrote."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell

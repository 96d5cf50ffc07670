"""Replies: JSON of servers, which may leave out or garble any field, and objects in a model's text."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from spatialthinker.clients.prices import Usage
from spatialthinker.plain_text import printable, whole_characters

MAX_TEXT_CHARS = 65_536
"""A model's text is searched for objects from its end, so far."""

MAX_LOOSE_CHARS = 8192
"""An object that is no strict JSON is read in a text of so many characters at most."""

_CUSTOM_ID = re.compile(rb'"custom_id"\s*:\s*"([^"\\]+)"')
_THOUGHT = r"(?:think|thinking|thought|thoughts|reasoning|reflection|scratchpad|analysis)"
_THOUGHTS = re.compile(rf"<({_THOUGHT})\b[^>]*>.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
_THOUGHT_END, _THOUGHT_START = (
    re.compile(rf"</{_THOUGHT}\s*>", re.IGNORECASE),
    re.compile(rf"<{_THOUGHT}\b[^>]*>", re.IGNORECASE),
)
_TOKEN = re.compile(
    r"""\s+ | //[^\n]* | /\*.*?\*/ | (?P<sign>[{}\[\]:,])
    | "(?P<double>(?:\\.|[^"\\])*)" | '(?P<single>(?:\\.|[^'\\]|'(?!\s*[,:}\]]))*)'
    | (?P<word>[^\s{}\[\]:,"'/]+) | (?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)
_WORDS = {"True": "true", "False": "false", "None": "null"}


class ReplyError(Exception):
    """A reply with a status of success that is none: an error, a page, cut-off JSON. Asking again may help."""


@dataclass(frozen=True)
class Reply:
    """A model's reply; `stop` is "end", "length" or "refusal"."""

    text: str
    stop: str
    usage: Usage
    cost_usd: float
    fault: str = ""
    """The reason for which there is no text; empty where the server sent a message."""


def load_payload(data: bytes) -> dict[str, Any]:
    """The JSON object of a response. Raises ReplyError where it is none, or an error."""
    text = data.decode("utf-8-sig", "replace")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise ReplyError(f"status 200, but no JSON: {printable(text[:200])}") from None
    return check_payload(value)


def check_payload(value: Any) -> dict[str, Any]:
    """The value itself where it is an object and no error. Raises ReplyError otherwise."""
    if not isinstance(value, dict):
        raise ReplyError(f"status 200 with a JSON {type(value).__name__}: {str(value)[:200]}")
    error = value.get("error") or first(value.get("choices")).get("error")
    if error or value.get("type") == "error":
        raise ReplyError(f"status 200 with an error: {str(error or value)[:300]}")
    return value


def first(value: Any) -> dict[str, Any]:
    """The first object of a list; an empty one where there is none."""
    return as_dict(value[0]) if isinstance(value, list) and value else {}


def as_dict(value: Any) -> dict[str, Any]:
    """The value where it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def as_count(value: Any) -> int:
    """A number of tokens; 0 for what is none."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return int(value) if is_number and 0 <= value < 1e12 and not math.isnan(value) else 0


def as_text(content: Any, kinds: Mapping[str, str]) -> str:
    """The text of a message's content: a text, or parts of which each kind's text stands under its key."""
    if isinstance(content, str):
        return whole_characters(content)
    texts = []
    for part in content if isinstance(content, list) else []:
        kind = as_dict(part).get("type")
        value = part if isinstance(part, str) else as_dict(part).get(kinds.get(str(kind), "") if kind else "text")
        if value is not None:
            texts.append(value if isinstance(value, str) else json.dumps(value))
    return whole_characters("\n".join(texts))


def batch_lines(data: bytes) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Name and content of each line of a batch's results; None for a line that cannot be read."""
    for raw in data.split(b"\n"):
        try:
            item = json.loads(raw.decode("utf-8-sig", "replace"))
        except (ValueError, RecursionError):
            item = None
        name = as_dict(item).get("custom_id")
        if isinstance(name, str):
            yield name, item
        elif match := _CUSTOM_ID.search(raw):
            yield match[1].decode("utf-8", "replace"), None


def without_thoughts(text: str) -> str:
    """The part of a reply that is no reasoning: behind the last closing tag of such, or before an opening one."""
    text = _THOUGHTS.sub(" ", text)
    ends = [match.end() for match in _THOUGHT_END.finditer(text)]
    return _THOUGHT_START.split(text[ends[-1] if ends else 0 :])[0]


def find_object(text: str, key: str) -> dict[str, Any] | None:
    """The last JSON object with a key in a model's text, with its keys in lower case; None where there is none.

    Prose, fences and reasoning may stand around it, and other objects may hold it. Trailing commas, single quotes,
    comments and words without quotes are read as meant.
    """
    text = without_thoughts(text[-MAX_TEXT_CHARS:])
    return _scan(text, key, _strict) or (_scan(text, key, _loose) if len(text) <= MAX_LOOSE_CHARS else None)


def _scan(text: str, key: str, read: Any) -> dict[str, Any] | None:
    found, start = None, text.find("{")
    while start >= 0:
        values, end = read(text, start)
        if isinstance(values, dict):
            values = {str(name).strip().lower(): value for name, value in values.items()}
            inner = [v for v in values.values() if isinstance(v, str) and f'"{key}"' in v]  # arguments of a tool call
            if key in values:
                found, start = values, end - 1
            elif inner and (values := _scan(inner[-1], key, read)) is not None:
                found, start = values, end - 1
        start = text.find("{", start + 1)
    return found


def _strict(text: str, start: int) -> tuple[Any, int]:
    try:
        return json.JSONDecoder(strict=False).raw_decode(text, start)
    except (ValueError, RecursionError):
        return None, start


def _loose(text: str, start: int) -> tuple[Any, int]:
    """The object that starts there, written anew as strict JSON."""
    parts: list[str] = []
    depth = 0
    for match in _TOKEN.finditer(text, start):
        kind, value = match.lastgroup, match[match.lastgroup] if match.lastgroup else ""
        if kind == "sign":
            if value in "}]" and parts[-1:] == [","]:
                parts.pop()
            depth += (value in "{[") - (value in "}]")
            parts.append(value)
        elif kind in ("double", "single"):
            value = value.replace("\\'", "'") if kind == "double" else re.sub(r"\\'", "'", value).replace('"', '\\"')
            parts.append(f'"{value}"')
        elif kind == "word":
            value = _WORDS.get(value, value)
            parts.append(value if _strict(f"[{value}]", 0)[0] is not None else json.dumps(value))
        elif kind == "other":
            return None, start
        if depth == 0:
            return _strict("".join(parts), 0)[0], match.end()
    return None, start

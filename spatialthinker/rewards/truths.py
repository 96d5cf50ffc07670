"""Ground truths of the typed rewards: text as in an answer column, or a number, list or dictionary.

A value is turned into its JSON text, so that it is read once for all responses to its row, whatever its type. A
malformed one is the data set's fault: ValueError with its beginning.
"""

import ast
from functools import lru_cache
from typing import Any

import msgspec

from spatialthinker.response import section

MAX_SHOWN_CHARS = 200


def truth_text(ground_truth: Any) -> str:
    """Returns a ground truth as text: the content of its answer tags if it has some, JSON for other types."""
    if isinstance(ground_truth, str):
        return (section(ground_truth, "answer") or ground_truth).strip()
    try:
        return msgspec.json.encode(ground_truth, enc_hook=_plain_value).decode()
    except (TypeError, ValueError, RecursionError) as error:
        raise bad_truth("is no text, number, list or dictionary", repr(ground_truth)) from error


def _plain_value(value: Any) -> Any:
    """Returns an array's or tensor's content as lists and numbers."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no JSON form")


@lru_cache(maxsize=2048)
def decode_truth(text: str) -> Any:
    """Returns the value that a ground truth's text holds as JSON, or as Python writes it. Treat it as read-only.

    Raises ValueError for another text.
    """
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        pass
    try:  # str() of a list of texts has quotes that JSON does not know
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        raise bad_truth("is no JSON", text) from None


def bad_truth(fault: str, text: str) -> ValueError:
    """Returns the error for a ground truth that cannot be scored against."""
    return ValueError(f"the ground truth {fault}: {text[:MAX_SHOWN_CHARS]!r}")

"""The answer of a response, as the rewards of typed ground truths read it."""

from spatialthinker.answer_grammar import ascii_signs
from spatialthinker.response import find_answer

_OPENING, _CLOSING = "<answer>", "</answer>"
_MAX_CHARS = 50_000
"""Longer responses are left to the full reader, which limits its work."""


def read_answer(response: str) -> str:
    """Returns the content of a response's answer tags, else what it says outside its thinking; "" for nothing.

    It is `find_answer` of the evaluation, so that a reward pays for what a benchmark counts. A response that ends in
    one plain pair of tags, after its thinking or alone, takes a shortcut to the same text.
    """
    text = response.strip()
    if text.endswith(_CLOSING) and len(response) < _MAX_CHARS:
        before, opening, content = text[: -len(_CLOSING)].rpartition(_OPENING)
        before = before.rstrip()
        if opening and (not before or before.endswith("</think>")):
            content = ascii_signs(content).strip()
            if content and "<" not in content and "think]" not in content.lower():
                return content
    return find_answer(response) or ""

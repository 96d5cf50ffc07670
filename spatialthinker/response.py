"""What a model's response says: its four tagged sections and its answer.

The sections come in the order `<observe>`, `<scene>` (JSON), `<think>`, `<answer>`. All searches are linear in
the length of the text, whatever it holds.
"""

import re
from typing import NamedTuple

SECTIONS = ("observe", "scene", "think", "answer")
"""The tags of a full response in the order the prompt asks for."""

_TAGS = tuple((f"<{tag}>", f"</{tag}>") for tag in SECTIONS)
_SEAMS = tuple(re.compile(rf"</{a}>\s*<{b}>") for a, b in zip(SECTIONS, SECTIONS[1:], strict=False))
_THINK_ANSWER_SEAM = re.compile(r"</think>\s*<answer>")


class Response(NamedTuple):
    """The text of each section's first pair of tags; None when there is no such pair."""

    observe: str | None
    scene_text: str | None
    think: str | None
    answer: str | None


def section(text: str, tag: str) -> str | None:
    """Returns the text between the first `<tag>` and the `</tag>` after it, or None."""
    return _between(text, f"<{tag}>", f"</{tag}>")


def _between(text: str, opening: str, closing: str) -> str | None:
    start = text.find(opening)
    if start < 0:
        return None
    start += len(opening)
    end = text.find(closing, start)
    return None if end < 0 else text[start:end]


def parse_response(text: str) -> Response:
    """Returns the sections of a response; the answer comes without surrounding blanks."""
    observe, scene, think, answer = [_between(text, *pair) for pair in _TAGS]
    return Response(observe, scene, think, None if answer is None else answer.strip())


def is_think_answer(text: str) -> bool:
    """Whether the text is exactly a think block, optional blanks and an answer block."""
    return _is_chain(text, "<think>", (_THINK_ANSWER_SEAM,), "</answer>")


def is_four_sections(text: str) -> bool:
    """Whether the text is exactly the four blocks in order with only blanks between them."""
    return _is_chain(text, "<observe>", _SEAMS, "</answer>")


def _is_chain(text: str, opening: str, seams: tuple[re.Pattern[str], ...], closing: str) -> bool:
    if not (text.startswith(opening) and text.endswith(closing)):
        return False
    position, limit = len(opening), len(text) - len(closing)
    for seam in seams:
        match = seam.search(text, position, max(limit, position))
        if match is None:
            return False
        position = match.end()
    return True

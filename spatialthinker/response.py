"""Parsing of a model's response: its four tagged sections and its answer.

The sections come in the order `<observe>`, `<scene>` (JSON), `<think>`, `<answer>`. All searches are linear in
the length of the text, whatever it holds.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

SECTIONS = ("observe", "scene", "think", "answer")
"""The tags of a full response, in the prompt's order."""

Kind = Literal["letter", "text", "number", "conflict", "unparsed", "truncated"]
"""letter: named by its letter, with or without its text; text: by its text alone; number: an open answer read as a
number; conflict: letter and text, or several letters, disagree; unparsed: nothing that could be read; truncated: the
response ended at its length limit before an answer."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_TAGS = tuple((f"<{tag}>", f"</{tag}>") for tag in SECTIONS)
_NO_TAG = "[^<]*+"
_CANONICAL = re.compile(_NO_TAG + _NO_TAG.join(f"<{tag}>({_NO_TAG})</{tag}>" for tag in SECTIONS) + _NO_TAG)
"""A response with no other `<` than those of its four sections: nearly all of a trained model's."""
_SEAMS = tuple(re.compile(rf"</{a}>\s*<{b}>") for a, b in zip(SECTIONS, SECTIONS[1:], strict=False))
_THINK_ANSWER_SEAM = re.compile(r"</think>\s*<answer>")
_DECORATION = re.compile(r"\\(?:boxed|text|textbf|mathrm)(?=\s*\{)|[*_`${}\"“”]")
_LEADING_PHRASE = re.compile(
    r"^(?:so|thus|therefore|hence)?,?\s*(?:the\s+)?(?:(?:final|correct|right|best)\s+)*(?:answer|option|choice)"
    r"(?:\s+is)?(?:\s+(?:option|choice))?\s*[:=]?\s*(?=\S)",
    re.IGNORECASE,
)
_LEADING_LETTER = re.compile(
    r"^(?:\(([A-Za-z])\)|\[([A-Za-z])\]|([A-Za-z])(?=[).:,]|\s*$|\s+[-–—]))\s*[).:,\-–—]*\s*(.*)$", re.DOTALL
)
_LETTER_IN_BRACKETS = re.compile(r"\(([A-Za-z])\)")


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
    canonical = _CANONICAL.fullmatch(text)  # seven times faster than the searches
    observe, scene, think, answer = canonical.groups() if canonical else [_between(text, *pair) for pair in _TAGS]
    return Response(observe, scene, think, None if answer is None else answer.strip())


def is_think_answer(text: str) -> bool:
    """True when the text is exactly a think block, optional blanks and an answer block."""
    return _is_chain(text, "<think>", (_THINK_ANSWER_SEAM,), "</answer>")


def is_four_sections(text: str) -> bool:
    """True when the text is exactly the four blocks in order with only blanks between them."""
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


def normalize(text: str) -> str:
    """Returns a text fit for comparison: no decoration, no final dot, single blanks, no case."""
    text = _DECORATION.sub("", text)
    return " ".join(text.split()).lstrip(" ,;:!?'").rstrip(" .,;:!?'").casefold()


def without_phrase(answer: str) -> str:
    """Returns an answer without decoration and without a phrase such as "The correct answer is" before it."""
    return _LEADING_PHRASE.sub("", _DECORATION.sub("", answer).strip(), count=1)


@dataclass(frozen=True)
class Choice:
    """A choice that an answer names; letter None where it names none or several."""

    kind: Kind
    letter: str | None
    text: str | None


def extract_choice(answer: str, options: Sequence[str]) -> Choice:
    """Returns the choice that an answer names by letter, by text or by both.

    Without options any single letter is accepted. Letter and text of different options are a conflict in which the
    letter counts; several letters are a conflict that names nothing.
    """
    plain = without_phrase(answer)
    known = LETTERS[: len(options)] if options else LETTERS
    by_text = _match_text(plain, options)
    if by_text is not None:  # first the exact text of an option: it may be a letter itself
        return Choice("text", LETTERS[by_text], options[by_text])
    letter, rest = _split_letter(plain, known)
    if letter is None:
        return _extract_from_sentence(plain, options, known)
    others = {found.upper() for found in _LETTER_IN_BRACKETS.findall(rest)} & set(known) - {letter}
    if others:
        return Choice("conflict", None, None)
    index = _match_text(rest, options)
    text = options[known.index(letter)] if options else (rest.strip() or None)
    if index is not None and LETTERS[index] != letter:
        return Choice("conflict", letter, text)
    return Choice("letter", letter, text)


def _split_letter(plain: str, known: str) -> tuple[str | None, str]:
    match = _LEADING_LETTER.match(plain)
    if match is None:
        return None, plain
    letter = (match[1] or match[2] or match[3]).upper()
    return (letter, match[4]) if letter in known else (None, plain)


def _match_text(text: str, options: Sequence[str]) -> int | None:
    """Returns the index of the option with this text; None for no option and for several that differ in nothing."""
    wanted = normalize(text)
    found = [i for i, option in enumerate(options) if normalize(option) == wanted]
    return found[0] if len(found) == 1 and wanted else None


def _extract_from_sentence(plain: str, options: Sequence[str], known: str) -> Choice:
    letters = {found.upper() for found in _LETTER_IN_BRACKETS.findall(plain)} & set(known)
    stated = re.findall(r"\b(?:answer|option|choice)\s+(?:is\s+)?(?:option\s+)?\(?([A-Z])\b\)?", plain)
    letters |= set(stated) & set(known)
    if len(letters) > 1:
        return Choice("conflict", None, None)
    mentioned = _mentioned_options(plain, options)
    if letters:
        letter = letters.pop()
        text = options[known.index(letter)] if options else None
        is_conflict = len(mentioned) == 1 and LETTERS[mentioned[0]] != letter
        return Choice("conflict" if is_conflict else "letter", letter, text)
    if len(mentioned) == 1:
        return Choice("text", LETTERS[mentioned[0]], options[mentioned[0]])
    return Choice("conflict" if mentioned else "unparsed", None, None)


def _mentioned_options(plain: str, options: Sequence[str]) -> list[int]:
    """Returns the options whose whole text stands in the sentence, without those inside a longer one's."""
    sentence = normalize(plain)
    texts = [normalize(option) for option in options]
    found: list[int] = []
    for text in sorted({text for text in texts if text}, key=lambda text: (-len(text), text)):
        pattern = rf"(?<!\w){re.escape(text)}(?!\w)"
        if re.search(pattern, sentence):
            found += [index for index, other in enumerate(texts) if other == text]
            sentence = re.sub(pattern, " \0 ", sentence)
    return found

"""From a model's text and a reference to right or wrong, and how the answer was read. Pure functions.

A letter is read as a letter, a text as a text; whatever names no choice, or more than one, is no answer. Nothing
falls back to a default choice, because that would pay a silent model the share of that letter.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from evaluation.scoring.open_answers import grade_open, read_number
from spatialthinker.answer_grammar import LETTERS, normalize
from spatialthinker.quantities import mean_relative_accuracy
from spatialthinker.response import Kind, extract_choice, find_answer

if TYPE_CHECKING:
    from spatialthinker.geometry import Box

PARSE_FAILURES: tuple[Kind, ...] = ("conflict", "unparsed", "truncated")
"""Kinds of answers that name no answer, or more than one."""


Form = Literal["exact", "relative", "count", "moves", "points", "box"]
"""Form of an open answer: right or wrong, or a number, camera moves, points or a box, whose credit has degrees."""


@dataclass(frozen=True)
class Reference:
    """The right answer: a choice's letter (and text), or an open text."""

    letter: str | None
    text: str | None
    form: Form = "exact"
    decimals: int | None = None
    """Precision that the benchmark states for numbers."""
    box: "Box | None" = field(default=None, repr=False)
    """Box in pixels that must be found beside the right choice."""

    def __str__(self) -> str:
        return self.letter or self.text or ""


@dataclass(frozen=True)
class Grade:
    """The parsed answer of a response and its correctness."""

    kind: Kind
    letter: str | None
    text: str | None
    is_correct: bool
    score: float | None = None
    """Credit from 0 to 1 where the form has degrees; correct is what has all of it."""
    facts: dict[str, Any] | None = None
    """What else the benchmark's own rule needs of an answer."""


def resolve_reference(value: Any, kind: str, choices: Sequence[str]) -> Reference:
    """Return the reference that a cell of the answer column means; `kind` is a benchmark's ReferenceKind.

    Errors: ValueError for an empty cell, or one that must name a choice and names none.
    """
    text = "" if value is None else str(value).strip()
    if not text:
        raise ValueError("the answer column is empty")
    if kind == "flag":
        if text not in ("0", "1"):
            raise ValueError(f"answer {value!r} is neither 0 nor 1")
        return Reference("A" if text == "1" else "B", "Yes" if text == "1" else "No")
    if kind == "index":
        if not text.isdecimal() or int(text) >= len(choices):
            raise ValueError(f"answer {value!r} is no index of the {len(choices)} choices")
        return Reference(LETTERS[int(text)], choices[int(text)])
    if choices and kind != "value":
        exact = [i for i, choice in enumerate(choices) if choice.strip() == text]
        by_text = [i for i, choice in enumerate(choices) if normalize(choice) == normalize(text)]
        bare = re.fullmatch(r"\(?([A-Za-z])\)?[.:]?", text)
        # A choice's own text goes before the reading as a letter: among the choices d, c, b "b" is the third; but "C"
        # is written as no choice, so it is the letter.
        if len(exact) == 1:
            index = exact[0]
        elif bare and bare[1] in LETTERS[: len(choices)]:
            index = LETTERS.index(bare[1])
        elif len(by_text) == 1:
            index = by_text[0]
        elif bare and bare[1].upper() in LETTERS[: len(choices)]:
            index = LETTERS.index(bare[1].upper())
        elif isinstance(value, int) and 0 <= value < len(choices):
            index = value
        elif (choice := extract_choice(text, choices)).kind == "letter" and choice.letter:
            index = LETTERS.index(choice.letter)
        elif kind == "choice_or_value":
            return Reference(None, text)
        else:
            raise ValueError(f"answer {value!r} names none of the choices {list(choices)}")
        return Reference(LETTERS[index], choices[index])
    if kind == "choice":
        raise ValueError("no choices in the row")
    bare = re.fullmatch(r"\(?([A-Z])\)?|\(([a-z])\)", text)
    return Reference((bare[1] or bare[2]).upper(), None) if bare else Reference(None, text)


def grade_response(
    response: str, choices: Sequence[str], reference: Reference, finish_reason: str | None = None
) -> Grade:
    """Return the grade of a complete model text."""
    answer = find_answer(response, finish_reason)
    is_open = reference.letter is None and reference.text is not None
    if answer is None:
        score = 0.0 if is_open and reference.form != "exact" else None
        return Grade("truncated" if finish_reason == "length" else "unparsed", None, None, False, score)
    if is_open and reference.form in SCORES:
        score = SCORES[reference.form](answer, reference.text or "")
        return Grade("unparsed" if score is None else "number", None, answer, score == 1, score or 0.0)
    if reference.letter is None and reference.text is not None:
        return _grade_value(answer, choices, reference.text, reference.decimals)
    choice = extract_choice(answer, choices)
    is_correct = choice.letter is not None and choice.letter == reference.letter
    return Grade(choice.kind, choice.letter, choice.text, is_correct)


def _grade_value(answer: str, choices: Sequence[str], reference: str, decimals: int | None) -> Grade:
    if choices:  # the reference is none of the choices, so a letter cannot be right, but its text may be
        choice = extract_choice(answer, choices)
        answer = choice.text or answer
    kind, is_correct = grade_open(answer, reference, decimals)
    return Grade(kind, None, answer, is_correct)


def _score_number(answer: str, reference: str) -> float | None:
    number = read_number(answer)
    return None if number is None else mean_relative_accuracy(number, float(reference))


def _score_count(answer: str, reference: str) -> float | None:
    """Return 1 - |x - true| / true, at least 0."""
    number, true = read_number(answer), float(reference)
    return None if number is None else max(0.0, 1 - abs(number - true) / abs(true)) if true else float(number == 0)


_MOVE = re.compile(r"(move|rotate)_(right|left|forward|backward|up|down)\s?:\s?(-?\d+(?:\.\d+)?)")
_AXES = {"left": ("right", -1.0), "backward": ("forward", -1.0), "down": ("up", -1.0)}


def _read_moves(text: str) -> dict[str, float]:
    """Return the camera's move along each axis, opposite directions taken together."""
    axes: dict[str, float] = dict.fromkeys(("move right", "move up", "move forward", "rotate right", "rotate up"), 0.0)
    for kind, direction, amount in _MOVE.findall(text):
        axis, sign = _AXES.get(direction, (direction, 1.0))
        if f"{kind} {axis}" in axes:
            axes[f"{kind} {axis}"] += sign * float(amount)
    return axes


def _score_moves(answer: str, reference: str) -> float | None:
    """Return the mean relative accuracy over five axes."""
    if not _MOVE.search(answer):
        return None
    found, wanted = _read_moves(answer), _read_moves(reference)
    return sum(mean_relative_accuracy(found[axis], wanted[axis]) for axis in wanted) / len(wanted)


SCORES: dict[str, Callable[[str, str], float | None]] = {
    "relative": _score_number,
    "count": _score_count,
    "moves": _score_moves,
}
"""Form of an answer -> its credit by the text alone, None for an answer that was not read."""

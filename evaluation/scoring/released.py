"""The answer rule of the released evaluation, with its faults, so that its figures can be reproduced and compared.

What is known to be wrong with it: among choices, whatever is neither `(X) text` nor a choice's exact text is taken
for an A, silence too, so that a bare letter is right exactly where the answer is A; references longer than one
character are cut to their first; units are deleted before open answers are compared. Its symbolic algebra on open
answers is left out: it can hang, and decides only where two expressions differ in their form.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

NO_ANSWER = "Failed to extract."
_UNITS = re.compile(
    r"(?=[cdfhimpsuwy])\b(?:degrees?|cm|centimeters?|meters?|miles?|seconds?|minutes?|hours?|days?|weeks?|months?|years?|feet|foot|"
    r"inch(?:es)?|yards?|points?|units?)\b"
)


@dataclass(frozen=True)
class ReleasedGrade:
    """The released rule's prediction and its correctness."""

    prediction: str
    is_correct: bool


def grade_as_released(
    response: str, answer_cell: str, choices: Sequence[str], is_multiple_choice: bool
) -> ReleasedGrade:
    """Return the grade; `answer_cell` is the answer column as it is written.

    `is_multiple_choice` is True for a benchmark that maps answers to letters, as most do.
    """
    prediction = _extract_answer(response)
    reference = answer_cell.strip()
    if prediction is None:
        return ReleasedGrade(NO_ANSWER, False)
    if is_multiple_choice:
        reference = reference.replace("(", "").replace(")", "").strip()
        if choices:
            reference = reference if len(reference) == 1 else reference[:1].lower()
            prediction = _map_to_letter(prediction, choices)
    elif reference in choices:
        reference = "ABCDEFGHIJ"[choices.index(reference)] if choices.index(reference) < 10 else reference
    return ReleasedGrade(prediction, _is_equal(reference, prediction))


def _extract_answer(response: str) -> str | None:
    """Return what stands for the answer, "" for empty tags; None only for an empty response."""
    text = response
    if "Answer:" in text:
        text = text.rpartition("Answer:")[2].strip()
    if not text:
        return None
    if "<answer>" not in text:
        text = text.partition("</answer>")[0]
    return text.rpartition("<answer>")[2].partition("</answer>")[0].strip()


def _map_to_letter(prediction: str, choices: Sequence[str]) -> str:
    text = re.sub(r"^\([A-Za-z]\) ", "", prediction).replace("{", "").replace("}", "").strip().lower()
    lowered = [choice.lower() for choice in choices]
    return chr(ord("A") + lowered.index(text)) if text in lowered else "A"


def _is_equal(reference: str, prediction: str) -> bool:
    if reference.lower() == prediction.lower():
        return True
    if _without_units(reference) == _without_units(prediction) != "":
        return True
    inner = prediction
    if "(" in prediction and ")" in prediction:
        inner = prediction.partition("(")[2].partition(")")[0]
    return inner.removesuffix(".").strip().lower() == reference.strip().lower()


def _without_units(text: str) -> str:
    head, brace, tail = text.lower().rpartition("}")  # where each opening brace is closed the search is linear
    text = re.sub(r"\\text\{([^}]*)\}", r"\1", head + brace) + tail
    return "".join(_UNITS.sub("", text.replace("$", "").replace("%", "").replace(",", "")).split())

"""Rewards on format and answer alone: r1v (the vanilla GRPO baseline), r1v_scene and math.

overall = (1 - format_weight) * accuracy + format_weight * format
"""

from collections.abc import Sequence

from spatialthinker.response import is_four_sections, is_think_answer, section
from spatialthinker.rewards.equality import is_equal_answer
from spatialthinker.rewards.record import RewardInput

R1V_FORMAT_WEIGHT = 0.5
R1V_SCENE_FORMAT_WEIGHT = 0.5
MATH_FORMAT_WEIGHT = 0.1
"""Weights of the format term in the released rewards."""


def _weighted(format_score: float, accuracy: float, format_weight: float) -> dict[str, float]:
    overall = (1.0 - format_weight) * accuracy + format_weight * format_score
    return {"overall": overall, "format": format_score, "accuracy": accuracy}


def r1v(inputs: Sequence[RewardInput], *, format_weight: float = R1V_FORMAT_WEIGHT) -> list[dict[str, float]]:
    """Returns overall, format and accuracy of each response.

    format: the text is exactly a think block, optional blanks and an answer block. accuracy: the answer, the
    content of the first pair of answer tags within one line, else the whole response, equals the ground truth
    (the content of its answer tags if it has some) under `is_equal_answer`.
    """
    return [
        _weighted(
            float(is_think_answer(item.response)),
            float(is_equal_answer(_one_line_answer(item.response), _one_line_answer(item.ground_truth))),
            format_weight,
        )
        for item in inputs
    ]


def _one_line_answer(text: str) -> str:
    if "<answer>" in text:
        for line in text.split("\n"):
            answer = section(line, "answer")
            if answer is not None:
                return answer
    return text


def r1v_scene(
    inputs: Sequence[RewardInput], *, format_weight: float = R1V_SCENE_FORMAT_WEIGHT
) -> list[dict[str, float]]:
    """Returns overall, format and accuracy of each response, all 0 unless the format holds.

    format: the text is exactly the observe, scene, think and answer blocks in this order, blanks between them.
    accuracy: the text in the answer tags equals the ground truth's, blanks around it and case aside.
    """
    results = []
    for item in inputs:
        is_formatted = is_four_sections(item.response)
        is_right = is_formatted and is_same_text(
            section(item.response, "answer"), section(item.ground_truth, "answer")
        )
        results.append(_weighted(float(is_formatted), float(is_right), format_weight))
    return results


def is_same_text(answer: str | None, truth: str | None) -> bool:
    """True for answers of the same text up to case and surrounding blanks; False where one is missing or empty."""
    if answer is None or truth is None:
        return False
    answer = answer.strip()
    return bool(answer) and answer.lower() == truth.strip().lower()


def math(inputs: Sequence[RewardInput], *, format_weight: float = MATH_FORMAT_WEIGHT) -> list[dict[str, float]]:
    r"""Returns overall, format and accuracy of each response.

    format: a think block opens the text and a \boxed{...} follows it. accuracy: the content of the last \boxed{}
    equals the ground truth under `is_equal_answer`; no box, no accuracy.
    """
    results = []
    for item in inputs:
        text = _without_blanks_at_tags(item.response)
        boxed = last_boxed(text)
        is_right = boxed is not None and is_equal_answer(boxed, item.ground_truth)
        results.append(_weighted(float(_is_think_boxed(text)), float(is_right), format_weight))
    return results


def _without_blanks_at_tags(text: str) -> str:
    """Returns the text without the blanks on both sides of every `<`, `>` and `/`."""
    for mark in "<>/":
        first, *rest = text.split(mark)
        if rest:
            text = mark.join([first.rstrip(), *(part.strip() for part in rest[:-1]), rest[-1].lstrip()])
    return text


def _is_think_boxed(text: str) -> bool:
    if not text.startswith("<think>"):
        return False
    position = len("<think>")
    for mark in ("</think>", "\\boxed{", "}"):
        position = text.find(mark, position)
        if position < 0:
            return False
        position += len(mark)
    return True


def last_boxed(text: str) -> str | None:
    r"""Returns the content of the last `\boxed{...}`, braces inside it balanced, or None."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for position in range(start, len(text)):
        depth += (text[position] == "{") - (text[position] == "}")
        if depth == 0:
            return text[start:position]
    return None

"""Reward of multiple choice, with the reader that the evaluation has.

    overall = [the answer names the right option and no other]

Source: accuracy on multiple-choice rows, https://arxiv.org/abs/2511.07403, section on the reward, with an answer read
by an order of evidence instead of by equal text: "(B) left of it", "B", "left of it" and "The answer is B." are one.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from spatialthinker.response import extract_choice
from spatialthinker.rewards.answers import read_answer
from spatialthinker.rewards.options import true_choice
from spatialthinker.rewards.record import RewardInput
from spatialthinker.rewards.truths import decode_truth, truth_text


def choice(inputs: Sequence[RewardInput]) -> list[dict[str, float]]:
    """Returns 1 for each response that names the right option, 0 for another, several or none.

    The ground truth is a letter, a letter with its text, or an option's text, whose options the prompt states as (A),
    (B), ..., or {"answer": "B", "options": ["left", "right"]}. Letter and text of different options score 0.
    """
    results = []
    for item in inputs:
        letter, options = true_choice(item.ground_truth, item.problem)
        found = extract_choice(read_answer(item.response), options)
        results.append({"overall": float(found.letter == letter and found.kind != "conflict")})
    return results


def check_choice(ground_truth: Any, problem: str = "") -> None:
    """Raises ValueError for a ground truth that names no option, or several."""
    true_choice(ground_truth, problem)


def gold_choice(ground_truth: Any) -> str:
    """Returns the answer that names the right option as the ground truth does."""
    text = truth_text(ground_truth)
    return decode_truth(text)["answer"] if text.startswith("{") else text


def explain_choice(item: RewardInput) -> Iterator[str]:
    """Yields lines on the options and what was read."""
    letter, options = true_choice(item.ground_truth, item.problem)
    answer = read_answer(item.response)
    found = extract_choice(answer, options)
    yield f"options:  {', '.join(options) or 'not stated'}"
    yield f"answer:   {answer[:80]!r}, read as {found.letter} by {found.kind}, true {letter}"

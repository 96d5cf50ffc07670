"""Reward of an answer that follows from the response's own scene.

    overall = [the option that geometry leads to in the response's scene is the one that it names]

1 also where the question is of a kind that no scene decides: nothing is contradicted then. It reads no truth, so
it is a gate or a part of a sum with one that does. Source: the consistency constraint of
https://arxiv.org/abs/2604.08476, section on consistency, decided by the boxes instead of by a judge.
"""

from collections.abc import Iterator, Sequence

from spatialthinker.answer_grammar import LETTERS
from spatialthinker.response import extract_choice, parse_response
from spatialthinker.rewards.answers import read_answer
from spatialthinker.rewards.coordinates import stated_size
from spatialthinker.rewards.options import stated_options
from spatialthinker.rewards.record import RewardInput
from spatialthinker.scene_answers import SceneAnswer, answer_from_scene
from spatialthinker.scene_graph import parse_scene


def follows_scene(inputs: Sequence[RewardInput], *, undecided: float = 0.0) -> list[dict[str, float]]:
    """Returns 1 for each response whose answer its own scene leads to, `undecided` where the scene leaves it open.

    A response without a readable scene, or that names no option, scores 0. The prompt states question and options.
    """
    results = []
    for item in inputs:
        letter, decided = _read(item)
        if letter is None:
            score = 0.0
        elif decided is None:
            score = 1.0
        else:
            score = undecided if decided.index is None else float(LETTERS[decided.index] == letter)
        results.append({"overall": score})
    return results


def explain_follows_scene(item: RewardInput) -> Iterator[str]:
    """Yields a line on the answer and what the scene leads to."""
    letter, decided = _read(item)
    option = None if decided is None or decided.index is None else LETTERS[decided.index]
    yield f"answer:   {letter}, the scene leads to {option} ({decided.kind if decided else 'no kind that it decides'})"


def _read(item: RewardInput) -> tuple[str | None, SceneAnswer | None]:
    """Returns the letter that a response names, None without a scene, and the option that its scene leads to."""
    scene, options = parse_scene(parse_response(item.response).scene_text), stated_options(item.problem)
    letter = extract_choice(read_answer(item.response), options).letter if scene is not None else None
    if scene is None or letter is None:
        return None, None
    question = item.problem.rpartition("Q. ")[2]
    return letter, answer_from_scene(scene, question, options, stated_size(item.problem))

"""The options of a multiple-choice row, from its ground truth or from its prompt."""

import re
from functools import lru_cache
from typing import Any, NamedTuple

from spatialthinker.answer_grammar import LETTERS, normalize
from spatialthinker.response import extract_choice
from spatialthinker.rewards.truths import bad_truth, decode_truth, truth_text

_LABEL = re.compile(r"([(A-Z])(?<!\S.)(?:(?<=\()([A-Z])\)|(?<!\()[.):])[ \t]+(?=\S)")
"""(A), A. or A: after a blank. The set of signs in front lets the search leap over all others."""
MAX_PROMPT_CHARS = 20_000


class TrueChoice(NamedTuple):
    """The right letter of a row and its options, () where they are not known."""

    letter: str
    options: tuple[str, ...]


@lru_cache(maxsize=2048)
def stated_options(problem: str) -> tuple[str, ...]:
    """Returns the texts of the last options (A), (B), ... or A., B., ... of a prompt, () for fewer than two."""
    text = problem[-MAX_PROMPT_CHARS:]
    labels = [(match[2] or match[1], match.start(), match.end()) for match in _LABEL.finditer(text)]
    for first in reversed([i for i, (letter, _, _) in enumerate(labels) if letter == "A"]):
        run = [label for label, letter in zip(labels[first:], LETTERS, strict=False) if label[0] == letter]
        run = run[: next((i for i, label in enumerate(run) if label is not labels[first + i]), len(run))]
        if len(run) > 1:
            ends = [start for _, start, _ in run[1:]] + [len(text)]
            options = [text[start:end].strip() for (_, _, start), end in zip(run, ends, strict=True)]
            options[-1] = options[-1].split("\n")[0].strip()
            return tuple(options) if all(options) else ()
    return ()


def true_choice(ground_truth: Any, problem: str) -> TrueChoice:
    """Returns the right letter and the options.

    The ground truth is a letter, a letter with its text, or an option's text, whose options the prompt states, or
    {"answer": ..., "options": [...]}. Raises ValueError where it names none of the options, or several.
    """
    return _true_choice(truth_text(ground_truth), problem)


@lru_cache(maxsize=2048)
def _true_choice(text: str, problem: str) -> TrueChoice:
    options, answer = (), text
    if text.startswith("{"):
        struct = decode_truth(text)
        answer = struct.get("answer") if isinstance(struct, dict) else None
        options = struct.get("options", ()) if isinstance(struct, dict) else ()
        is_list = isinstance(options, list | tuple) and all(isinstance(option, str) for option in options)
        if not isinstance(answer, str) or not is_list or not 2 <= len(options) <= len(LETTERS):
            raise bad_truth('is a dictionary without "answer" and two or more "options"', text)
    options = tuple(options) or stated_options(problem)
    texts = [normalize(option) for option in options]
    if len(answer) == 1 and answer in LETTERS[: len(options)] and answer.lower() not in texts:
        return TrueChoice(answer, options)
    if answer.startswith("[") or (answer.isdecimal() and answer not in texts):
        raise bad_truth("is a list or an index where a letter or an option's text is read", text)
    found = extract_choice(answer, options)
    if found.letter is None or found.kind == "conflict":
        among = f" of {', '.join(options)}" if options else "; the prompt states no options (A), (B), ..."
        raise bad_truth(f"names no choice{among}", text)
    return TrueChoice(found.letter, options)

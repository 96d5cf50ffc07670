"""The shortcuts before the rules of the answer grammar change no outcome."""

import json
import random
import re
from pathlib import Path

import pytest

from spatialthinker import answer_grammar, response
from spatialthinker.answer_marks import may_be_open, may_judge, may_state

RULES = {
    "statement": (may_state, answer_grammar._STATEMENT),
    "verdict": (may_judge, answer_grammar._VERDICT),
    "open end": (may_be_open, answer_grammar._UNDECIDED),
}
JOINTS = (" ", " ", " ", " ", ", ", ". ", ": ", "\n", "", "-", "' ", "? ", "! ", "/", " (", ") ", ";", "\t")
CHOICES = ("A", "B", "(B)", "(a)", "b", "C.", "D:", "(C) left of it", "left of it", "right", "A ", "cat", "50", "3")
OPTIONS = (["left of it", "right", "cat", "dog"], ["A", "B"], ["yes", "no"], ["3", "50", "two"], [])
CAREFUL = Path(__file__).parents[1] / "support" / "careful_answers.jsonl"


def words_of(pattern: re.Pattern[str]) -> list[str]:
    """Return the words that a pattern's text holds, escapes aside, whole and with their endings."""
    text = re.sub(r"\\.|\{\d*,?\d*\}", " ", pattern.pattern)
    return sorted({word for word in re.findall(r"[A-Za-z']+", text) if len(word) < 20})


def random_text(rng: random.Random, words: list[str]) -> str:
    parts = (rng.choice(CHOICES) if rng.random() < 0.35 else rng.choice(words) for _ in range(rng.randrange(1, 9)))
    text = "".join(part + rng.choice(JOINTS) for part in parts)
    return rng.choice((text, text.strip(), text.upper(), text.capitalize()))


@pytest.mark.parametrize("name", RULES)
def test_a_text_without_the_words_matches_no_rule(name):
    may_match, pattern = RULES[name]
    words, rng = words_of(pattern), random.Random(4)
    texts = [random_text(rng, words) for _ in range(6_000)]
    left_out = [text for text in texts if not may_match(text)]
    assert len(left_out) > 50
    assert not [text for text in left_out if pattern.search(text)]
    assert sum(pattern.search(text) is not None for text in texts) > 20  # or nothing would be shown


def plain_choice(answer, options, monkeypatch):
    """The choice that the rules alone make, without shortcuts and caches."""
    with monkeypatch.context() as patch:
        for name in ("may_state", "may_judge", "may_be_open"):
            patch.setattr(answer_grammar, name, lambda text: True)
        patch.setattr(answer_grammar, "_normalize_short", answer_grammar._normalize)
        patch.setattr(response, "_reader", response._Reader)
        return response._extract_choice(answer, tuple(options))


def test_recorded_answers_are_read_as_without_the_shortcuts(monkeypatch):
    for row in map(json.loads, CAREFUL.open()):
        text, options = row["text"], row.get("choices", [])
        plain = plain_choice(text, options, monkeypatch)
        assert response.extract_choice(text, options) == plain == response.extract_choice(text, tuple(options))


def test_random_answers_are_read_as_without_the_shortcuts(monkeypatch):
    rng = random.Random(6)
    words = sorted({word for _, pattern in RULES.values() for word in words_of(pattern)})
    kinds = []
    for _ in range(1_500):
        options = rng.choice(OPTIONS)
        answer = random_text(rng, [*words, *options] if options else words)
        kinds.append(response.extract_choice(answer, options).kind)
        assert response.extract_choice(answer, options) == plain_choice(answer, options, monkeypatch), answer
    assert {"letter", "text", "conflict", "unparsed"} <= set(kinds)

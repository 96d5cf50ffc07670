"""A question before it is a row, and how its options read."""

import re
from dataclasses import dataclass
from typing import Any

from spatialthinker.scene_graph import Relation

QUESTION = ("question", "options", "answer_index", "category", "level", "rating")
"""Fields that a draft, a record and a row have in common."""

_LETTERED = re.compile(r"\s*[\[(]?\s*([A-Ha-h])\s*[\]).:]\s*(?=\S)")


@dataclass(frozen=True)
class Draft:
    """One multiple-choice question on a scene and the evidence it rests on."""

    category: str
    level: str
    question: str
    options: tuple[str, ...]
    """Texts without letters."""
    answer_index: int
    rating: int
    evidence: tuple[str, ...]
    """Ids of the objects that the question is about; together with `relations` the reference scene."""
    relations: tuple[Relation, ...] = ()

    @property
    def answer(self) -> str:
        return self.options[self.answer_index]


def question_of(item: Any) -> dict[str, Any]:
    """The common fields of a draft or a record."""
    return {name: getattr(item, name) for name in QUESTION}


def strip_letters(options: list[str]) -> list[str]:
    """Option texts without letters: "(A) on", "a) on", "A. on" and "A: on" become "on" where every option has one."""
    found = [_LETTERED.match(text) for text in options]
    if options and all(found):
        return [text[match.end() :].strip() for text, match in zip(options, found, strict=True) if match]
    return [text.strip() for text in options]

"""Choices of a question, from columns, lists in a cell, or the question's own text."""

import ast
import bisect
import json
import re
from typing import Any

from evaluation.benchmarks.benchmark import Benchmark
from spatialthinker.answer_grammar import LETTERS

_CHOICE_MARK = re.compile(r"(?<!\w)\(?([A-Z])[).:]\s+")
_MAX_CHOICES_CHARS = 50_000
"""A longer question is searched for its choices at its end alone; a longer Python literal is no list."""
_QUOTED = re.compile(r"""[\s,]*+('(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+")""", re.DOTALL)


def read_choices(benchmark: Benchmark, row: dict[str, Any], question: str) -> tuple[str, ...]:
    """Return the choices of a row, without letters. Errors: ValueError for a cell that lists them in no known way."""
    if benchmark.has_choices_in_question:
        return find_choices(question)
    if benchmark.choice_columns:
        cells = [row[column] for column in benchmark.choice_columns]
        filled = [cell for cell in cells if cell is not None and str(cell).strip()]
        if cells[: len(filled)] != filled:
            raise ValueError(f"a choice is missing before another one in {', '.join(benchmark.choice_columns)}")
        return tuple(str(cell) for cell in filled)
    if benchmark.choices is None:
        return benchmark.fixed_choices
    cell = row[benchmark.choices]
    is_lettered = isinstance(cell, str) and not cell.lstrip().startswith("[")
    choices = find_choices(cell) if is_lettered else parse_list(cell)
    if is_lettered and cell.strip() and not choices:
        raise ValueError(f"{cell!r} is no list and names no lettered choices")
    if len(choices) > len(LETTERS):
        raise ValueError(f"{len(choices)} choices, at most {len(LETTERS)} have a letter")
    return _strip_letters(choices)


def find_choices(question: str) -> tuple[str, ...]:
    """Return the choices that a question lists as "A: ...", "(A) ..." or "A. ..."; () where it lists none."""
    question = question[-_MAX_CHOICES_CHARS:]
    marks: dict[str, list[re.Match[str]]] = {letter: [] for letter in LETTERS}
    for mark in _CHOICE_MARK.finditer(question):
        marks[mark[1]].append(mark)
    for start in reversed(marks["A"]):
        chosen = [start]
        for letter in LETTERS[1:]:
            following = bisect.bisect_left(marks[letter], chosen[-1].end(), key=re.Match.start)
            if following == len(marks[letter]):
                break
            chosen.append(marks[letter][following])
        if len(chosen) == 1:
            continue
        ends = [mark.start() for mark in chosen[1:]] + [len(question)]
        texts = [
            question[mark.end() : end].split("\n")[0].rstrip(" ,;") for mark, end in zip(chosen, ends, strict=True)
        ]
        return tuple(texts)
    return ()


def parse_list(value: Any) -> tuple[str, ...]:
    """Return the texts of a list that may be written as JSON, as a Python literal or as numpy prints it.

    In the last, `['a' 'b']`, no comma stands between the elements: Python alone would read one text "ab".
    Errors: ValueError for anything else.
    """
    if value is None:
        return ()
    if not isinstance(value, str):
        elements = list(value)
        while elements and elements[-1] is None:
            elements.pop()
        if None in elements:
            raise ValueError(f"{value!r} has an empty element before another one")
        return tuple(str(element) for element in elements)
    text = value.strip()
    if not text:
        return ()
    if not (text.startswith("[") and text.endswith("]")):
        raise ValueError(f"{value!r} is no list")
    try:
        return tuple(str(element) for element in json.loads(text))
    except (json.JSONDecodeError, RecursionError):
        pass
    if len(text) > _MAX_CHOICES_CHARS:
        raise ValueError(
            f"a cell of {len(text)} characters is no list; the limit is {_MAX_CHOICES_CHARS}, but for JSON"
        )
    try:
        if (strings := _split_strings(text[1:-1])) is not None:
            return tuple(str(ast.literal_eval(string)) for string in strings)
        return tuple(str(element) for element in ast.literal_eval(text))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{value!r} is no list") from error


def _split_strings(text: str) -> list[str] | None:
    """Return the quoted strings of a text that holds nothing else but commas and blanks between them, or None."""
    strings, position = [], 0
    while piece := _QUOTED.match(text, position):
        strings.append(piece[1])
        position = piece.end()
    return strings if strings and not text[position:].strip(" ,\t\r\n") else None


def _strip_letters(choices: tuple[str, ...]) -> tuple[str, ...]:
    """Drop the letters of choices that all carry their own, such as "(A) dog"."""
    found = [re.match(rf"\(?{LETTERS[i]}[).:]\s+(?=\S)", text) for i, text in enumerate(choices)]
    if choices and all(found):
        return tuple(text[match.end() :] for text, match in zip(choices, found, strict=True) if match)
    return choices

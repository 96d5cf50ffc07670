"""Counts of a data set as tables for the terminal, the card and the report."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from data_gen.questions.records import Record
from spatialthinker.schema import CATEGORIES, LETTERS, LEVELS, RATINGS

Table = list[tuple[str, int, float]]
"""Name, number, percent."""


def tables(records: Iterable[Record]) -> dict[str, Table]:
    """Number and percent of records by category, level, rating, right letter and number of options."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in _READERS}
    total = 0
    for record in records:
        total += 1
        for name, read in _READERS.items():
            counts[name][read(record)] += 1
    return {
        name: [(value, counts[name][value], 100 * counts[name][value] / max(total, 1)) for value in known]
        + [(value, n, 100 * n / total) for value, n in sorted(counts[name].items()) if value not in known]
        for name, known in _KNOWN.items()
    }


_READERS: dict[str, Callable[[Record], str]] = {
    "category": lambda record: record.category,
    "level": lambda record: record.level,
    "rating": lambda record: str(record.rating),
    "letter": lambda record: LETTERS[record.answer_index],
    "options": lambda record: str(len(record.options)),
}
_KNOWN: dict[str, Sequence[str]] = {
    "category": CATEGORIES,
    "level": LEVELS,
    "rating": tuple(map(str, RATINGS)),
    "letter": LETTERS,
    "options": ("2", "3", "4"),
}


def format_tables(found: dict[str, Table]) -> str:
    """The tables as text."""
    blocks = []
    for name, table in found.items():
        lines = [f"  {value:<18}{number:>8}{percent:>7.1f} %" for value, number, percent in table]
        blocks.append("\n".join([name, *lines]))
    total = sum(number for _, number, _ in next(iter(found.values())))
    return "\n".join([f"{total} rows", *blocks])


def markdown_table(name: str, table: Table) -> str:
    """One table as Markdown."""
    rows = [f"| {value} | {number} | {percent:.1f} % |" for value, number, percent in table]
    return "\n".join([f"| {name} | rows | share |", "|---|---|---|", *rows])

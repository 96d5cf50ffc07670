"""Counts of a data set as tables for the terminal, the card and the report."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from data_gen.questions.records import Record
from spatialthinker.schema import CATEGORIES, LETTERS, LEVELS, RATINGS

Table = list[tuple[str, int, float]]
"""Name, number, percent."""


_COLUMNS: dict[str, tuple[Callable[[Record], str], Sequence[str]]] = {
    "category": (lambda record: record.category, CATEGORIES),
    "level": (lambda record: record.level, LEVELS),
    "rating": (lambda record: str(record.rating), tuple(map(str, RATINGS))),
    "letter": (lambda record: LETTERS[record.answer_index] if record.options else "open", LETTERS),
    "options": (lambda record: str(len(record.options)), ("2", "3", "4")),
}
"""Name of a table -> its column of a record, and the values that are always shown."""


def tables(records: Iterable[Record]) -> dict[str, Table]:
    """Number and percent of records by category, level, rating, right letter and number of options."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in _COLUMNS}
    for record in records:
        for name, (read, _) in _COLUMNS.items():
            counts[name][read(record)] += 1
    total = max(counts["category"].total(), 1)
    values = {name: [*known, *sorted(counts[name].keys() - set(known))] for name, (_, known) in _COLUMNS.items()}
    return {name: [(v, counts[name][v], 100 * counts[name][v] / total) for v in values[name]] for name in _COLUMNS}


def format_tables(found: dict[str, Table]) -> str:
    """The tables as text."""
    blocks = []
    for name, table in found.items():
        lines = [f"  {value:<18}{number:>8}{percent:>7.1f} %" for value, number, percent in table]
        blocks.append("\n".join([name, *lines]))
    total = sum(number for _, number, _ in next(iter(found.values())))
    return "\n".join([f"{total} rows", *blocks])

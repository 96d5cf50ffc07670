"""Labels of a data set's rows: source and category, by row id."""

from collections.abc import Callable
from typing import Any

from verl.config.checks import split_path

SOURCE_COLUMNS = ("source", "data_source", "dataset")
CATEGORY_COLUMNS = ("category", "question_type", "task")


def label_rows(files: Any, prompts: Any) -> Callable[[str], tuple[str | None, str | None]]:
    """(source, category) of a row id, for the prompts of one path or of several sources."""
    sets = getattr(prompts, "sets", None)
    if sets is None:
        return RowLabels(files, prompts.rows)
    labels = {own.source: RowLabels(own.source, own.rows) for own in sets}

    def find(uid: str) -> tuple[str | None, str | None]:
        source = next((name for name in labels if uid.startswith(f"{name} ")), None)
        return (None, None) if source is None else (source, labels[source](uid[len(source) + 1 :])[1])

    return find


class RowLabels:
    """Source and category of rows, read at the first use.

    Args:
        locator: of the data set; its name is the source of rows that state none.
        rows: of `datasets`; None for rows of which nothing is known.
    """

    def __init__(self, locator: str, rows: Any = None):
        name = split_path(locator, "@")[0].rstrip("/").rpartition("/")[2]
        self.source = name.rpartition(".")[0] or name or None
        self.rows = rows
        self.columns: list[list[Any] | None] | None = None

    def __call__(self, uid: str) -> tuple[str | None, str | None]:
        """(source, category) of the row with this id, which begins with its number in the data set."""
        if self.columns is None:
            self.columns = [self._column(names) for names in (SOURCE_COLUMNS, CATEGORY_COLUMNS)]
        sources, categories = self.columns
        number = uid.partition(" ")[0]
        source = _cell(sources, number)
        return self.source if source is None else source, _cell(categories, number)

    def _column(self, names: tuple[str, ...]) -> list[Any] | None:
        if self.rows is None:
            return None
        name = next((name for name in names if name in self.rows.column_names), None)
        return None if name is None else list(self.rows.select_columns([name])[:][name])


def _cell(column: list[Any] | None, number: str) -> str | None:
    if column is None or not number.isdigit() or int(number) >= len(column):
        return None
    value = column[int(number)]
    return None if value is None else str(value)

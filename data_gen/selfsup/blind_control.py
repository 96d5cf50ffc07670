"""Blind control: a small classifier that sees only traces of a row must not find its answer.

Traces are what a row shows beside its picture's content: lines at the border, the 8 x 8 grid of JPEG, the size of file
and image, the name, the order of the options. A ridge regression on them predicts answers of pictures that it has not
seen, and its number of right ones is held against chance by the binomial distribution. Pictures whose content tells
nothing of place and direction make it a test of the generator; with photographs, a bright sky at the border is
content.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

Row = Mapping[str, Any]
LEVEL = 1e-4
"""A task fails where chance would give so many right answers with at most this probability."""
FOLDS = 4
RIDGE = 30.0
"""Weight of the penalty, in rows, for features of variance 1."""
BORDER_LINES = 4
_GRID = 8
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Verdict:
    """Right answers of a task's rows, with those that chance gives."""

    task: str
    num_rows: int
    num_right: int
    chance: float
    """Mean share of right answers by chance."""

    @property
    def p_value(self) -> float:
        """Probability of at least so many right answers by chance."""
        from scipy.stats import binom

        return float(binom.sf(self.num_right - 1, self.num_rows, self.chance))

    @property
    def is_passed(self) -> bool:
        return self.p_value > LEVEL

    def __str__(self) -> str:
        share = self.num_right / max(self.num_rows, 1)
        return (
            f"{self.task}: {share:.1%} of {self.num_rows} right, {self.chance:.1%} by chance, p = {self.p_value:.2g}"
        )


def blind_control(rows: Sequence[Row]) -> list[Verdict]:
    """The verdict for each task of the rows, which hold the columns of `export_schema(has_rewards=True)`.

    A question with options is tried by its letter and by its texts. Tasks with fewer than 8 rows are left out.
    """
    verdicts = []
    for task in sorted({row["model"] for row in rows}):
        chosen = [row for row in rows if row["model"] == task]
        if len(chosen) >= 2 * FOLDS:
            features = np.stack([trace_features(row) for row in chosen])
            folds = np.array([_fold(row) for row in chosen])
            for name, candidates, truths in _targets(task, chosen):
                verdicts.append(_judge(name, features, folds, candidates, truths))
    return verdicts


def trace_features(row: Row) -> np.ndarray:
    """The traces of a row [F]."""
    data = row["images"]["bytes"]
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.asarray(image.convert("RGB"), np.float32)
    height, width = pixels.shape[:2]
    sizes = [np.log(len(data)), len(data) / (width * height), width, height]
    texts = list(row["options"]) + [""] * (4 - len(row["options"]))
    ranks = [sorted(texts).index(text) for text in texts] + [len(text) for text in texts]
    name = [float(ord(sign)) for sign in row["image_id"][-4:].rjust(4)]
    return np.array([*sizes, *ranks, *name, *_border(pixels), *_grid(pixels)], np.float64)


def _border(pixels: np.ndarray) -> list[float]:
    """Of each side: mean and deviation of its last lines, and how much they differ from those inside."""
    values: list[float] = []
    for turned in (pixels, pixels[::-1], pixels.transpose(1, 0, 2), pixels.transpose(1, 0, 2)[::-1]):
        last, inside = turned[:BORDER_LINES], turned[BORDER_LINES : 2 * BORDER_LINES]
        values += [*last.mean(axis=(0, 1)), float(last.std()), float(np.abs(last - inside).mean())]
        values += [float(np.abs(turned[0] - turned[1]).mean())]
    return values


def _grid(pixels: np.ndarray) -> list[float]:
    """Mean jump of grey at each of the eight phases in both directions, as a share of their mean.

    Of the whole sheet: its parts would show where a mark lies, which belongs to the question.
    """
    grey = pixels.mean(axis=2)
    values: list[float] = []
    for turned in (grey, grey.T):
        jumps = np.abs(turned[:, 2:-1] - turned[:, 1:-2] - (turned[:, 3:] - turned[:, :-3]) / 3).mean(axis=0)
        phases = np.array([jumps[phase::_GRID].mean() for phase in range(_GRID)])
        values += list(phases / max(float(phases.mean()), 1e-6))
    return values


def _fold(row: Row) -> int:
    """Rows of one picture share a fold."""
    return sum(row["image_id"].rpartition("#")[0].encode()) % FOLDS


def _targets(task: str, rows: Sequence[Row]) -> list[tuple[str, list[list[str]], list[str]]]:
    """Target of a prediction: a name, the candidates of each row and the true one."""
    if rows[0]["options"]:
        letters = [list("ABCD"[: len(row["options"])]) for row in rows]
        by_letter = (f"{task}, letter", letters, [row["answer_only"] for row in rows])
        texts = [list(row["options"]) for row in rows]
        return [by_letter, (f"{task}, text", texts, [row["answer_text_only"] for row in rows])]
    answers = [[float(number) for number in _NUMBER.findall(row["answer_only"])] for row in rows]
    if rows[0]["reward"] == "ordering":
        numbers = [[str(int(number)) for number in sorted(answer)] for answer in answers]
        return [(f"{task}, first", numbers, [str(int(answer[0])) for answer in answers])]
    places = np.array([_place(row, answer) for row, answer in zip(rows, answers, strict=True)])
    halves = places > np.median(places, axis=0)
    names = ("value",) if places.shape[1] == 1 else ("x", "y")
    either = [["False", "True"]] * len(rows)
    return [(f"{task}, {name}", either, [str(half) for half in halves[:, i]]) for i, name in enumerate(names)]


def _place(row: Row, answer: list[float]) -> list[float]:
    """A number, or the centre of the first box as a share of the image."""
    if len(answer) < 4:
        return answer[:1]
    with Image.open(io.BytesIO(row["images"]["bytes"])) as image:
        return [(answer[0] + answer[2]) / image.width, (answer[1] + answer[3]) / image.height]


def _judge(
    name: str, features: np.ndarray, folds: np.ndarray, candidates: Sequence[Sequence[str]], truths: Sequence[str]
) -> Verdict:
    classes = sorted({text for texts in candidates for text in texts})
    targets = np.array([[text == truth for text in classes] for truth in truths], np.float64)
    right = 0
    for fold in range(FOLDS):
        seen, held = folds != fold, folds == fold
        if seen.any() and held.any():
            scores = predict(features[seen], targets[seen], features[held])
            for row, score in zip(np.flatnonzero(held), scores, strict=True):
                best = max(candidates[int(row)], key=lambda text: score[classes.index(text)])
                right += best == truths[int(row)]
    chance = float(np.mean([1 / len(texts) for texts in candidates]))
    return Verdict(name, len(truths), right, chance)


def predict(features: np.ndarray, targets: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Ridge regression of targets [N, C] on standardised features [N, F] and their squares; scores [M, C].

    w = (X'X + a I)^-1 X'Y; Hoerl and Kennard, Ridge Regression, Technometrics 12 (1970).
    """
    mean, scale = features.mean(axis=0), features.std(axis=0) + 1e-9

    def expand(values: np.ndarray) -> np.ndarray:
        standard = np.clip((values - mean) / scale, -4, 4)
        return np.concatenate([standard, standard**2 - 1, np.ones((len(values), 1))], axis=1)

    known = expand(features)
    weights = np.linalg.solve(known.T @ known + RIDGE * np.eye(known.shape[1]), known.T @ targets)
    return expand(new) @ weights

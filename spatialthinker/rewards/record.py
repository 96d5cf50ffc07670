"""The one record that a reward reads."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class RewardInput:
    """A response and what it is scored against.

    `ground_truth` and `problem` are the row's columns; `problem` carries the line `Image size: (W x H)`.
    """

    response: str
    ground_truth: Any
    problem: str = ""
    response_length: int | None = None
    """Length of the response in tokens, where the trainer knows it."""

"""Checks of a step: what is worth looking at, each with its threshold and what usually causes it.

Values are logged as checks/NAME; one beyond its threshold gets a line in rollouts/checks.jsonl and, when it first is,
one on the terminal. They cost nothing beside a step: numbers that are there anyway, and signs that the recording has
read in the responses. Letters: G groups, n samples.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

NUM_FIRST = 3
"""Steps at a run's start whose mean length and entropy are the measure of later ones."""
NUM_STILL = 3
"""Steps over which a part must not have moved."""
MIN_TOLD = 16
"""Responses of which a sign must be known."""
HISTORY_FILE = "checks_history.jsonl"
FIRED_FILE = "checks.jsonl"


class Facts(NamedTuple):
    """Facts that later steps are compared with: mean length in tokens, entropy, least and most of each part."""

    length: float
    entropy: float | None
    parts: dict[str, list[float]]


@dataclass
class Seen:
    """Inputs of the checks.

    Attributes:
        scores: [G, n] overall; None where only data are looked at.
        truncated: share of responses at the length limit.
        signs: share of responses with a sign, of those of which it is known.
        history: facts of the run's steps, this one's last.
    """

    scores: Tensor | None = None
    truncated: float | None = None
    signs: Mapping[str, float] = field(default_factory=dict)
    history: Sequence[Facts] = ()


class Check(NamedTuple):
    """A check: its value, None where it cannot be told; the threshold; what was seen and what usually causes it."""

    value: Callable[[Seen], float | None]
    threshold: float
    message: str
    is_low: bool = False
    """True when it fires below the threshold."""

    def fires(self, value: float) -> bool:
        """True for a value beyond the threshold."""
        return value < self.threshold if self.is_low else value > self.threshold


def share_without_variance(seen: Seen) -> float | None:
    """Share of groups whose n scores are all equal."""
    if seen.scores is None or seen.scores.shape[1] < 2:
        return None
    return float((seen.scores == seen.scores[:, :1]).all(-1).float().mean())


def find_still_parts(history: Sequence[Facts]) -> list[str]:
    """Parts that had one value, other than 1, for all responses of the last NUM_STILL steps."""
    last = history[-NUM_STILL:]
    if len(last) < NUM_STILL:
        return []
    names = [name for name in last[-1].parts if not name.startswith("format_failure/")]
    values = {name: {value for facts in last for value in facts.parts.get(name, [])} for name in names}
    return [name for name, known in values.items() if len(known) == 1 and known != {1.0}]


def _growth(history: Sequence[Facts]) -> float | None:
    if len(history) <= NUM_FIRST:
        return None
    first = sum(facts.length for facts in history[:NUM_FIRST]) / NUM_FIRST
    return history[-1].length / first if first else None


def _entropy_left(history: Sequence[Facts]) -> float | None:
    known = [facts.entropy for facts in history[:NUM_FIRST] if facts.entropy is not None]
    if len(history) <= NUM_FIRST or not known or history[-1].entropy is None or sum(known) <= 0:
        return None
    return history[-1].entropy / (sum(known) / len(known))


CHECKS: dict[str, Check] = {
    "groups_without_variance": Check(
        share_without_variance,
        0.5,
        "share of groups whose responses all have one score, from which nothing is learned: prompts that are too easy "
        "or too hard, or a reward that is too coarse; algorithm.online_filtering samples others",
    ),
    "still_parts": Check(
        lambda seen: float(len(find_still_parts(seen.history))),
        0.0,
        f"parts of the reward with one value for all responses of {NUM_STILL} steps: a gate that is never passed, a "
        "ground truth that cannot be met, or a fault in the reward function",
    ),
    "length_growth": Check(
        lambda seen: _growth(seen.history),
        2.0,
        f"mean response length relative to the first {NUM_FIRST} steps: a reward that pays for length, or a loss "
        "average that does not hold it down",
    ),
    "entropy_left": Check(
        lambda seen: _entropy_left(seen.history),
        0.2,
        f"entropy relative to the first {NUM_FIRST} steps: the policy has collapsed to few answers; a learning rate "
        "that is too high, too small a KL weight or clip_ratio_high",
        is_low=True,
    ),
    "truncation": Check(
        lambda seen: seen.truncated,
        0.1,
        "share of responses at data.max_response_length: it is too small, or the model does not end its answers",
    ),
    "boxes_in_another_frame": Check(
        lambda seen: seen.signs.get("another_frame"),
        0.1,
        "share of scenes whose boxes leave the image or fit only in another frame: in shares or per mille, or in "
        "another size than the prompt states; the spatial reward stays near 0",
    ),
    "same_box": Check(
        lambda seen: seen.signs.get("same_box"),
        0.2,
        "share of scenes in which all objects have one box: the model copies a box instead of localising, which a "
        "reward for counts alone pays",
    ),
    "scene_ignored": Check(
        lambda seen: seen.signs.get("scene_ignored"),
        0.5,
        "share of answers that contradict the response's own scene, of those that it decides: the answer is guessed, "
        "and the scene is written for its reward alone",
    ),
}


class Checks:
    """Checks over a run.

    Args:
        folder: of the recording, for history and what fired; None keeps both in memory.
        append: appends a line to a file, when it suits.
    """

    def __init__(self, folder: Path | None = None, append: Callable[[Path, str], None] = lambda path, line: None):
        self.folder, self.append = folder, append
        self.history: list[Facts] = []
        self.said: set[str] = set()

    def begin(self, step: int) -> None:
        """Reads the facts of the steps up to this one, from which a run goes on."""
        path = self.folder / HISTORY_FILE if self.folder else None
        try:
            lines = path.read_text().splitlines() if path else []
            rows = [json.loads(line) for line in lines]
            kept = {row["step"]: row for row in rows if row["step"] <= step}
            self.history = [Facts(row["length"], row["entropy"], row["parts"]) for _, row in sorted(kept.items())]
        except (OSError, ValueError, KeyError, TypeError):  # none yet, or cut short: measured from here on
            self.history = []

    def run(
        self,
        step: int,
        scores: Mapping[str, Tensor],
        metrics: Mapping[str, float],
        signs: Mapping[str, float],
    ) -> dict[str, float]:
        """Runs all checks on a training step, notes and says what fired, and returns checks/NAME.

        Args:
            scores: [G, n] by part of the reward, among them overall.
            metrics: of the step: response_length/mean, response_length/clip_ratio, actor/entropy_loss.
            signs: shares of responses with a sign, of the step that was read last.
        """
        parts = {
            name: [float(values.min()), float(values.max())] for name, values in scores.items() if name != "overall"
        }
        facts = Facts(metrics["response_length/mean"], metrics.get("actor/entropy_loss"), parts)
        self.history.append(facts)
        self._append(HISTORY_FILE, {"step": step, **facts._asdict()})
        seen = Seen(scores["overall"], metrics["response_length/clip_ratio"], signs, self.history)
        values = evaluate(seen)
        for name in find_fired(values):
            self._note(step, name, values[name])
        return {f"checks/{name}": value for name, value in values.items()}

    def _note(self, step: int, name: str, value: float) -> None:
        message = CHECKS[name].message
        if name == "still_parts":
            message = f"{', '.join(find_still_parts(self.history))}: {message}"
        self._append(
            FIRED_FILE,
            {"step": step, "check": name, "value": value, "threshold": CHECKS[name].threshold, "message": message},
        )
        if name not in self.said:
            self.said.add(name)
            print(f"Worth a look at step {step}: {describe_value(name, value)}", flush=True)  # noqa: T201

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        if self.folder is not None:
            self.append(self.folder / name, json.dumps(record) + "\n")


def evaluate(seen: Seen) -> dict[str, float]:
    """The values of all checks that can be told, by name."""
    values = {name: check.value(seen) for name, check in CHECKS.items()}
    return {name: value for name, value in values.items() if value is not None}


def find_fired(values: Mapping[str, float]) -> list[str]:
    """Names of the checks whose values are beyond their thresholds."""
    return [name for name, value in values.items() if CHECKS[name].fires(value)]


def describe_value(name: str, value: float) -> str:
    """A line on a check that fired: value, threshold, what was seen and what usually causes it."""
    check = CHECKS[name]
    return f"{name} {value:.3g} ({'below' if check.is_low else 'above'} {check.threshold:g}): {check.message}"


def share_signs(descriptions: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Share of responses with each sign, of those of which it is known; none known of fewer than MIN_TOLD."""
    told: dict[str, list[bool]] = {}
    for each in descriptions:
        for name, value in each.get("signs", {}).items():
            told.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in told.items() if len(values) >= MIN_TOLD}

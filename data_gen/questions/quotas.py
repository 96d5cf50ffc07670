"""Quotas: the category and level to request next, and the number of rows of each in a data set."""

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from spatialthinker.schema import CATEGORIES

LEVEL_SHARES = {"easy": 0.4, "medium": 0.4, "hard": 0.2}

LOOKBACK = 512
"""Scene i is steered by everything asked before it and by the outcomes of scenes up to i - LOOKBACK: the same
questions come out however many requests are under way and however often the run was cut off. More requests than
this cannot be under way at once."""


def category_shares(relation_percent: float) -> dict[str, float]:
    """Share of each category: `relation_percent` for relation, the rest in equal parts."""
    if not 0 <= relation_percent <= 100:
        raise ValueError(f"--relation_percent {relation_percent}: need 0 to 100")
    rest = (1 - relation_percent / 100) / (len(CATEGORIES) - 1)
    return {name: relation_percent / 100 if name == "relation" else rest for name in CATEGORIES}


class Quota:
    """Counts against shares; the next name is the one that lacks most."""

    def __init__(self, shares: Mapping[str, float]) -> None:
        self.shares = dict(shares)
        self.counts: Counter[str] = Counter()

    def ranked(self) -> list[str]:
        """All names, the one that lacks most first."""
        total = self.counts.total() + 1
        return sorted(self.shares, key=lambda name: self.counts[name] - self.shares[name] * total)


class Steering:
    """Chooses what to ask of each scene in the order of the source."""

    def __init__(self, relation_percent: float) -> None:
        self.categories = Quota(category_shares(relation_percent))
        self.levels = Quota(LEVEL_SHARES)
        self._asked: deque[tuple[str, str] | None] = deque()

    def next_categories(self) -> list[str]:
        """Categories in the order in which to try them on the next scene."""
        return self.categories.ranked()

    def next_levels(self) -> list[str]:
        """Levels in the order of need."""
        return self.levels.ranked()

    def add(self, asked: tuple[str, str] | None) -> None:
        """Count a category and level as asked of the next scene; None where the scene offers nothing to ask."""
        self._asked.append(asked)
        if asked is not None:
            self.categories.counts[asked[0]] += 1
            self.levels.counts[asked[1]] += 1

    def settle(self, outcome: tuple[str, str] | None) -> None:
        """Replace what was asked of the oldest open scene by what came of it: None where it was rejected."""
        asked = self._asked.popleft()
        for pair, step in ((asked, -1), (outcome, 1)):
            if pair is not None:
                self.categories.counts[pair[0]] += step
                self.levels.counts[pair[1]] += step


@dataclass(frozen=True)
class Allocation:
    """Rows per category of a data set, and what had to move because a category fell short."""

    taken: dict[str, int]
    wanted: dict[str, int]

    @property
    def shortfalls(self) -> dict[str, int]:
        return {name: n - self.taken[name] for name, n in self.wanted.items() if n > self.taken[name]}


def allocate(available: Mapping[str, int], target: int, relation_percent: float) -> Allocation:
    """The number of rows of each category in `target` rows.

    Wanted: floor(target * relation_percent / 100) of relation, the rest in equal parts over the other eight, single
    rows left over going to the first ones. What a category lacks is taken from the others in proportion to what they
    have left, so that the sum is the target as long as there are rows.
    """
    relation = int(target * Fraction(str(relation_percent)) / 100)
    others = [name for name in CATEGORIES if name != "relation"]
    base, extra = divmod(target - relation, len(others))
    wanted = {"relation": relation} | {name: base + (i < extra) for i, name in enumerate(others)}
    taken = {name: min(wanted[name], available.get(name, 0)) for name in CATEGORIES}
    missing = min(target, sum(available.get(name, 0) for name in CATEGORIES)) - sum(taken.values())
    spare = {name: available.get(name, 0) - taken[name] for name in CATEGORIES}
    for name, number in split_in_proportion(missing, spare).items():
        taken[name] += number
    return Allocation(taken, wanted)


def split_in_proportion(number: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """`number` split over `sizes` in proportion, by largest remainders; never more than a size."""
    total = sum(sizes.values())
    if number <= 0 or total <= 0:
        return {}
    exact = {name: Fraction(number * size, total) for name, size in sizes.items()}
    parts = {name: int(value) for name, value in exact.items()}
    for name in sorted(exact, key=lambda name: parts[name] - exact[name])[: number - sum(parts.values())]:
        parts[name] += 1
    return parts


def val_rows(taken: Mapping[str, int], val_split: float) -> dict[str, int]:
    """Validation rows of each category: max(1, floor(n * val_split)) of n > 1 rows, none for val_split 0."""
    if not 0 <= val_split < 1:
        raise ValueError(f"--val_split {val_split}: need 0 up to, but not including, 1")
    share = Fraction(str(val_split))
    return {name: max(1, int(n * share)) if n > 1 and share else 0 for name, n in taken.items()}

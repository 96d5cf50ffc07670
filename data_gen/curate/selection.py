"""Selection of records, their split and the order of their options: a function of records and seed."""

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from data_gen.questions.quotas import Allocation, allocate, val_rows
from data_gen.questions.records import Record
from spatialthinker.schema import CATEGORIES, LEVELS

SPLITS = ("train", "val")


@dataclass(frozen=True)
class Selection:
    """Records of each split, and what was left out for which reason."""

    splits: dict[str, list[Record]]
    allocation: Allocation
    left_out: Counter[str]


def digest(record: Record, seed: int, purpose: str = "") -> str:
    """A text that orders records in a way that depends on their content and the seed alone."""
    content = "\x1f".join((record.image_id, record.question, str(seed), purpose))
    return hashlib.blake2b(content.encode(), digest_size=12).hexdigest()


def select(
    records: Iterable[Record], target: int | None, relation_percent: float, val_split: float, seed: int
) -> Selection:
    """Choose and split records; letters are balanced inside each split.

    Without a target every record stays. With one, each category gives its quota, the best rated first; what a
    category lacks comes from the others. All rows of one picture share a split.
    """
    left_out: Counter[str] = Counter()
    usable = _usable(records, left_out)
    by_category: dict[str, list[Record]] = defaultdict(list)
    for record in usable:
        by_category[record.category].append(record)
    available = {name: len(by_category[name]) for name in CATEGORIES}
    allocation = Allocation(available, available) if target is None else allocate(available, target, relation_percent)
    chosen = []
    for name in CATEGORIES:
        ranked = sorted(by_category[name], key=lambda record: (-record.rating, digest(record, seed, "select")))
        chosen += ranked[: allocation.taken[name]]
    left_out["not needed for the quotas"] += len(usable) - len(chosen)
    splits = _split(chosen, val_rows(allocation.taken, val_split), seed)
    return Selection({name: balance_letters(rows, seed) for name, rows in splits.items()}, allocation, +left_out)


def _usable(records: Iterable[Record], left_out: Counter[str]) -> list[Record]:
    seen: set[tuple[str, str]] = set()
    usable = []
    for record in records:
        key = (record.image_id, " ".join(record.question.casefold().split()))
        if record.category not in CATEGORIES:
            left_out[f"unknown category {record.category!r}"] += 1
        elif record.level not in LEVELS:
            left_out[f"unknown level {record.level!r}"] += 1
        elif key in seen:
            left_out["the same question on the same image"] += 1
        else:
            seen.add(key)
            usable.append(record)
    return usable


def _split(records: Sequence[Record], quota: dict[str, int], seed: int) -> dict[str, list[Record]]:
    """Whole pictures go to val, in the order of their digests, as long as each of their categories has room there."""
    room = Counter(quota)
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda record: digest(record, seed, "split")):
        groups[record.picture_id].append(record)
    splits: dict[str, list[Record]] = {name: [] for name in SPLITS}
    for group in groups.values():
        needed = Counter(record.category for record in group)
        is_val = all(room[name] >= number for name, number in needed.items())
        if is_val:
            room -= needed
        splits["val" if is_val else "train"] += group
    return splits


def balance_letters(records: Sequence[Record], seed: int) -> list[Record]:
    """The same records with shuffled options; among those of one category and number of options every letter is
    right equally often, up to one. Records without options stay as they are."""
    turns: Counter[tuple[str, int]] = Counter()
    balanced = []
    for record in sorted(records, key=lambda record: digest(record, seed, "letters")):
        if not record.options:
            balanced.append(record)
            continue
        group = (record.category, len(record.options))
        first = random.Random(f"{group}/{seed}").randrange(len(record.options))  # else small groups would all favour A
        balanced.append(reorder(record, (first + turns[group]) % len(record.options), seed))
        turns[group] += 1
    return balanced


def reorder(record: Record, answer_index: int, seed: int) -> Record:
    """The record with its right option at `answer_index` and the others in an order that its content decides."""
    answer = record.options[record.answer_index]
    others = [text for text in record.options if text != answer]
    others.sort(key=lambda text: digest(record, seed, text))
    others.insert(answer_index, answer)
    return replace(record, options=tuple(others), answer_index=answer_index)

"""Answers of a run: a line each in its journal, which a resumed run reads to request only what is missing."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from spatialthinker.storage.journal import Journal, JournalFault, Line, name_differences, read_lines, whole_lines


@dataclass(frozen=True)
class Record:
    """One item's outcome. The first six fields are those of the released files."""

    prompt: str
    correct_answer: str
    reasoning: str
    """The model's complete text."""
    pred_answer: str
    correct: int
    task: str | None
    id: str = ""
    status: Literal["ok", "error"] = "ok"
    error: str | None = None
    kind: str | None = None
    """Kind of the parsed answer: see evaluation.scoring.strict."""
    finish_reason: str | None = None
    prompt_tokens: int = 0
    response_tokens: int = 0
    cost_usd: float = 0.0
    seconds: float = 0.0
    """From sending to answer; of a batch, its whole time."""
    correct_strict: int | None = None
    correct_paper: int | None = None
    """By the released rule, whatever the run was scored by; None where there is no answer."""
    groups: dict[str, str] | None = None
    """The group the item belongs to, by the grouping's name; a group is right when all of its items are."""
    cluster: str | None = None
    """Items of one cluster depend on each other."""
    score: float | None = None
    """Credit from 0 to 1 where the form of the answer has degrees: numbers, points, boxes."""
    facts: dict[str, Any] | None = None
    """Values of the row that the benchmark's own rule needs."""
    reward: dict[str, float] | None = None
    """The dense reward and its parts, where the row holds a reference scene."""


_FIELDS = frozenset(field.name for field in fields(Record))


class AnswerJournal(Journal):
    """The journal of one run; it is opened for writing as a context manager and not before."""

    def __init__(self, path: Path, settings: Line, is_resumed: bool) -> None:
        """Read, when resuming, the answered items of an earlier run with the same settings.

        Errors: ValueError that names each setting in which an existing journal differs, JournalFault for one that
        another process writes.
        """
        super().__init__(path)
        self.settings = settings
        self.records: dict[str, Record] = {}
        self._size = 0
        if path.is_file():
            self.open()
            self._size = path.stat().st_size
            self.close()
        self._is_new = not (is_resumed and path.is_file() and any(whole_lines(path)))
        if self._is_new:
            return
        found, self.records = read_journal(path)
        if differences := name_differences(found, settings):
            text = "\n  ".join(sorted(differences))
            raise ValueError(
                f"{path} was made with other settings; resume with them or choose another name:\n  {text}"
            )

    def __enter__(self) -> "AnswerJournal":
        self.open()
        if os.fstat(self._fd).st_size != self._size:
            self.close()
            raise JournalFault(f"{self.path} was written by another process meanwhile; go on with --resume")
        if self._is_new and self._size:  # its answers may have cost hours or money
            self.path.replace(self.path.with_name(f"{self.path.name}.previous"))
            self.close()
            self.open()
        self.begin(self.settings)
        return self

    def add(self, record: Record) -> None:
        """Append one item."""
        self.append(asdict(record))
        self.records[record.id] = record

    def is_answered(self, item_id: str) -> bool:
        """True for an item with an answer; one that ended in an error is requested again."""
        return item_id in self.records and self.records[item_id].status == "ok"


def read_journal(path: Path) -> tuple[Line, dict[str, Record]]:
    """Return the settings and the newest record of each item.

    Errors: ValueError for a file that is no journal or a damaged line before the last.
    """
    settings: Line | None = None
    records: dict[str, Record] = {}
    for line in read_lines(path):
        if settings is None:
            settings = line["settings"]
            continue
        try:
            record = Record(**{key: line[key] for key in _FIELDS & line.keys()})
            records[record.id] = record
        except TypeError as error:
            raise JournalFault(f"{path}: {str(line)[:80]} is not a line of a journal ({error})") from error
    if settings is None:
        raise ValueError(f"{path}: not a journal; start without --resume")
    return settings, records


def fingerprint_weights(model_dir: Path) -> str | None:
    """Return a hash of a local model's weights from samples of its files; None for a model on the hub.

    Two checkpoints merged into one folder one after the other must not be taken for the same model, and reading
    every byte of a large one would take minutes.
    """
    import hashlib

    if not model_dir.is_dir():
        return None
    digest = hashlib.sha256()
    for path in weight_files(model_dir):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as handle:
            for part in range(16):
                handle.seek(size * part // 16)
                digest.update(handle.read(65536))
    return digest.hexdigest()[:16]


def weight_files(model_dir: Path) -> Sequence[Path]:
    """Return the files of a model folder that hold weights."""
    return sorted([*model_dir.glob("*.safetensors"), *model_dir.glob("pytorch_model*.bin")])

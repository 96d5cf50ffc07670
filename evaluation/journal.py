"""Files of a run: an append-only journal, and from it the released JSON list.

The journal's first line holds the settings, every further line one item. A killed run loses at most the items in
flight; resuming reads the journal, keeps the answers and requests the rest again.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TextIO


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
    reward: dict[str, float] | None = None
    """The dense reward and its parts, where the row holds a reference scene."""


_FIELDS = frozenset(field.name for field in fields(Record))


class Journal:
    """The JSONL file of one run; it is opened for writing as a context manager and not before."""

    def __init__(self, path: Path, settings: dict[str, Any], is_resumed: bool) -> None:
        """Read, when resuming, the answered items of an earlier run with the same settings.

        Errors: ValueError that names each setting in which an existing journal differs.
        """
        self.path = path
        self.settings = settings
        self.records: dict[str, Record] = {}
        self._end = 0
        self._file: TextIO | None = None
        if is_resumed and path.is_file() and path.stat().st_size:
            found, self.records, self._end = read_journal(path)
            _check_settings(path, found, settings)

    def __enter__(self) -> "Journal":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._end == 0 and self.path.is_file():  # its answers may have cost hours or money
            self.path.replace(self.path.with_name(f"{self.path.name}.previous"))
        self._file = self.path.open("r+" if self._end else "w", encoding="utf-8")
        self._file.truncate(self._end)  # drops a line that a kill cut off
        self._file.seek(self._end)
        if self._end == 0:
            self._write({"settings": self.settings})
        return self

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        self._file.close()

    def add(self, record: Record) -> None:
        """Append one item; it survives a kill of this process from here on."""
        self._write(asdict(record))
        self.records[record.id] = record

    def is_answered(self, item_id: str) -> bool:
        """True for an item with an answer; one that ended in an error is requested again."""
        return item_id in self.records and self.records[item_id].status == "ok"

    def _write(self, line: dict[str, Any]) -> None:
        assert self._file is not None, "the journal is not open"
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()


def read_journal(path: Path) -> tuple[dict[str, Any], dict[str, Record], int]:
    """Return the settings, the newest record of each item and the byte length of the whole lines.

    Errors: ValueError for a file that is no journal or a broken line before the last.
    """
    settings: dict[str, Any] | None = None
    records: dict[str, Record] = {}
    end = 0
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            value = json.loads(line)
            if settings is None:
                settings = value["settings"]
            else:
                record = Record(**{key: value[key] for key in _FIELDS & value.keys()})
                records[record.id] = record
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a line of a journal ({error})") from error
        end += len(line)
    if settings is None:
        raise ValueError(f"{path}: not a journal; start without --resume")
    return settings, records, end


def _check_settings(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    differences = [
        f"{key}: {found.get(key)!r} there, {wanted.get(key)!r} now"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    ]
    if differences:
        text = "\n  ".join(differences)
        raise ValueError(f"{path} was made with other settings; resume with them or choose another name:\n  {text}")


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

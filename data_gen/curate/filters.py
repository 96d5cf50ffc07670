"""Stages that read records and leave some out: by their counts, by their rating. Nothing is edited."""

import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from data_gen.curate.selection import digest
from data_gen.journal import ACCEPTED, QUARANTINED, SceneJournal, newest_lines
from data_gen.questions.checks import check_count
from data_gen.questions.draft import Draft, question_of
from data_gen.questions.quotas import split_in_proportion
from data_gen.questions.records import Record, find_journal, journal_of, read_records, read_settings, write_csv
from data_gen.scenes.scene import Scene
from spatialthinker.scene_graph import Relation, SceneObject
from spatialthinker.storage.files import claim_output
from spatialthinker.storage.journal import Line


def record_key(record: Record) -> str:
    """The key of a record in the journal of a stage: an image may have several questions."""
    return f"{record.image_id}/{digest(record, 0, 'key')[:10]}"


def record_line(record: Record, index: int, status: str = ACCEPTED, **more: Any) -> Line:
    """The journal's line of a record after a stage."""
    return {"key": record_key(record), "index": index, "status": status, "record": record.as_dict(), **more}


def write_stage(path: Path, lines: Iterable[Line], settings: Line, is_overwritten: bool) -> None:
    """Write a stage's journal and, from it, its CSV."""
    with SceneJournal(journal_of(path), settings, is_overwritten) as journal:
        for line in lines:
            journal.add(line)
    write_csv(read_records(path), path)


def scene_of(record: Record) -> Scene:
    """The whole graph of a record, or its reference scene where the file holds no more."""
    graph = record.full_scene or record.scene
    objects = tuple(SceneObject(item["id"], tuple(item["bbox"])) for item in graph["objects"])
    return Scene(record.image_id, b"", record.width, record.height, objects, _relations(graph))


def draft_of(record: Record) -> Draft:
    """The record as a draft, its evidence the objects of its reference scene."""
    evidence = tuple(item["id"] for item in record.scene["objects"])
    return Draft(**question_of(record), evidence=evidence, relations=_relations(record.scene))


def _relations(graph: dict[str, Any]) -> tuple[Relation, ...]:
    return tuple(Relation(r["subject"], r["predicate"], r["object"]) for r in graph["relationships"])


def revise_counts(path: Path) -> Counter[str]:
    """Quarantine the count questions of a file that disagree with their graphs; return the reasons.

    The journal gets a line for each of them, and the CSV is written anew from it. A CSV without a journal is kept as
    NAME.before_fix.csv.
    """
    if path.suffix != ".csv":
        raise ValueError(f"--file {path}: name a file that ends in .csv")
    records = list(read_records(path))
    counts = [(i, record) for i, record in enumerate(records) if record.category == "count"]
    faults = {i: fault for i, record in counts if (fault := check_count(draft_of(record), scene_of(record)))}
    journal_path = find_journal(path)
    if journal_path is not None:
        keys = [line["key"] for line in newest_lines(journal_path) if line["status"] == ACCEPTED]
        with SceneJournal(journal_path, read_settings(path)) as journal:
            for i, fault in faults.items():
                journal.add({"key": keys[i], "index": i, "status": QUARANTINED, "reason": fault})
    else:
        shutil.copy2(path, claim_output(path.with_name(f"{path.stem}.before_fix.csv"), is_overwritten=False))
        lines = (
            record_line(record, i, QUARANTINED if i in faults else ACCEPTED, reason=faults.get(i))
            for i, record in enumerate(records)
        )
        write_stage(path, lines, {"stage": "fix_count_questions"}, is_overwritten=False)
    write_csv(read_records(path), path)
    return Counter(faults.values())


def best_rated(records: Sequence[Record], top_k: int) -> list[Record]:
    """The top_k records by rating, each category with its share, in the order in which they came."""
    room = split_in_proportion(min(top_k, len(records)), Counter(record.category for record in records))
    kept: set[int] = set()
    for record in sorted(records, key=lambda record: (-record.rating, digest(record, 0, "top"))):
        if room.get(record.category, 0) > 0:
            room[record.category] -= 1
            kept.add(id(record))
    return [record for record in records if id(record) in kept]

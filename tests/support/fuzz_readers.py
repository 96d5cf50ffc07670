"""Readers of what strangers wrote, as functions of bytes: each raises only what its reader does not document.

READERS names them; SEEDS holds whole inputs of each, from which fuzzing and mutation start.
"""

import io
import json
import pickle
import random
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_gen.curate.validation import read_choice_index
from data_gen.journal import SceneJournal, newest_lines
from data_gen.questions.checks import find_faults
from data_gen.questions.prompts import ReplyFault, parse_reply, request_text
from data_gen.questions.templates import TEMPLATES
from data_gen.scenes.scene import SceneFault, read_scene
from data_gen.scenes.sources import open_source, synthetic_row
from evaluation.journal import AnswerJournal, Record, read_journal
from spatialthinker.clients.providers import APIS
from spatialthinker.clients.replies import ReplyError, batch_lines, load_payload
from spatialthinker.response import is_four_sections, parse_response
from spatialthinker.scene_graph import SceneFormatError, load_scene
from spatialthinker.storage.journal import JournalFault, read_lines

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-"))
ROW = synthetic_row(0, 0)
SCENE = read_scene(ROW)
GRAPH = json.dumps(SCENE.graph()).encode()
APIS_READ = [APIS["openai"]("gpt-4o", "http://[::1]:9"), APIS["anthropic"]("claude-sonnet-4-5", "http://[::1]:9")]


def read_reply(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    read_choice_index(text, ("on", "in"))
    with suppress(ReplyFault):
        find_faults(parse_reply(text), SCENE)


def read_message(data: bytes) -> None:
    for api in APIS_READ:
        with suppress(ReplyError):
            reply = api.read(load_payload(data))
            assert reply.cost_usd >= 0
            json.dumps(asdict(reply), ensure_ascii=False).encode()


def read_batch(data: bytes) -> None:
    for _, item in batch_lines(data):
        for api in APIS_READ if item is not None else ():
            api._read_result(item)


def read_row(data: bytes) -> None:
    """Reads a row's scene; what is left of it must be whole."""
    text = data.decode("utf-8", "replace")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = {"objects": text}
    row = ROW | (values if isinstance(values, dict) else {"objects": text}) | {"image": ROW["image"]}
    try:
        scene = read_scene(row)
    except SceneFault:
        return
    graph = json.dumps(scene.graph())
    assert load_scene(graph).ids == [item.id for item in scene.objects] or len(graph) > 1 << 15
    assert all(0 <= x1 < x2 <= scene.width for x1, _, x2, _ in (item.bbox for item in scene.objects))
    assert "\n" not in "".join(relation.predicate for relation in scene.relations)
    request_text(scene, ("relation", "easy"), (), True).encode()
    if len(scene.objects) < 20:
        for make in TEMPLATES.values():
            make(scene, random.Random(0))


def read_source(data: bytes) -> None:
    path = FOLDER / "rows.jsonl"
    path.write_bytes(data)
    with suppress(ValueError):  # a file without any row
        source = open_source(str(path))
        for row in source.rows():
            with suppress(SceneFault):
                read_scene(row, 0, FOLDER)


def read_journals(data: bytes) -> None:
    path = FOLDER / "journal.jsonl"
    path.write_bytes(data)
    with suppress(JournalFault):
        list(newest_lines(path))
    with suppress(ValueError):
        read_journal(path)


def open_journal(data: bytes) -> None:
    """Goes on with a journal: what is added is there, whatever stood before it."""
    path = FOLDER / "opened.jsonl"
    path.write_bytes(data)
    added = {"key": "new", "index": 9, "status": "accepted"}
    with suppress(JournalFault):
        with SceneJournal(path, {"a": 1}) as journal:
            journal.add(added)
        assert list(read_lines(path))[-1] == added


def read_response(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    is_four_sections(text)
    for part in (text, parse_response(text).scene_text):
        for is_reference in (False, True):
            with suppress(SceneFormatError):
                load_scene(part, is_reference=is_reference)


def read_checkpoint(data: bytes) -> None:
    """Reads the data as a manifest, as an index of shards and as a rank's file."""
    from verl.export.stored_weights import _load_rank_file
    from verl.model.checkpoint_files import MANIFEST, IndexReader, check_files

    for name in (MANIFEST, ".metadata", "rank.pt"):
        (FOLDER / name).write_bytes(data)
    for read in (
        lambda: check_files(FOLDER),
        lambda: IndexReader(FOLDER).read_metadata(),
        lambda: _load_rank_file(FOLDER / "rank.pt"),
    ):
        with suppress(ValueError):
            read()


READERS: dict[str, Callable[[bytes], None]] = {
    "reply": read_reply,
    "message": read_message,
    "batch": read_batch,
    "row": read_row,
    "source": read_source,
    "journal": read_journals,
    "opened_journal": open_journal,
    "response": read_response,
    "checkpoint": read_checkpoint,
}

VALUES: dict[str, Any] = {
    "question": "Where is the man's hat?",
    "options": ["(A) on", "(B) in"],
    "answer": "B",
    "category": "relation",
    "level": "easy",
    "rating": 7,
    "evidence_ids": ["a.1", "b.1"],
    "evidence_relations": [{"subject": "a.1", "predicate": "in", "object": "b.1"}],
}
OPENAI = {
    "choices": [{"message": {"content": [{"type": "text", "text": "x"}], "refusal": None}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}},
}
ANTHROPIC = {
    "content": [{"type": "text", "text": "x"}, {"type": "tool_use", "input": VALUES}],
    "stop_reason": "tool_use",
    "usage": {"input_tokens": 9, "output_tokens": 2, "cache_read_input_tokens": 4, "cache_creation_input_tokens": 0},
}
RESULTS = [
    {"custom_id": "a", "response": {"status_code": 200, "body": OPENAI}},
    {"custom_id": "b", "result": {"type": "succeeded", "message": ANTHROPIC}},
    {"custom_id": "c", "result": {"type": "errored", "error": {"type": "error"}}, "error": {"message": "no"}},
]
ROWS = [
    {"objects": ROW["objects"], "relationships": ROW["relationships"]},
    {"objects": [{"id": "caf\u00e9 au lait.1", "x": 1, "y": 2, "w": 30, "h": 40}], "relationships": "[]"},
    {"objects": json.dumps(ROW["objects"]), "relationships": json.dumps(ROW["relationships"])},
    {"image_id": 7, "objects": [{"id": "a", "bbox": [0, 0, 9, 9]}, {"id": "a", "bbox": [0, 0, 8, 8]}]},
]


def _journals() -> list[bytes]:
    """A journal of scenes, one of answers, and one from before there were checksums."""
    paths = [FOLDER / "scenes.jsonl", FOLDER / "answers.jsonl"]
    record = {"category": "relation", "level": "easy", "question": "Caf\u00e9\u2028?", "options": ["(A) on", "(B) in"]}
    with SceneJournal(paths[0], {"a": 1}, is_overwritten=True) as journal:
        for index, status in enumerate(("accepted", "error", "quarantined", "accepted")):
            line = {"key": f"k{index}", "index": index, "status": status, "cost_usd": 0.002 * index}
            journal.add(line | ({"asked": ["relation", "easy"], "record": record} if status == "accepted" else {}))
    with AnswerJournal(paths[1], {"model": "m"}, is_resumed=False) as answers:
        for index in range(3):
            answers.add(Record("p", "B", "<answer>(B)</answer>", "B", 1, None, id=str(index)))
    old = b'{"settings": {"a": 1}}\n{"key": "k", "index": 0, "status": "accepted"}\n{"key": "l", "status": "error"}\n'
    return [*(path.read_bytes() for path in paths), old]


def _checkpoints() -> list[bytes]:
    """A manifest, an index of shards and a rank's file."""
    import torch

    from verl.model.checkpoint_files import Metadata

    entry = {"bytes": 1, "sha256": "0" * 64}
    weights = io.BytesIO()
    torch.save({"w": torch.zeros(2)}, weights)
    manifest = json.dumps({"rank.pt": entry | {"merged": entry}}).encode()
    return [manifest, pickle.dumps(Metadata(state_dict_metadata={}, storage_data={})), weights.getvalue()]


SEEDS: dict[str, Callable[[], list[bytes]]] = {
    "reply": lambda: [
        json.dumps(VALUES).encode(),
        str(VALUES).encode(),
        f"<think>{json.dumps(VALUES | {'question': 'A draft?'})}</think>{json.dumps(VALUES)}".encode(),
        b"```json\n{question: 'Q', // odd\n options: ['a', 'b',], answer: B}\n```",
    ],
    "message": lambda: [json.dumps(message).encode() for message in (OPENAI, ANTHROPIC, {"error": {"message": "x"}})],
    "batch": lambda: [b"\n".join(json.dumps(result).encode() for result in RESULTS)],
    "row": lambda: [json.dumps(row).encode() for row in ROWS],
    "source": lambda: [b"\n".join(json.dumps(row).encode() for row in ROWS), json.dumps(ROWS).encode()],
    "journal": _journals,
    "opened_journal": _journals,
    "response": lambda: [
        GRAPH,
        b"<observe>o</observe>\n<scene>" + GRAPH + b"</scene>\n<think>t</think>\n<answer>(A)</answer>",
    ],
    "checkpoint": _checkpoints,
}

"""Outcomes of images as journal lines, and iteration over the images of a source that have none yet."""

from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

from data_gen.journal import ACCEPTED, QUARANTINED, SceneJournal
from data_gen.questions.draft import Draft
from data_gen.questions.records import make_record
from data_gen.scenes.scene import Scene, SceneFault, read_image_id, read_scene
from data_gen.scenes.sources import Source
from spatialthinker.storage.journal import Line


def accepted_line(draft: Draft, scene: Scene, index: int, provenance: Mapping[str, str]) -> Line:
    """The journal's line of a draft that became a record."""
    return {
        "key": scene.image_id,
        "index": index,
        "status": ACCEPTED,
        "asked": [draft.category, draft.level],
        "record": make_record(draft, scene, provenance).as_dict(),
        "notes": list(scene.notes),
    }


def quarantined_line(image_id: str, index: int, reason: str, **more: Any) -> Line:
    """The journal's line of an image without a row."""
    return {"key": image_id, "index": index, "status": QUARANTINED, "reason": reason, **more}


def walk(
    source: Source,
    journal: SceneJournal,
    settle: Callable[[Line], None],
    cap: int | None = None,
    waiting: Container[str] = (),
) -> Iterator[tuple[int, str, Scene | None]]:
    """Index, id and scene of the first `cap` rows; None in place of a scene that is settled or among `waiting`.

    A row that is no scene or repeats an id gets its quarantine line, by `settle`, before it is yielded.
    """
    seen: set[str] = set()
    for index, row in enumerate(source.rows()):
        if cap is not None and index >= cap:
            return
        image_id, scene = f"row-{index}", None
        try:
            image_id = read_image_id(row, index)
            if image_id in seen:
                image_id = f"{image_id}, row {index}"
                raise SceneFault("an earlier row has the same image_id")
            seen.add(image_id)
            if not journal.is_settled(image_id) and image_id not in waiting:
                scene = read_scene(row, index, source.root)
        except SceneFault as error:
            if not journal.is_settled(image_id):
                settle(quarantined_line(image_id, index, str(error)))
        yield index, image_id, scene

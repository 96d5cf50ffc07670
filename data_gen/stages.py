"""The stage that turns scenes into questions: one line in the journal for each image, then the CSV."""

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from data_gen.checks import find_faults
from data_gen.draft import Draft
from data_gen.journal import ACCEPTED, QUARANTINED, Journal, Line
from data_gen.quotas import Steering
from data_gen.records import make_record
from data_gen.scenes import Scene, SceneFault, read_image_id, read_scene
from data_gen.sources import Source
from data_gen.templates import TEMPLATES

TEMPLATE_VERSION = "rules-1"


def propose(scene: Scene, steering: Steering, seed: int) -> Draft | None:
    """The template question that the data set lacks most among those the scene offers."""
    levels = steering.next_levels()
    for category in steering.next_categories():
        rng = random.Random(f"{seed}/{category}/{scene.image_id}")
        drafts = TEMPLATES[category](scene, rng)
        if drafts:
            rng.shuffle(drafts)
            return shuffle_options(min(drafts, key=lambda draft: levels.index(draft.level)), rng)
    return None


def shuffle_options(draft: Draft, rng: random.Random) -> Draft:
    """The draft with its options in a random order."""
    options = rng.sample(draft.options, len(draft.options))
    return replace(draft, options=tuple(options), answer_index=options.index(draft.answer))


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


def run_templates(source: Source, journal: Journal, cap: int | None, relation_percent: float, seed: int) -> None:
    """Ask every scene one template question; each scene's outcome is in the journal before the next is read."""
    steering = Steering(relation_percent)
    provenance = {"source": source.locator, "provider": "template", "model": "rules", "seed": str(seed)}
    provenance["prompt_version"] = TEMPLATE_VERSION
    for index, row in enumerate(source.rows()):
        if cap is not None and index >= cap:
            break
        image_id = f"row-{index}"
        try:
            image_id = read_image_id(row, index)
            if journal.is_settled(image_id):
                steering.add(journal.entries[image_id].asked)
                continue
            scene = read_scene(row, index, source.root)
        except SceneFault as error:
            line = quarantined_line(image_id, index, str(error))
        else:
            draft = propose(scene, steering, seed)
            faults = ["no template fits the graph"] if draft is None else find_faults(draft, scene)
            if draft is None or faults:
                line = quarantined_line(image_id, index, "; ".join(faults), notes=list(scene.notes))
            else:
                line = accepted_line(draft, scene, index, provenance)
        if not journal.is_settled(image_id):
            journal.add(line)
        steering.add(journal.entries[image_id].asked)

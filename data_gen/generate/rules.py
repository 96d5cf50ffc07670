"""The provider `template`: every scene gets the rule-based question that the data set lacks most."""

import random
from dataclasses import replace

from data_gen.generate.outcomes import accepted_line, quarantined_line, walk
from data_gen.journal import SceneJournal
from data_gen.questions.checks import find_faults
from data_gen.questions.draft import Draft
from data_gen.questions.quotas import Steering
from data_gen.questions.templates import TEMPLATES
from data_gen.scenes.scene import Scene
from data_gen.scenes.sources import Source
from spatialthinker.storage.journal import Line

TEMPLATE_VERSION = "rules-2"


def run_templates(source: Source, journal: SceneJournal, cap: int | None, relation_percent: float, seed: int) -> None:
    """Ask every scene one question; each scene's outcome is in the journal before the next is read."""
    steering = Steering(relation_percent)
    provenance = {"source": source.locator, "provider": "template", "model": "rules", "seed": str(seed)}
    provenance["prompt_version"] = TEMPLATE_VERSION
    for index, image_id, scene in walk(source, journal, journal.add, cap):
        if scene is not None:
            journal.add(_outcome(scene, index, propose(scene, steering, seed), provenance))
        steering.add(journal.entries[image_id].asked)


def _outcome(scene: Scene, index: int, draft: Draft | None, provenance: dict[str, str]) -> Line:
    faults = ["no template fits the graph"] if draft is None else find_faults(draft, scene)
    if draft is None or faults:
        return quarantined_line(scene.image_id, index, "; ".join(faults), notes=list(scene.notes))
    return accepted_line(draft, scene, index, provenance)


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

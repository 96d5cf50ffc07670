"""Requests for one scene: prompt, check of the reply, one repair round with its faults, journal line."""

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from data_gen.generate.outcomes import accepted_line, quarantined_line
from data_gen.journal import FAILED
from data_gen.questions.checks import find_faults
from data_gen.questions.predicates import SPATIAL
from data_gen.questions.prompts import (
    MAX_OUTPUT_TOKENS,
    REPLY_SCHEMA,
    SYSTEM_PROMPT,
    ReplyFault,
    parse_reply,
    repair_text,
    request_text,
)
from data_gen.questions.quotas import Steering
from data_gen.questions.templates import TEMPLATES, named_objects
from data_gen.scenes.scene import Scene
from spatialthinker.clients.model_api import Api, ApiRequest, OutageFault, Reply, RequestFault, merge_usage
from spatialthinker.storage.journal import Line

MAX_ASKS = 2
"""The first request and one repair round."""

NUM_FURTHER = 3
NO_QUESTION = "the graph carries no question of any category"


@dataclass(frozen=True)
class Wish:
    """Requested category and level of a scene's question."""

    category: str
    level: str
    further: tuple[str, ...]

    @property
    def asked(self) -> tuple[str, str]:
        return self.category, self.level


def supports(scene: Scene, category: str, has_image: bool) -> bool:
    """True for a scene that supports a question of the category."""
    names = len(scene.unique_names)
    if category in ("depth", "orientation"):
        return has_image and names >= 2
    if category in ("size", "distance", "instance_location"):
        return names >= {"size": 2, "distance": 3, "instance_location": 1}[category]
    if category == "count":
        return any(len(draft.evidence) > 1 for draft in TEMPLATES["count"](scene, random.Random(0)))
    if category == "reach":
        return any(r.predicate not in SPATIAL for r in scene.relations)
    return bool(scene.relations)


def choose_wish(scene: Scene, steering: Steering, has_image: bool) -> Wish | None:
    """The category furthest below its quota among those that the scene supports; None where it supports none."""
    if not named_objects(scene) and not scene.relations:
        return None
    fitting = [name for name in steering.next_categories() if supports(scene, name, has_image)]
    if not fitting:
        return None
    return Wish(fitting[0], steering.next_levels()[0], tuple(fitting[1 : 1 + NUM_FURTHER]))


def make_request(scene: Scene, wish: Wish, has_image: bool, temperature: float) -> ApiRequest:
    """The first request for a scene."""
    text = request_text(scene, wish.asked, wish.further, has_image)
    images = (scene.image,) if has_image else ()
    return ApiRequest(text, images, SYSTEM_PROMPT, REPLY_SCHEMA, MAX_OUTPUT_TOKENS, temperature)


def repaired(request: ApiRequest, reply: Reply, faults: Sequence[str]) -> ApiRequest:
    """The request of the repair round."""
    return replace(request, text=repair_text(request.text, reply.text[:2000], faults))


def judge(reply: Reply, scene: Scene, index: int, wish: Wish, provenance: Mapping[str, str]) -> Line | list[str]:
    """The journal line of a valid reply, or its faults."""
    if reply.stop == "refusal":
        return ["the model refused"]
    if reply.fault:
        return [reply.fault]
    try:
        draft = parse_reply(reply.text)
    except ReplyFault as error:
        return [f"{error} (cut off at {MAX_OUTPUT_TOKENS} tokens)" if reply.stop == "length" else str(error)]
    if faults := find_faults(draft, scene):
        return faults
    return accepted_line(draft, scene, index, provenance) | {"asked": list(wish.asked)}


async def ask_scene(
    api: Api, scene: Scene, index: int, wish: Wish, request: ApiRequest, provenance: Mapping[str, str]
) -> Line:
    """Send at most two requests; return the journal line with the outcome and every paid reply."""
    replies: list[Reply] = []
    first, faults = request, ["not asked"]
    for _ in range(MAX_ASKS):
        try:
            reply = await api.ask(request)
        except (RequestFault, OutageFault, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and not replies:
                raise  # nothing is paid
            line = quarantined_line(scene.image_id, index, str(error) or "the run was stopped before an answer")
            if not isinstance(error, RequestFault):
                line["status"] = FAILED
            return line | paid(wish, replies)
        replies.append(reply)
        outcome = judge(reply, scene, index, wish, provenance)
        if isinstance(outcome, dict):
            return outcome | paid(wish, replies)
        faults = outcome
        request = repaired(first, reply, faults)
    return quarantined_line(scene.image_id, index, "; ".join(faults)) | paid(wish, replies)


def paid(wish: Wish, replies: Sequence[Reply]) -> Line:
    """Target, replies, usage and cost, as keys of a journal line."""
    return {"asked": list(wish.asked), "replies": [reply.text for reply in replies], **merge_usage(replies)}

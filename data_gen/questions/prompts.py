"""Prompts of the generator: a fixed text first, for the providers' prompt caches, and the scene last."""

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from data_gen.questions.draft import Draft, strip_letters
from data_gen.questions.records import answer_index, read_rating
from data_gen.scenes.scene import Scene
from spatialthinker.clients.replies import find_object
from spatialthinker.plain_text import printable
from spatialthinker.scene_graph import Relation
from spatialthinker.schema import CATEGORIES, LETTERS, LEVELS

PROMPT_VERSION = "grounded-1"
"""Part of every row's provenance; changes with any text below."""

MAX_OUTPUT_TOKENS = 700

SYSTEM_PROMPT = """\
You write multiple-choice questions that train and test how well a model understands where things are in a picture. \
For each request you get one picture (unless the request says there is none), its size, and its scene graph: objects\
 with ids and pixel boxes, and relations between them. You write exactly one question about this picture and return \
it by the given schema. A program checks every field; what fails the check is thrown away.

The nine categories
- relation: where one object is with respect to another. The answer is the predicate of a listed relation or a plain\
 synonym of it. Typical form: "Where is the lamp relative to the bed?"
- reach: how one object touches, holds, carries, rides or otherwise acts on another. The answer is the interaction \
of a listed relation. Typical form: "What is the woman doing with the umbrella?"
- size: how large one object appears compared with another. The answer is a comparative such as larger, smaller, \
taller, or about the same size, said of the first object in evidence_ids against the second; or the name of the \
larger or smaller one. The boxes must show it clearly. Typical form: "How tall does the tree appear next to the \
house?"
- orientation: in which direction something lies or faces from a stated point of view, the viewer's or that of a \
person or animal in the picture. The answer is a direction. Look at the picture to see which way someone faces; left\
 and right change sides when the point of view does. Typical form: "If you stood where the rider is, facing as she \
does, on which side would the fence be?"
- instance_location: in which part of the frame an object is. The answer names a part such as top left, center, or \
bottom right, and the box's centre must lie there. Only for an object whose kind, synonyms included, occurs once.
- depth: which of two objects is nearer to the camera. The answer is an object's name. Judge by the picture: \
occlusion, ground contact, perspective; never by box size alone.
- distance: which of two objects is nearer to a third one in the picture. The answer is an object's name. \
evidence_ids starts with the third object. Boxes must show it both by their gaps and by their centres.
- count: how many objects of one kind there are. The answer is a whole number in digits and equals the number of \
boxes of that kind, synonyms pooled (man, woman and boy are people); evidence_ids names all of them. Only for two to\
 eight separate objects, never for names that are plural themselves.
- existence: whether an object stands in a stated relation to another. The options are yes and no. For no, ask about\
 the contrary of a listed relation between two objects that are both there; never about objects that are missing.

What the question must rest on
- Only objects and relations of the graph. evidence_ids names the objects that the question and its right answer \
need, and nothing else: one for instance_location, two for relation, reach, size, depth and existence, three for \
distance, all counted ones for count. evidence_relations repeats the listed relations that prove the answer, copied \
letter by letter; it is empty where boxes or the picture prove it.
- Choose objects that a person would notice: large, whole, different from each other, doing something with each \
other. Leave out parts of things and of bodies, clothes on their wearer, writing, decoration, and what everybody \
knows without looking (wheels on a car, clouds in the sky).
- Prefer relations between things of different kinds that could well be otherwise. Possession, material and mere \
containment are the last choice. Among equally good ones take those with the largest boxes.
- A name must tell which object is meant. If a kind occurs several times, use a different object or say which one by\
 a listed relation.
- The question must need the picture: somebody who only reads it must not be able to guess the answer, and no option\
 may give itself away by its length or wording.

Form
- question: one clear sentence in everyday English with names only. Ids such as dog.2, boxes, and words such as \
"scene graph" never appear in the question or in an option.
- options: two to four different short texts without letters; exactly one is true of the picture. Wrong options are \
of the same kind as the right one, plausible here, and safely false: "above" is no wrong option next to "on". Where \
possible take them from the picture.
- answer: the letter of the right option: A for the first, B for the second, C for the third, D for the fourth. Vary\
 its place.
- level: easy for whole, plainly visible objects and clear differences; medium for some overlap, several candidates \
or a step of thought; hard for several steps, strong overlap, an unusual point of view or small differences.
- rating: how much answering it teaches about space, from 1 (nothing) to 10 (a lot); use the whole range.

Examples of complete replies
{"question": "Where is the kite relative to the pier?", "options": ["below it", "above it", "behind it"], "answer": \
"B", "category": "relation", "level": "easy", "rating": 5, "evidence_ids": ["kite.1", "pier.1"], \
"evidence_relations": [{"subject": "kite.1", "predicate": "above", "object": "pier.1"}]}
{"question": "Which is nearer to the bench: the fountain or the kiosk?", "options": ["the kiosk", "the fountain"], \
"answer": "A", "category": "distance", "level": "medium", "rating": 7, "evidence_ids": ["bench.1", "kiosk.1", \
"fountain.1"], "evidence_relations": []}
{"question": "How many sheep are on the hill?", "options": ["4", "2", "3", "5"], "answer": "C", "category": "count",\
 "level": "easy", "rating": 4, "evidence_ids": ["sheep.1", "sheep.2", "sheep.3"], "evidence_relations": []}
{"question": "From the cyclist's point of view, on which side is the tram?", "options": ["left", "right", "ahead", \
"behind"], "answer": "D", "category": "orientation", "level": "hard", "rating": 9, "evidence_ids": ["cyclist.1", \
"tram.1"], "evidence_relations": []}

Each request ends with the category and level that the data set needs. Use them if the picture carries such a \
question well. If it does not, take the first of the further categories that works, and set category and level to \
what your question really is."""


def object_schema(**properties: Any) -> dict[str, Any]:
    """The schema of an object that holds exactly these properties."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


_TEXT = {"type": "string"}
REPLY_SCHEMA = object_schema(
    question=_TEXT,
    options={"type": "array", "items": _TEXT},
    answer={"type": "string", "enum": list(LETTERS)},
    category={"type": "string", "enum": list(CATEGORIES)},
    level={"type": "string", "enum": list(LEVELS)},
    rating={"type": "integer"},
    evidence_ids={"type": "array", "items": _TEXT},
    evidence_relations={"type": "array", "items": object_schema(subject=_TEXT, predicate=_TEXT, object=_TEXT)},
)


def request_text(scene: Scene, asked: tuple[str, str], further: Sequence[str], has_image: bool) -> str:
    """The changing part of a request: the scene, then what is needed."""
    boxes = "\n".join(f"{item.id} [{', '.join(f'{x:.0f}' for x in item.bbox)}]" for item in scene.objects)
    relations = "\n".join(f"{r.subject} | {r.predicate} | {r.object}" for r in scene.relations) or "none listed"
    picture = "" if has_image else "There is no picture for this request: ask only what boxes and relations prove.\n"
    return (
        f"{picture}Size: {scene.width} x {scene.height} pixels\nObjects, id [x1, y1, x2, y2]:\n{boxes}\n"
        f"Relations, subject | predicate | object:\n{relations}\n\n"
        f"Needed: category {asked[0]}, level {asked[1]}. Further categories: {', '.join(further) or 'none'}."
    )


def repair_text(request: str, reply: str, faults: Sequence[str]) -> str:
    """The same request with what came back and why it failed the check."""
    listed = "\n".join(f"- {fault}" for fault in faults)
    return f"{request}\n\nYour reply to this was\n{reply}\n\nIt failed the check:\n{listed}\nWrite a corrected one."


class ReplyFault(ValueError):
    """A reply that holds no draft; the message is a reason fit for a repair round."""


def parse_reply(text: str) -> Draft:
    """The draft in a reply: its last JSON object with a question, whatever prose stands around it.

    Raises ReplyFault for a key that is missing or of another kind: no text is made of null or of a list.
    """
    values = find_object(text, "question")
    if values is None:
        raise ReplyFault("the reply holds no JSON object with a question")
    values = {"evidence_relations": []} | {name: value for name, value in values.items() if value is not None}
    if missing := [name for name in REPLY_SCHEMA["required"] if name not in values]:
        raise ReplyFault(f"the reply lacks {', '.join(missing)}")
    options = strip_letters(_texts("options", _as_list(values["options"])))
    relations = values["evidence_relations"]
    if not isinstance(relations, list) or not all(isinstance(relation, dict) for relation in relations):
        raise ReplyFault("evidence_relations must be a list of objects")
    ends = [
        _texts("evidence_relations", [r.get(name) for name in ("subject", "predicate", "object")]) for r in relations
    ]
    try:
        index = answer_index(_text("answer", values["answer"]), options)
    except ValueError as error:
        raise ReplyFault(str(error)) from None
    try:
        rating = read_rating(values["rating"])
    except ValueError:
        rating = 0
    return Draft(
        category=_text("category", values["category"]).lower(),
        level=_text("level", values["level"]).lower(),
        question=_text("question", values["question"]),
        options=tuple(options),
        answer_index=index,
        rating=rating,
        evidence=tuple(_texts("evidence_ids", values["evidence_ids"])),
        relations=tuple(Relation(*texts) for texts in ends),
    )


def _as_list(options: Any) -> Any:
    """Options that stand under their letters, or as JSON in a text, as a list."""
    if isinstance(options, dict) and list(options) == list(LETTERS[: len(options)]):
        return list(options.values())
    if isinstance(options, str):
        with suppress(ValueError, RecursionError):
            return json.loads(options)
    return options


def _texts(name: str, values: Any) -> list[str]:
    if not isinstance(values, list):
        raise ReplyFault(f"{name} must be a list")
    return [_text(name, value) for value in values]


def _text(name: str, value: Any) -> str:
    """The value as text on one line; a number is one too."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ReplyFault(f"{name} must be text, got {str(value)[:60]}")
    return printable(str(value))

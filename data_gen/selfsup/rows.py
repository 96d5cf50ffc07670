"""Rows of one picture: tasks in turn, each with random numbers of its own."""

from dataclasses import dataclass
from random import Random

from data_gen.questions.records import Record
from data_gen.selfsup.options import VERSION, SelfsupOptions
from data_gen.selfsup.pictures import Picture, UnfitPicture, load_view
from data_gen.selfsup.puzzle import Puzzle, View
from data_gen.selfsup.sheets import encode_sheet
from data_gen.selfsup.tasks import ANNOTATED, TASKS, WITH_DEPTH
from spatialthinker.schema import LEVELS

RATINGS = {"easy": 5, "medium": 7, "hard": 9}
NO_TASK = "no task fits the picture"


@dataclass(frozen=True)
class Made:
    """A row and its image."""

    record: Record
    image: bytes


def make_rows(picture: Picture, options: SelfsupOptions) -> list[Made]:
    """The rows of a picture. Raises UnfitPicture with the reason where there are none."""
    rng = Random(f"{options.seed}/view/{picture.id}")
    view = load_view(picture, rng, options.depth_scale)
    made = []
    for turn in range(options.rows_per_image):
        row = _make_row(view, picture, turn, options)
        if row is not None:
            made.append(row)
    if not made:
        raise UnfitPicture(NO_TASK)
    return made


def _make_row(view: View, picture: Picture, turn: int, options: SelfsupOptions) -> Made | None:
    """The row of a turn: of the task whose turn it is, or of the next one that the picture offers."""
    names = [name for name in options.tasks if is_offered(name, view)]
    first = picture.index * options.rows_per_image + turn
    for step in range(len(names)):
        name = names[(first + step) % len(names)]
        rng = Random(f"{options.seed}/{name}/{picture.id}/{turn}")
        difficulty = rng.random() if options.difficulty is None else options.difficulty
        puzzle = TASKS[name](view, rng, difficulty)
        if puzzle is not None:
            return _made(puzzle, name, difficulty, picture, turn, options)
    return None


def is_offered(name: str, view: View) -> bool:
    """True when a picture has what a task needs."""
    if name in ANNOTATED:
        return bool(view.things)
    return view.depth is not None if name in WITH_DEPTH else True


def level_of(difficulty: float) -> str:
    """The level of a difficulty: a third of the dial each."""
    return LEVELS[min(int(3 * difficulty), 2)]


def _made(puzzle: Puzzle, name: str, difficulty: float, picture: Picture, turn: int, options: SelfsupOptions) -> Made:
    level = level_of(difficulty)
    provenance = {"source": options.source, "provider": "selfsup", "model": name, "prompt_version": VERSION}
    record = Record(
        image_id=f"{picture.id}#{turn}",
        width=puzzle.sheet.width,
        height=puzzle.sheet.height,
        question=puzzle.question,
        options=puzzle.options,
        answer_index=puzzle.answer_index,
        category=puzzle.category,
        level=level,
        rating=RATINGS[level],
        scene=_scene(puzzle),
        provenance=provenance | {"seed": str(options.seed)},
        answer=puzzle.answer,
        reward=puzzle.reward,
    )
    return Made(record, encode_sheet(puzzle.sheet))


def _scene(puzzle: Puzzle) -> dict[str, list[dict[str, object]]]:
    """The reference scene: the objects that the answer rests on, numbered within their names."""
    objects: list[dict[str, object]] = []
    numbers: dict[str, int] = {}
    for name, box in puzzle.evidence:
        label = "_".join(name.lower().split())
        numbers[label] = numbers.get(label, 0) + 1
        objects.append({"id": f"{label}.{numbers[label]}", "bbox": list(box)})
    return {"objects": objects, "relationships": []}

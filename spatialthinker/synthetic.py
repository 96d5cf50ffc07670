"""Seeded scenes of coloured shapes with exact ground truth, as rows of the public data set's columns.

    python -m spatialthinker.synthetic --out data/shapes --train 4000 --val 400 --seed 0

A puzzle is composed backwards: the category fixes what must be true, two to four shapes are placed so that it is true
by a wide margin, and question, options, boxes and relations follow from the placement. The reference scene holds
exactly the shapes that the question is about. Same seed, same bytes.
"""

import argparse
import json
import math
import random
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from spatialthinker.prompts import render_prompt
from spatialthinker.response import section
from spatialthinker.schema import CATEGORIES, VqaRow, build_row, parquet_path, question_with_options, write_parquet
from spatialthinker.shapes import COLOURS, DEFAULT_CANVAS, FACINGS, KINDS, Canvas, Shape, draw, encode_png, gap_px

SHAPES_PER_SCENE = (2, 4)
_RATING = {"easy": 5, "medium": 7, "hard": 9}
# Mid-points of a solid shape's sides lie on the shape, so two of them can touch in a point that is visible.
_SOLID = ("circle", "square", "diamond")
PLACES = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1), "center": (0.5, 0.5)}
"""Named parts of an image, from its first cell (0) to its last (1) across and down."""
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Puzzle:
    """A scene and one question on it. `relations` are (subject, predicate, object) by index into `shapes`."""

    category: str
    shapes: tuple[Shape, ...]
    """In drawing order, the last on top."""
    evidence: tuple[int, ...]
    """The shapes that the question is about, in the order in which a reply names them."""
    relations: tuple[tuple[int, str, int], ...]
    question: str
    answer: str
    wrong: tuple[str, ...]

    @property
    def level(self) -> str:
        points = len(self.shapes) - 2 + (self.category in ("reach", "depth", "distance"))
        return ("easy", "medium", "medium", "hard")[points]


class _Composer:
    """Places shapes for one puzzle. A placement that turns out ambiguous is returned as None and drawn anew."""

    def __init__(self, rng: random.Random, canvas: Canvas) -> None:
        self.rng = rng
        self.canvas = canvas

    def looks(self, number: int, kinds: Sequence[str] = KINDS) -> list[dict[str, str]]:
        """Kind, colour and facing of shapes whose colours all differ."""
        colours = self.rng.sample(list(COLOURS), number)
        return [self.look(self.rng.choice(kinds), colour) for colour in colours]

    def look(self, kind: str, colour: str) -> dict[str, str]:
        return {"kind": kind, "colour": colour, "facing": self.rng.choice(FACINGS) if kind == "arrow" else ""}

    def size(self) -> int:
        return self.rng.choice(self.canvas.sizes)

    def cell(self) -> tuple[int, int]:
        return self.rng.randrange(self.canvas.columns), self.rng.randrange(self.canvas.rows)

    def put(self, look: dict[str, str], column: float, row: float, size: int | None = None) -> Shape:
        """A shape near the centre of a grid cell, with a small jitter, inside the image."""
        size = size or self.size()
        cell, spread = self.canvas.cell, self.canvas.cell // 14
        x = round((column + 0.5) * cell - size / 2) + self.rng.randint(-spread, spread)
        y = round((row + 0.5) * cell - size / 2) + self.rng.randint(-spread, spread)
        return Shape(
            x=min(max(x, 0), self.canvas.width - size), y=min(max(y, 0), self.canvas.height - size), size=size, **look
        )

    def is_clear(self, shape: Shape, others: Collection[Shape]) -> bool:
        return all(gap_px(shape, other) >= self.canvas.cell // 9 for other in others)

    def beside(self, look: dict[str, str], anchor: Shape, direction: str, gap: int) -> Shape:
        """A shape on the anchor's row or column, `gap` px away (negative: overlapping) in a facing's direction."""
        size = self.rng.choice(self.canvas.sizes[1:])
        x, y = anchor.x + (anchor.size - size) // 2, anchor.y + (anchor.size - size) // 2
        x1, y1, x2, y2 = anchor.box
        x, y = {
            "left": (x1 - gap - size, y),
            "right": (x2 + gap, y),
            "up": (x, y1 - gap - size),
            "down": (x, y2 + gap),
        }[direction]
        return Shape(x=x, y=y, size=size, **look)

    def aligned_pair(self) -> tuple[Shape, Shape, str] | None:
        """Two shapes in one row or column, and where the first lies as seen from the second."""
        first, second = self.looks(2)
        if self.rng.random() < 0.5:
            row = self.rng.randrange(self.canvas.rows)
            one, two = sorted(self.rng.sample(range(self.canvas.columns), 2))
            shapes, sides = (self.put(first, one, row), self.put(second, two, row)), ("left of", "right of")
        else:
            column = self.rng.randrange(self.canvas.columns)
            one, two = sorted(self.rng.sample(range(self.canvas.rows), 2))
            shapes, sides = (self.put(first, column, one), self.put(second, column, two)), ("above", "below")
        if not self.is_clear(shapes[0], shapes[1:]):
            return None
        return (*shapes, sides[0]) if self.rng.random() < 0.5 else (shapes[1], shapes[0], sides[1])

    def relation(self) -> Puzzle | None:
        if (pair := self.aligned_pair()) is None:
            return None
        a, b, side = pair
        question = f"Where is the {a.name} as seen from the {b.name}?"
        return Puzzle("relation", (a, b), (0, 1), ((0, side, 1),), question, side, _others(side, _OPPOSITE))

    def existence(self) -> Puzzle | None:
        if (pair := self.aligned_pair()) is None:
            return None
        a, b, side = pair
        asked, answer, wrong = (side, "yes", "no") if self.rng.random() < 0.5 else (_OPPOSITE[side], "no", "yes")
        question = f"Is there a {a.name} {asked} the {b.name}?"
        return Puzzle("existence", (a, b), (0, 1), ((0, side, 1),), question, answer, (wrong,))

    def pair_at_gap(self, looks: Sequence[dict[str, str]], gap: int) -> tuple[Shape, Shape] | None:
        """Two shapes whose boxes are `gap` px apart; the second is drawn over the first where they overlap."""
        anchor = self.put(looks[0], *self.cell(), size=self.rng.choice(self.canvas.sizes[1:]))
        other = self.beside(looks[1], anchor, self.rng.choice(FACINGS), gap)
        x1, y1, x2, y2 = other.box
        return (anchor, other) if min(x1, y1) >= 0 and x2 <= self.canvas.width and y2 <= self.canvas.height else None

    def overlap(self) -> int:
        """A negative gap that hides a good part of the shape below and leaves most of it in sight."""
        return -self.rng.randint(self.canvas.sizes[0] // 2, self.canvas.sizes[0] * 3 // 4)

    def reach(self) -> Puzzle | None:
        apart = self.rng.randint(self.canvas.cell // 3, self.canvas.cell)
        gaps = {"touching": 0, "apart from": apart, "covering": self.overlap(), "covered by": self.overlap()}
        state = self.rng.choice(list(gaps))
        if (pair := self.pair_at_gap(self.looks(2, _SOLID), gaps[state])) is None:
            return None
        evidence = (0, 1) if state == "covered by" else (1, 0)
        first, second = (pair[i] for i in evidence)
        question = f"How does the {first.name} meet the {second.name}?"
        relations = ((evidence[0], state, evidence[1]),)
        return Puzzle("reach", pair, evidence, relations, question, state, _others(state, gaps))

    def depth(self) -> Puzzle | None:
        if (pair := self.pair_at_gap(self.looks(2, _SOLID), self.overlap())) is None:
            return None
        back, front = pair
        evidence = (0, 1) if self.rng.random() < 0.5 else (1, 0)
        first, second = (pair[i].name for i in evidence)
        question = f"Which lies in front, the {first} or the {second}?"
        return Puzzle("depth", pair, evidence, ((1, "in front of", 0),), question, front.name, (back.name,))

    def size_(self) -> Puzzle | None:
        answer = self.rng.choice(answers := ("larger", "smaller", "same size"))
        small, large = sorted(self.rng.sample(self.canvas.sizes, 2))
        sizes = {"larger": (large, small), "smaller": (small, large), "same size": (small, small)}[answer]
        a, b = (self.put(look, *self.cell(), size=size) for look, size in zip(self.looks(2), sizes, strict=True))
        if not self.is_clear(a, [b]):
            return None
        predicate = {"same size": "same size as"}.get(answer, f"{answer} than")
        question = f"How big is the {a.name} next to the {b.name}?"
        return Puzzle("size", (a, b), (0, 1), ((0, predicate, 1),), question, answer, _others(answer, answers))

    def orientation(self) -> Puzzle:
        arrow = self.put(self.looks(1, ["arrow"])[0], *self.cell())
        question = f"Which way does the {arrow.name} point?"
        return Puzzle("orientation", (arrow,), (0,), (), question, arrow.facing, _others(arrow.facing, FACINGS))

    def instance_location(self) -> Puzzle:
        answer = self.rng.choice(list(PLACES))
        x, y = PLACES[answer]
        shape = self.put(self.looks(1)[0], x * (self.canvas.columns - 1), y * (self.canvas.rows - 1))
        wrong = self.rng.sample(_others(answer, PLACES), 3)
        question = f"In which part of the image is the {shape.name}?"
        return Puzzle("instance_location", (shape,), (0,), (), question, answer, tuple(wrong))

    def distance(self) -> Puzzle | None:
        looks = self.looks(3)
        anchor, near, far = (self.put(look, *self.cell()) for look in looks)
        if not self.is_clear(anchor, [near, far]) or not self.is_clear(near, [far]):
            return None
        if math.dist(anchor.centre, far.centre) < 1.6 * math.dist(anchor.centre, near.centre):
            return None
        evidence = (0, 1, 2) if self.rng.random() < 0.5 else (0, 2, 1)
        shapes = (anchor, near, far)
        first, second = (shapes[i].name for i in evidence[1:])
        question = f"Which is nearer to the {anchor.name}, the {first} or the {second}?"
        return Puzzle("distance", shapes, evidence, ((1, "nearer to", 0),), question, near.name, (far.name,))

    def count(self) -> Puzzle | None:
        number = self.rng.randint(1, 3)
        if self.rng.random() < 0.5:
            kind = self.rng.choice(KINDS)
            looks = [self.look(kind, self.rng.choice(list(COLOURS))) for _ in range(number)]
            question = f"How many {kind}s are there?"
        else:
            colour = self.rng.choice(list(COLOURS))
            looks = [self.look(self.rng.choice(KINDS), colour) for _ in range(number)]
            question = f"How many {colour} shapes are there?"
        shapes = [self.put(look, *self.cell()) for look in looks]
        if not all(self.is_clear(shape, shapes[:i]) for i, shape in enumerate(shapes)):
            return None
        shapes = tuple(sorted(shapes, key=lambda shape: shape.centre))
        wrong = _others(str(number), "1234")
        return Puzzle("count", shapes, tuple(range(number)), (), question, str(number), wrong)

    def fill(self, puzzle: Puzzle) -> Puzzle | None:
        """The puzzle with further shapes that leave question, answer and reference scene true."""
        shapes = list(puzzle.shapes)
        target = max(self.rng.randint(*SHAPES_PER_SCENE), len(shapes))
        for _ in range(20 * target):
            if len(shapes) == target:
                break
            look = self.look(self.rng.choice(KINDS), self.rng.choice(list(COLOURS)))
            shape = self.put(look, *self.cell())
            is_new = all(shape.name != other.name for other in shapes)
            is_counted = puzzle.category == "count" and (
                f"{shape.kind}s" in puzzle.question or f"{shape.colour} shapes" in puzzle.question
            )
            if is_new and not is_counted and self.is_clear(shape, shapes):
                shapes.append(shape)
        return replace(puzzle, shapes=tuple(shapes)) if len(shapes) >= SHAPES_PER_SCENE[0] else None


def _others(answer: str, options: Collection[str]) -> tuple[str, ...]:
    return tuple(option for option in options if option != answer)


def make_puzzle(category: str, rng: random.Random, canvas: Canvas) -> Puzzle:
    """A random puzzle of a category; ValueError for an unknown one."""
    if category not in CATEGORIES:
        raise ValueError(f"unknown category {category!r}; known: {', '.join(CATEGORIES)}")
    composer = _Composer(rng, canvas)
    compose = composer.size_ if category == "size" else getattr(composer, category)
    while True:
        if (puzzle := compose()) is not None and (filled := composer.fill(puzzle)) is not None:
            return filled


def reference_scene(puzzle: Puzzle) -> dict:
    """The scene graph of a puzzle's evidence, ids such as `red_circle.1` numbered within their label."""
    ids: dict[int, str] = {}
    seen: Counter[str] = Counter()
    for i in puzzle.evidence:
        label = puzzle.shapes[i].name.replace(" ", "_")
        seen[label] += 1
        ids[i] = f"{label}.{seen[label]}"
    return {
        "objects": [{"id": ids[i], "bbox": list(puzzle.shapes[i].box)} for i in puzzle.evidence],
        "relationships": [{"subject": ids[s], "predicate": p, "object": ids[o]} for s, p, o in puzzle.relations],
    }


def make_row(puzzle: Puzzle, canvas: Canvas, image_id: str, answer_index: int, rng: random.Random) -> VqaRow:
    """The data row of a puzzle, its right option at `answer_index`."""
    options = rng.sample(puzzle.wrong, len(puzzle.wrong))
    options.insert(answer_index, puzzle.answer)
    question = question_with_options(puzzle.question, options)
    return build_row(
        image_id=image_id,
        image=encode_png(draw(canvas, puzzle.shapes)),
        problem=render_prompt("spatial_thinker_full", question, canvas.width, canvas.height),
        question=puzzle.question,
        options=options,
        answer_index=answer_index,
        scene=reference_scene(puzzle),
        category=puzzle.category,
        level=puzzle.level,
        rating=_RATING[puzzle.level],
    )


def generate(
    number: int,
    seed: int,
    split: str = "train",
    canvas: Canvas = DEFAULT_CANVAS,
    categories: Sequence[str] = CATEGORIES,
    start: int = 0,
    exclude: Collection[tuple[Shape, ...]] = (),
) -> Iterator[tuple[Puzzle, VqaRow]]:
    """Rows `start` to `start + number` of the endless stream that (seed, split) names, with their puzzles.

    Categories take turns, and within a category the right letter takes turns, so both are balanced by construction.
    A scene in `exclude` is drawn anew.
    """
    for index in range(start, start + number):
        turn, place = divmod(index, len(categories))
        category = categories[place]
        rng = random.Random(f"{seed}/{split}/{index}")
        while (puzzle := make_puzzle(category, rng, canvas)).shapes in exclude:
            pass
        answer_index = (turn + place) % (1 + len(puzzle.wrong))
        yield puzzle, make_row(puzzle, canvas, f"{split}-{seed}-{index:06d}", answer_index, rng)


def gold_response(row: VqaRow) -> str:
    """A complete reply to a synthetic row that earns the full reward: observe, scene, think, answer."""
    text = section(row.answer_option_text, "scene")
    if text is None:
        raise ValueError(f"row {row.image_id} has no <scene> in answer_option_text")
    scene = json.loads(text)

    def name(object_id: str) -> str:
        return object_id.split(".")[0].replace("_", " ")

    names = [f"a {name(item['id'])}" for item in scene["objects"]]
    observed = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    if scene["relationships"]:
        r = scene["relationships"][0]
        verb = "is the" if r["predicate"].startswith("same") else "is"
        thought = f"The {name(r['subject'])} {verb} {r['predicate']} the {name(r['object'])}."
    elif row.category == "count":
        thought = f"The count is {row.answer_text_only}."
    else:
        verb = "points" if row.category == "orientation" else "is at the"
        thought = f"The {name(scene['objects'][0]['id'])} {verb} {row.answer_text_only}."
    blocks = {"observe": f"I see {observed}.", "scene": text, "think": thought, "answer": row.answer_option_text_only}
    return "\n".join(f"<{tag}>\n{content}\n</{tag}>" for tag, content in blocks.items())


def _parse_canvas(text: str) -> Canvas:
    width, _, height = text.partition("x")
    return Canvas(int(width), int(height or width))


def main() -> None:
    from tqdm import tqdm

    parser = argparse.ArgumentParser(
        prog="python -m spatialthinker.synthetic",
        description="Write synthetic rows with exact ground truth as parquet.",
    )
    parser.add_argument("--out", required=True, help="folder of the two parquet files")
    parser.add_argument("--train", type=int, default=4000, help="rows of the train split")
    parser.add_argument("--val", type=int, default=400, help="rows of the val split")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=_parse_canvas, default=DEFAULT_CANVAS, help="image size in px: 112 or 448x336")
    parser.add_argument("--categories", nargs="+", choices=CATEGORIES, default=CATEGORIES, metavar="CATEGORY")
    options = parser.parse_args()
    if min(options.train, options.val) < 0:
        parser.error(f"row numbers cannot be negative: got --train {options.train} --val {options.val}")

    held_out: set[tuple[Shape, ...]] = set()
    for split, number in (("val", options.val), ("train", options.train)):
        exclude = held_out if split == "train" else ()
        stream = generate(number, options.seed, split, options.size, options.categories, exclude=exclude)
        pairs = list(tqdm(stream, total=number, desc=f"{split} rows", unit="row"))
        if split == "val":
            held_out = {puzzle.shapes for puzzle, _ in pairs}
        tqdm.write(str(write_parquet([row for _, row in pairs], parquet_path(options.out, split))))


if __name__ == "__main__":
    main()

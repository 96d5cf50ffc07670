"""Options that a scene leads to: questions worked by hand, the toy world's own, and hostile scenes."""

import pytest

from spatialthinker.response import section
from spatialthinker.scene_answers import QUESTIONS, SceneAnswer, answer_from_scene, read_question
from spatialthinker.scene_graph import Relation, SceneGraph, SceneObject, load_scene
from spatialthinker.synthetic import generate

SIZE = (100, 100)
SIDES = ("left of", "right of", "above", "below")
YES_NO = ("Yes", "No")
BOXES = {
    "cat.1": (0, 0, 10, 10),
    "dog.1": (50, 2, 70, 22),
    "hen.1": (52, 60, 60, 70),
    "red_car.1": (0, 50, 40, 90),
    "red_car.2": (80, 80, 90, 90),
    "egg.1": (53, 61, 58, 66),
}


def scene(boxes=BOXES, relations=()):
    return SceneGraph([SceneObject(i, box) for i, box in boxes.items()], [Relation(*triple) for triple in relations])


def decide(question, options, found=None):
    answer = answer_from_scene(found or scene(), question, options, SIZE)
    return "no kind" if answer is None else answer.index


@pytest.mark.parametrize(
    ("question", "options", "index"),
    [
        ("Where is the cat in relation to the dog?", SIDES, 0),
        ("Where is the dog located relative to the hen?", ("to the left", "to the right", "above it", "beneath"), 2),
        ("What is the spatial relationship between the cat and the dog?", SIDES, 0),
        ("On which side of the dog is the cat?", ("left side", "right side"), 0),
        ("Is the cat left or right of the dog?", ("left", "right"), 0),
        ("I see a dog. Where is the cat relative to the dog?", SIDES, 0),
        ("Where is the egg relative to the hen?", ("inside", "above", "apart from"), 0),
        ("How does the cat meet the dog?", ("touching", "apart from", "overlapping"), 1),
        ("How big is the hen next to the dog?", ("larger", "smaller", "same size"), 1),  # 80 < 400
        ("Is the cat to the left of the dog?", YES_NO, 0),
        ("Is the cat to the right of the dog?", YES_NO, 1),
        ("Is the cat taller than the dog?", YES_NO, 1),
        ("Does the egg overlap the hen?", YES_NO, 0),
        ("Is there a cat in the image?", YES_NO, 0),
        ("Is there a horse left of the dog?", YES_NO, 1),
        ("How many cars are there?", ("one", "two", "three"), 1),
        ("How many red things are there?", ("1", "2", "3"), 1),
        ("How many objects are below the dog?", ("2", "4", "6"), 1),  # hen, egg, two cars
        ("Which object is largest?", ("cat", "dog", "hen"), 1),
        ("Which object is highest in the image?", ("dog", "hen"), 0),
        ("Which is farther from the dog, the cat or the egg?", ("cat", "egg"), None),  # 55 and 53 px between centres
        ("Which is nearer to the egg, the hen or the cat?", ("cat", "hen"), 1),
        ("Where is the cat in the image?", ("bottom right", "top-left corner", "center"), 1),
        ("In which part of the image is the hen?", ("top", "bottom"), 1),
        ("From the perspective of the dog, where is the cat relative to the hen?", SIDES, "no kind"),
        ("What colour is the cat?", ("red", "blue"), "no kind"),
        ("Which way does the arrow point?", ("left", "right"), "no kind"),
        ("Which is closer to the camera, the cat or the dog?", ("cat", "dog"), None),  # boxes do not say
        ("Is the dog in front of the cat?", YES_NO, None),
        ("Where is the car relative to the dog?", SIDES, None),  # which of two?
        ("Where is the cat relative to the horse?", SIDES, None),
        ("Is there a cat left of the horse?", YES_NO, None),
        ("How many cats are there?", ("2", "3"), None),
        ("Where is the cat relative to the cat?", SIDES, None),
        ("Where is the cat relative to the dog?", ("left of", "to the left"), None),
    ],
)
def test_questions_worked_by_hand(question, options, index):
    assert decide(question, options) == index


def test_every_form_reads_its_example():
    for kind, example, _ in QUESTIONS:
        options = {"count": ("1", "2"), "place": ("top", "bottom"), "existence": YES_NO, "choice": ("cat", "hen")}
        reading = read_question(example, options.get(kind, SIDES))
        assert reading is not None and reading.kind == {"choice": "distance"}.get(kind, kind), example
        assert reading.a.endswith("cat") or reading.a == "cats" or reading.b == "dog", example


def test_of_two_true_directions_the_one_farther_apart_is_meant():
    def at(x, y):
        return scene({"cat.1": (100, 100, 110, 110), "dog.1": (100 + x, 100 + y, 110 + x, 110 + y)})

    question = "Where is the cat relative to the dog?"
    assert decide(question, SIDES, at(60, 20)) == 0
    assert decide(question, SIDES, at(20, 60)) == 2
    assert decide(question, SIDES, at(30, 40)) is None
    assert decide(question, (*SIDES, "above and to the left"), at(30, 40)) == 4


def test_stated_relations_decide_what_boxes_leave_open_and_contradict_nothing():
    def stated(*triple):
        return scene(relations=[triple])

    nearer = "Which is closer to the camera, the cat or the dog?"
    assert decide(nearer, ("cat", "dog"), stated("dog.1", "in front of", "cat.1")) == 1
    assert decide(nearer, ("cat", "dog"), stated("dog.1", "is behind", "cat.1")) == 0
    where = "Where is the cat relative to the dog?"
    assert decide(where, SIDES, stated("dog.1", "to the right of", "cat.1")) == 0
    assert decide(where, SIDES, stated("cat.1", "right of", "dog.1")) is None  # its boxes say left
    assert decide(where, ("behind", "in front of", "left of"), stated("cat.1", "behind", "dog.1")) == 0
    assert decide(where, ("riding on", "behind"), stated("cat.1", "riding on", "dog.1")) == 0
    bigger = "How big is the cat next to the dog?"  # far away things are small in an image
    assert decide(bigger, ("larger", "smaller"), stated("cat.1", "larger than", "dog.1")) == 0


def test_the_toy_world_is_decided_but_for_orientation():
    for puzzle, row in generate(180, 0, "val"):
        true = load_scene(section(row.answer_option_text, "scene"), is_reference=True)
        found = answer_from_scene(true, row.question_with_options, row.options, (112, 112))
        if puzzle.category == "orientation":
            assert found is None
        else:
            assert found is not None and found.index == row.options.index(puzzle.answer), row.question_with_options


@pytest.mark.parametrize(
    "hostile",
    [
        scene({}),
        scene({"cat.1": (10, 10, 0, 0), "dog.1": (50, 2, 70, 22)}),
        scene({"cat.1": (0, 0, 0, 0), "dog.1": (50, 2, 70, 22)}),
        scene({"cat.1": (1e6, 0, -1e6, 1), "dog.1": (50, 2, 70, 22)}),
        SceneGraph([SceneObject("cat.1", (0, 0, 9, 9))] * 700, []),
        scene(relations=[("cat.1", "left of", "dog.1"), ("dog.1", "left of", "cat.1")]),
        scene(relations=[("cat.1", "(" * 400, "dog.1"), ("no.1", "above", "no.2"), ("cat.1", "right of", "dog.1")]),
        scene({".1": (0, 0, 1, 1), "_.2": (5, 5, 6, 6)}),
    ],
)
def test_hostile_scenes_decide_nothing(hostile):
    assert decide("Where is the cat relative to the dog?", SIDES, hostile) is None


def test_hostile_questions_are_of_no_kind():
    for text in (
        "",
        "?",
        "where is " * 20_000,
        "how many " + "a" * 10_000,
        "which is left of " * 9_999,
        "\0" * 999,
        "(A",
    ):
        assert answer_from_scene(scene(), text, SIDES) is None
    assert answer_from_scene(scene(), "Where is the cat relative to the dog?", ()) is None
    assert answer_from_scene(scene(), "Where is the cat in the image?", ("top", "bottom")) == SceneAnswer(
        "place", None
    )

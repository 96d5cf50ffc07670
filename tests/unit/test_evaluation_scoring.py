"""Answers are read as what they say; nothing that is no answer is ever right."""

import pytest

from evaluation.scoring.strict import Reference, grade_response, resolve_reference
from spatialthinker.quantities import parse_quantity
from spatialthinker.response import extract_choice, find_answer

PETS = ("dog", "cat", "cow", "hen")
SIDES = ("left of", "right of", "above", "below")
STYLES = (
    "{letter}",
    "({letter})",
    "{letter}.",
    "{letter})",
    "{letter}:",
    "**{letter}**",
    "({lower})",
    "\\boxed{{{letter}}}",
    "({letter}) {text}",
    "({letter}) {text}.",
    "({letter}): {text}",
    "**({letter}) {text}**",
    "{letter}. {text}",
    "{letter}) {upper}",
    "({{{letter}}}) {{{text}}}",
    "({letter}) {{{text}}}",
    "Option {letter}",
    "The answer is ({letter}).",
    "The correct answer is {letter}. {text}",
    "Answer: ({letter}) {text}",
    "{text}",
    "{upper}",
    '"{text}".',
    "The answer is {text}.",
    "It is the one that says {text}, clearly.",
)


def wrap_plain(answer):
    return answer


def wrap_tags(answer):
    return f"<think>a or b (A)</think>\n<answer> {answer} </answer>"


def wrap_unclosed(answer):
    return f"<think>(A) looks odd</think><answer>{answer}"


def wrap_closing_only(answer):
    return f"<think>(A) looks odd</think> {answer}</answer>"


@pytest.mark.parametrize("options", [PETS, SIDES])
@pytest.mark.parametrize("wrap", [wrap_plain, wrap_tags, wrap_unclosed, wrap_closing_only])
@pytest.mark.parametrize("style", STYLES)
def test_a_perfect_answerer_is_right_in_every_style(style, wrap, options):
    for index, text in enumerate(options):
        letter = "ABCD"[index]
        written = style.format(letter=letter, lower=letter.lower(), text=text, upper=text.title())
        for true_index, true_text in enumerate(options):
            reference = Reference("ABCD"[true_index], true_text)
            grade = grade_response(wrap(written), options, reference, "stop")
            assert grade.is_correct == (true_index == index), (written, grade)
            assert grade.letter == letter


@pytest.mark.parametrize(
    ("options", "answer", "kind", "letter"),
    [
        (PETS, "(B) dog", "conflict", "B"),
        (PETS, "(A) (B) cat", "conflict", None),
        (PETS, "(A) or (B)", "conflict", None),
        (PETS, "It is not (A), it is (B)", "conflict", None),
        (PETS, "a dog and a cat", "conflict", None),
        (PETS, "I cannot see", "unparsed", None),
        (PETS, "E", "unparsed", None),
        (PETS, "(E) dog", "text", "A"),
        (PETS, "...", "unparsed", None),
        (PETS, "A dog", "text", "A"),
        (PETS, "a cow", "text", "C"),
        (("left", "top left", "right"), "It is at the top left.", "text", "B"),
        (("Left", "left", "right"), "left", "conflict", None),  # two options differ in nothing but case
        (("Left", "left", "right"), "(B) left", "letter", "B"),
        (("135", "140", "145"), "145", "text", "C"),
        (("2", "3", "4"), "(C) 4", "letter", "C"),
        (("2", "3", "4"), "3.", "text", "B"),
        (("d", "c", "b"), "b", "text", "C"),
        (("yes", "no"), "No.", "text", "B"),
        (("B", "A"), "A", "text", "B"),
        (("3.5", "35"), "3.5", "text", "A"),
        (("cat's", "dog's"), "cat's", "text", "A"),
        ((), "(b) Closed", "letter", "B"),
        ((), "open", "unparsed", None),
    ],
)
def test_readings(options, answer, kind, letter):
    choice = extract_choice(answer, options)
    assert (choice.kind, choice.letter) == (kind, letter)


@pytest.mark.parametrize("letter", "ABCD")
def test_silence_and_truncation_are_never_right(letter):
    reference = Reference(letter, PETS["ABCD".index(letter)])
    for text in ("", "   ", "<answer></answer>", "<observe>a dog and (A)", "<think>so (B)", "<answer> </answer>"):
        assert grade_response(text, PETS, reference, "stop").kind == "unparsed", text
    for text in ("", "so far it looks like (A) or dog", "<think>dog</think>", "<answer>(A) d"):
        grade = grade_response(text, PETS, reference, "length")
        assert (grade.kind, grade.is_correct) == ("truncated", False), text
    assert grade_response("<answer>(B) cat</answer> and so", PETS, Reference("B", "cat"), "length").is_correct


def test_tags_go_before_markers():
    assert find_answer("<answer>(B) cat</answer> Answer: (A)") == "(B) cat"
    assert find_answer("<observe>x</observe><scene>and nothing else") is None


@pytest.mark.parametrize(
    ("value", "kind", "choices", "expected"),
    [
        ("B", "choice", PETS, Reference("B", "cat")),
        ("(B)", "choice", PETS, Reference("B", "cat")),
        ("(B) cat", "choice", PETS, Reference("B", "cat")),
        ("Cat", "choice", PETS, Reference("B", "cat")),
        (1, "choice", PETS, Reference("B", "cat")),
        ("145", "choice", ("135", "140", "145"), Reference("C", "145")),
        ("yes", "choice", ("yes", "no"), Reference("A", "yes")),
        ("apple", "choice", ("pear", "apple"), Reference("B", "apple")),
        ("b", "choice", ("d", "c", "b"), Reference("C", "b")),
        ("1", "flag", ("Yes", "No"), Reference("A", "Yes")),
        (0, "flag", ("Yes", "No"), Reference("B", "No")),
        ("7.5", "choice_or_value", (), Reference(None, "7.5")),
        ("7.5", "choice_or_value", ("7", "8"), Reference(None, "7.5")),
        ("C", "value", (), Reference("C", None)),
        ("(b)", "value", (), Reference("B", None)),
        ("2", "value", (), Reference(None, "2")),
    ],
)
def test_references(value, kind, choices, expected):
    assert resolve_reference(value, kind, choices) == expected


@pytest.mark.parametrize(
    ("value", "kind", "choices"),
    [("E", "choice", PETS), ("zebra", "choice", PETS), (None, "choice", PETS), ("A", "choice", ()), ("2", "flag", ())],
)
def test_a_reference_that_names_nothing_is_an_error(value, kind, choices):
    with pytest.raises(ValueError):
        resolve_reference(value, kind, choices)


@pytest.mark.parametrize(
    ("reference", "answer", "kind", "is_correct"),
    [
        ("3", "three", "number", True),
        ("3", "3 cars", "number", True),
        ("1000", "1,000", "number", True),
        ("0.5", ".5", "number", True),
        ("3", "3 or 4", "unparsed", False),
        ("3", "second", "unparsed", False),
        ("second", "minute", "text", False),
        ("the image", "The image.", "text", True),
        ("blue", "The answer is blue.", "text", True),
        ("2", "9**9**9**9", "number", False),
    ],
)
def test_open_answers(reference, answer, kind, is_correct):
    grade = grade_response(f"<answer>{answer}</answer>", (), Reference(None, reference), "stop")
    assert (grade.kind, grade.is_correct) == (kind, is_correct)


def test_numbers():
    assert (
        parse_quantity("x /6") is None
        and parse_quantity("x e-9") is None
        and parse_quantity(f"1/{10**400}") == (0.0, "", ())
    )
    assert parse_quantity(f"1 1/{10**400}") == (1.0, "", ())
    assert parse_quantity("-2.5") == (-2.5, "", ())
    assert parse_quantity("1e3") == (1000, "", ())
    assert parse_quantity("1,250.5 metres") == (1250.5, "m", ())
    assert parse_quantity("1 1/2") == (1.5, "", ())
    assert parse_quantity("two red dogs") == (2, "", ("red", "dog"))
    assert parse_quantity("number of boxes: 3") == (3, "", ("box",))
    assert parse_quantity("no children") == (0, "", ("child",))
    for text in ("many", "3 or 4", "2-3", "between 2 and 4", "1, 2, 3", "1/0"):
        assert parse_quantity(text) is None, text

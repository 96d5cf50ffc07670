"""Score of each kind of answer: by strict scoring, and beside it by the released rule."""

import pytest

from evaluation.scoring.released import grade_as_released
from evaluation.scoring.strict import grade_response, resolve_reference

PETS = ("dog", "cat", "cow")
SIDES = ("to the left of", "to the right of", "above", "below")
NUMBERS = ("135", "140", "145")
YES_NO = ("yes", "no")
COUNTS = ("1", "2", "3", "4")

# (choices, reference): {text: kind}; a plus before the kind says that the answer is right.
TABLE: dict[tuple[tuple[str, ...], str], dict[str, str]] = {
    (PETS, "B"): {
        "B": "+letter",
        "(B)": "+letter",
        "b": "+letter",
        "(b)": "+letter",
        "B.": "+letter",
        "B)": "+letter",
        "B:": "+letter",
        "[B]": "+letter",
        "**B**": "+letter",
        "**(B)**": "+letter",
        "\\boxed{B}": "+letter",
        "$\\boxed{B}$": "+letter",
        "\\boxed{(B)}": "+letter",
        "\\boxed{\\text{B}}": "+letter",
        "{B}": "+letter",
        "B. cat": "+letter",
        "B) cat": "+letter",
        "B: cat": "+letter",
        "B - cat": "+letter",
        "(B) cat": "+letter",
        "(B) Cat.": "+letter",
        "(B): cat": "+letter",
        "(B) cat.": "+letter",
        "(B) a cat": "+letter",
        "**(B) cat**": "+letter",
        "({B}) {cat}": "+letter",
        "(B) {cat}": "+letter",
        "(B)\ncat": "+letter",
        "Option B": "+letter",
        "Option (B)": "+letter",
        "Choice B": "+letter",
        "Answer: B": "+letter",
        "Answer: (B) cat": "+letter",
        "Final answer: B": "+letter",
        "**Answer:** B": "+letter",
        "The answer is B": "+letter",
        "The answer is B.": "+letter",
        "The answer is (B).": "+letter",
        "The correct answer is (B) cat.": "+letter",
        "The correct option is B": "+letter",
        "So the answer is B.": "+letter",
        "Therefore, the answer is (B).": "+letter",
        "It must be (B).": "+letter",
        "Let me see.\nAnswer: B": "+letter",
        "Answer: A\nNo, wait.\nAnswer: B": "+letter",
        "<answer>B</answer>": "+letter",
        "<answer>(B)</answer>": "+letter",
        "<answer> (B) cat </answer>": "+letter",
        "<answer>\n(B) cat\n</answer>": "+letter",
        "<answer>(B) cat": "+letter",
        "<think>A dog? No.</think><answer>B</answer>": "+letter",
        "<think>(A) or (C)</think> (B) cat</answer>": "+letter",
        "<think>(A)</think> B": "+letter",
        "<answer>(B) cat</answer> Answer: (A)": "+letter",
        "<answer>(B) cat</answer> Answer:": "+letter",
        "<observe>dog</observe><scene>{}</scene><think>dog</think><answer>(B) cat</answer>": "+letter",
        "cat": "+text",
        "Cat": "+text",
        "CAT": "+text",
        "cat.": "+text",
        '"cat"': "+text",
        "**cat**": "+text",
        "\\boxed{cat}": "+text",
        "a cat": "+text",
        "The cat.": "+text",
        "It is a cat.": "+text",
        "The answer is cat.": "+text",
        "Answer: cat": "+text",
        "<answer>cat</answer>": "+text",
        "A": "letter",
        "(A) dog": "letter",
        "(C)": "letter",
        "dog": "text",
        "A dog": "text",
        "The answer is (C) cow.": "letter",
        "(A) cat": "conflict",
        "(B) dog": "+conflict",
        "(A) (B) cat": "conflict",
        "(A) or (B)": "conflict",
        "It is not (A), it is (B)": "conflict",
        "a dog or a cat": "conflict",
        "D": "unparsed",
        "(D) hen": "unparsed",
        "hen": "unparsed",
        "I cannot see": "unparsed",
        "catalogue": "unparsed",
        "": "unparsed",
        "   ": "unparsed",
        "...": "unparsed",
        "<answer></answer>": "unparsed",
        "<answer> </answer>": "unparsed",
        "<observe>a cat (B)": "unparsed",
        "<think>it is (B) cat": "unparsed",
        "<scene>{}</scene>": "unparsed",
    },
    (PETS, "A"): {
        "I cannot see": "unparsed",
        "(C)": "letter",
        "(B) dog": "conflict",
        "<answer></answer>": "unparsed",
        "<answer>I cannot see</answer>": "unparsed",
        "A": "+letter",
        "a": "+letter",
        "A dog": "+text",
        "A cat": "text",
        "dog": "+text",
    },
    (SIDES, "C"): {
        "above": "+text",
        "It is above the table.": "+text",
        "(C) above": "+letter",
        "C. Above": "+letter",
        "above and to the left of it": "conflict",
        "not below, but above": "conflict",
        "to the left of": "text",
        "left": "unparsed",
    },
    (NUMBERS, "145"): {
        "145": "+text",
        "C": "+letter",
        "(C) 145": "+letter",
        "145 degrees": "+text",
        "1": "unparsed",
        "14": "unparsed",
        "140": "text",
        "(B) 145": "conflict",
    },
    (YES_NO, "yes"): {
        "yes": "+text",
        "Yes": "+text",
        "Yes.": "+text",
        "A": "+letter",
        "Yes, it is.": "+text",
        "No.": "text",
        "maybe": "unparsed",
        "yes and no": "conflict",
        "B": "letter",
    },
    (("pear", "apple"), "apple"): {"apple": "+text", "pear": "text", "B": "+letter", "A": "letter"},
    (("red", "blue"), "blue"): {"blue": "+text", "B": "+letter", "b": "+letter", "red": "text"},
    (COUNTS, "C"): {
        "3": "+text",
        "3.": "+text",
        "(C) 3": "+letter",
        "C": "+letter",
        "4": "text",
        "(C)": "+letter",
        "There are 3.": "+text",
        "2 or 3": "conflict",
        "(D) 3": "conflict",
    },
    (("Left", "left"), "B"): {"B": "+letter", "(B) left": "+letter", "left": "conflict"},
    (("d", "c", "b"), "C"): {"b": "+text", "(C)": "+letter", "(C) b": "+letter", "d": "text"},
    (("left", "top left"), "B"): {"top left": "+text", "It is at the top left.": "+text", "left": "text"},
    (("the second image", "the first image"), "A"): {"the second image": "+text", "the image": "unparsed"},
}
CASES = [(choices, cell, text, kind) for (choices, cell), answers in TABLE.items() for text, kind in answers.items()]


def test_the_table_is_large_enough():
    assert len(CASES) >= 150


@pytest.mark.parametrize(("choices", "cell", "text", "kind"), CASES)
def test_strict_scoring(choices, cell, text, kind):
    grade = grade_response(text, choices, resolve_reference(cell, "choice", choices), "stop")
    assert (grade.kind, grade.is_correct) == (kind.lstrip("+"), kind.startswith("+")), grade


@pytest.mark.parametrize("text", ["<observe>a cat, (B)", "I think it is (B)", "<answer>(B) c", "(B) cat"])
def test_what_was_cut_off_before_its_answer_ended_is_truncated(text):
    grade = grade_response(text, PETS, resolve_reference("B", "choice", PETS), "length")
    assert (grade.kind, grade.is_correct) == ("truncated", False)


@pytest.mark.parametrize(
    ("choices", "cell", "text", "prediction", "is_correct"),
    [
        (PETS, "(B)", "<answer>(B)</answer>", "A", False),
        (PETS, "(B)", "B", "A", False),
        (PETS, "(B)", "(B) cat", "B", True),
        (PETS, "(B)", "(B) cat.", "A", False),
        (PETS, "(B)", "B. cat", "A", False),
        (PETS, "(B)", "B) cat", "A", False),
        (PETS, "(B)", "**(B) cat**", "A", False),
        (PETS, "(B)", "({B}) {cat}", "A", False),
        (PETS, "(B)", "(B) {cat}", "B", True),
        (PETS, "(B)", "(B) dog", "A", False),
        (PETS, "(A)", "(B) dog", "A", True),
        (PETS, "(A)", "<answer>I cannot see</answer>", "A", True),
        (PETS, "(A)", "(C)", "A", True),
        (PETS, "(A)", "<answer></answer>", "A", True),
        (PETS, "(A)", "a trace that was cut off", "A", True),
        (PETS, "(B)", "<answer>(B) cat</answer> Answer: (B)", "A", False),
        (PETS, "(A)", "<answer>(A) dog</answer> Answer:", "Failed to extract.", False),
        (PETS, "(A)", "", "Failed to extract.", False),
        (YES_NO, "yes", "yes", "A", False),
        (NUMBERS, "145", "145", "C", False),
        (("pear", "apple"), "apple", "apple", "B", False),
        (("pear", "apple"), "apple", "pear", "A", True),
        (("red", "blue"), "blue", "blue", "B", True),
        ((), "Yes", "Yes", "Yes", True),
    ],
)
def test_the_released_rule_among_choices(choices, cell, text, prediction, is_correct):
    grade = grade_as_released(text, cell, choices, is_multiple_choice=True)
    assert (grade.prediction, grade.is_correct) == (prediction, is_correct)


@pytest.mark.parametrize(
    ("cell", "text", "is_correct"),
    [
        ("A", "It is not (A), it is (B)", True),
        ("B", "B. dog", False),
        ("B", "B) dog", False),
        ("(b)", "(b) Closed", False),
        ("3", "3 feet", True),
        ("3", "3 cars", False),
        ("2", "two", False),
        ("3", "\\text{3} cm", True),
        ("\\text{3", "\\text{3} \\text{", False),
        ("3\\text{", "\\text{3}\\text{", True),
        ("second", "minute", False),
        ("the second image", "the image", True),
    ],
)
def test_the_released_rule_on_open_answers(cell, text, is_correct):
    assert grade_as_released(text, cell, (), is_multiple_choice=False).is_correct == is_correct


def test_a_style_moves_the_released_rule_by_its_share_of_letters():
    for style, share in (("({letter}) {text}", 1.0), ("{letter}", 0.25), ("({letter}) {text}.", 0.25)):
        right = 0
        for index, text in enumerate(SIDES):
            letter = "ABCD"[index]
            answer = style.format(letter=letter, text=text)
            right += grade_as_released(answer, f"({letter})", SIDES, is_multiple_choice=True).is_correct
            assert grade_response(answer, SIDES, resolve_reference(letter, "choice", SIDES), "stop").is_correct
        assert right / len(SIDES) == share

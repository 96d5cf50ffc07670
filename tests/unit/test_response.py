import re

import pytest

from spatialthinker import response
from spatialthinker.answer_grammar import MAX_CHARS, plain_text
from spatialthinker.response import (
    extract_choice,
    find_answer,
    is_four_sections,
    is_think_answer,
    parse_response,
    section,
)
from tests.support.regex_steps import StepCounter, count_steps

SHORT_CHARS = 240
MOST_GROWTH = 2.5
"""Steps may double with the length of a text; quadratic ones would be four times as many."""
FULL = "<observe>a</observe>\n<scene>{}</scene> <think>b</think><answer>\n (A) c\n</answer>"


def test_sections():
    assert parse_response(FULL) == ("a", "{}", "b", "(A) c")
    assert parse_response("nothing") == (None, None, None, None)
    assert parse_response("</answer><answer>x").answer is None
    assert parse_response("<answer></answer>").answer == ""


@pytest.mark.parametrize("more", ["", "Sure! ", "a < b ", "<scene>", "</think>"])
def test_both_readings_of_a_response_agree(more):
    for at in range(0, len(FULL) + 1):
        text = FULL[:at] + more + FULL[at:]
        parts = [section(text, tag) for tag in ("observe", "scene", "think", "answer")]
        parts[3] = None if parts[3] is None else parts[3].strip()
        assert list(parse_response(text)) == parts


def test_a_section_is_its_first_pair_of_tags():
    assert section("<a>1<a>2</a>3</a><a>4</a>", "a") == "1<a>2"
    assert section("</a><a>1</a>", "a") == "1"
    assert section("<a>\n1\n</a>", "a") == "\n1\n"


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        ("<think>a</think><answer>b</answer>", True),
        ("<think></think> \n\t<answer></answer>", True),
        ("<think>a</think><think>b</think>\n<answer>c</answer><answer>d</answer>", True),
        ("<think>a</think><answer>b</answer>\n", False),
        (" <think>a</think><answer>b</answer>", False),
        ("<think>a</think>so<answer>b</answer>", False),
        ("<think>a</think><answer>b", False),
        ("<think><answer>b</answer>", False),
        ("<think></answer>", False),
        ("", False),
    ],
)
def test_think_answer(text, is_right):
    assert is_think_answer(text) == is_right


def test_four_sections():
    assert is_four_sections(FULL)
    assert is_four_sections(FULL + "<answer>again</answer>")
    assert not is_four_sections(FULL + "\n")
    assert not is_four_sections(FULL.replace("</scene> ", "</scene> so "))
    assert not is_four_sections(FULL.replace("think", "thought"))
    assert not is_four_sections("<scene>{}</scene><observe>a</observe><think>b</think><answer>c</answer>")


@pytest.mark.parametrize("unit", ["<observe>", "</observe> ", "</observe><scene>", "<think>", " ", "<answer>\n", "</"])
def test_searches_are_linear(unit, monkeypatch):
    def read(chars: int) -> None:
        text = "<observe>" + unit * (chars // len(unit)) + "</answer>"
        parse_response(text), is_four_sections(text), is_think_answer("<think>" + text)

    short, long = (count_steps(monkeypatch, response, lambda n=n: read(n)) for n in (SHORT_CHARS, 2 * SHORT_CHARS))
    assert 0 < long < MOST_GROWTH * short


OPTIONS = ("left of", "right of", "above", "below")
STYLES = (
    "{letter}", "({letter})", "[{letter}]", "{letter}.", "{letter})", "{letter}:", "**{letter}**", "**({letter})**",
    "\\boxed{{{letter}}}", "$\\boxed{{({letter}) {text}}}$", "({lower})", "({letter}) {text}", "({letter}) {upper}.",
    "{letter}. {text}", "{letter}: {text}", "{letter}) {text}", "**{letter}. {text}**", "Answer: {letter}",
    "Answer: ({letter}) {text}", "The answer is ({letter}).", "The correct answer is {letter}. {text}",
    "Option {letter}", "{text}", "{upper}", "{text}.", '"{text}"', "It is {text} the car.", "so it must be ({letter})",
)  # fmt: skip


@pytest.mark.parametrize("style", STYLES)
def test_a_choice_in_every_style(style):
    for letter, text in zip("ABCD", OPTIONS, strict=True):
        choice = extract_choice(
            style.format(letter=letter, lower=letter.lower(), text=text, upper=text.upper()), OPTIONS
        )
        assert (choice.letter, choice.text) == (letter, text)
        assert choice.kind in ("letter", "text")


@pytest.mark.parametrize(
    ("answer", "kind", "letter"),
    [
        ("(A) or (B)", "conflict", None),
        ("It is not (A), it is (B)", "conflict", None),
        ("(A) above", "conflict", "A"),
        ("above or below", "conflict", None),
        ("I do not know", "unparsed", None),
        ("(E)", "unparsed", None),
        ("", "unparsed", None),
        ("   ", "unparsed", None),
    ],
)
def test_choices_that_name_none(answer, kind, letter):
    choice = extract_choice(answer, OPTIONS)
    assert (choice.kind, choice.letter) == (kind, letter)


@pytest.mark.parametrize("unit", [" ", "(A) ", "\\boxed", "the answer is ", "**", "<answer>", "</think>", "left of "])
def test_only_the_ends_of_a_long_answer_are_read(unit):
    long = unit * (2 * MAX_CHARS // len(unit))
    assert len(plain_text(f"x{long}x")) <= 2 * MAX_CHARS
    for text in (
        f"The answer is B.\n{'so it goes on. ' * MAX_CHARS}",
        f"{'so it goes on. ' * MAX_CHARS}\nThe answer is B.",
    ):
        assert extract_choice(text, OPTIONS).letter == "B"
    assert extract_choice(find_answer(f"{long}<think>{long}</think><answer>(B)</answer>") or "", OPTIONS).letter == "B"


def test_the_counter_tells_linear_from_quadratic():
    linear, quadratic = (re.compile(pattern) for pattern in (r"</a>\s*<b>", r"\s+$"))
    for pattern, least, most in ((linear, 1.9, 2.1), (quadratic, 3.8, 4.1)):
        counts = []
        for chars in (SHORT_CHARS, 2 * SHORT_CHARS):
            counter = StepCounter(pattern, steps := [0])
            assert counter.search("</a>" * (chars // 8) + " " * (chars // 2) + "x") is None
            counts.append(steps[0])
        assert least < counts[1] / counts[0] < most

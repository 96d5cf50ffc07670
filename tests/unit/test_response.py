import time

import pytest

from spatialthinker.response import (
    extract_choice,
    is_four_sections,
    is_think_answer,
    normalize,
    parse_response,
    section,
)

FULL = "<observe>a</observe>\n<scene>{}</scene> <think>b</think><answer>\n (A) c\n</answer>"


def test_sections():
    response = parse_response(FULL)
    assert response == ("a", "{}", "b", "(A) c")
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
def test_searches_are_linear(unit):
    text = "<observe>" + unit * (1_000_000 // len(unit)) + "</answer>"
    start = time.process_time()
    parse_response(text), is_four_sections(text), is_think_answer("<think>" + text)
    assert time.process_time() - start < 0.25


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


@pytest.mark.parametrize("unit", [" ", "(A) ", "\\boxed", "the answer is ", "**", "\\boxed \t", "- ", "left of "])
def test_choices_are_read_in_linear_time(unit):
    text = "x" + unit * (65_536 // len(unit)) + "x"
    start = time.process_time()
    extract_choice(text, OPTIONS), extract_choice(unit * (65_536 // len(unit)), OPTIONS), normalize(text)
    assert time.process_time() - start < 0.5

r"""Equality of short answers: "(A)" and "a", "5 meters" and "5", "\frac{1}{2}" and "0.5".

Text and exact fractions only; nothing of a model's output is ever evaluated.
"""

import re
from fractions import Fraction

MAX_ANSWER_CHARS = 256
"""Longer texts are compared as they are: no short answer hides in them."""

MAX_NUMBER_CHARS = 64
"""Longer runs of digits are compared as text, so that arithmetic stays cheap."""

_WRAPPERS = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|boxed|fbox)\s*\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_DECORATION = re.compile(r"\\left|\\right|\\[!,;: ]|\\\(|\\\)|\\\[|\\\]|\$|\^\s*\{?\s*\\circ\s*\}?|\\(?=[%$])")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_UNIT = re.compile(
    r"(?<=\d)\s*(%|percent|degrees?|°|(?:[cmk]?m|in|ft|yd|mi|s|sec|min|h|hr)(?:\^?[23])?"
    r"|(?:centi|milli|kilo)?(?:meter|metre)s?|miles?|foot|feet|inch(?:es)?|yards?"
    r"|seconds?|minutes?|hours?|days?|weeks?|months?|years?|pixels?|px)$"
)
_NAMED = re.compile(r"[^\W\d]\w?\s*=\s*([^=]+)")
_POWER_OF_TEN = re.compile(
    r"(?:(?<=[\d.])\s*(\\times|\\cdot|[×·*])\s*|(?<![\w.^/]))10\s*(?:\^|\*\*)\s*[{(]?\s*([+-]?\d{1,2})(?!\d)[})]?"
)
_NUMBER = re.compile(r"([+-]?)(?:(\d+)\s+)?(\d*\.?\d+|\d+\.)(?:e([+-]?\d{1,2}))?(?:/(\d+))?")
_BRACKETS = {"(": ")", "[": "]", "{": "}"}


def is_equal_answer(answer: str, truth: str) -> bool:
    """True for two answers that are equal as text, number or list of these, after normalisation.

    Case, blanks, LaTeX dressing, one pair of brackets around the whole, thousands commas, a name of one or two signs
    in front ("x = 5") and a unit that only one side states do not count. An empty answer equals nothing.
    """
    answer, truth = answer.strip(), truth.strip()
    if not answer or not truth:
        return False
    if answer.lower() == truth.lower():
        return True
    if max(len(answer), len(truth)) > MAX_ANSWER_CHARS:
        return False
    left, right = _plain(answer), _plain(truth)
    if not left or not right:
        return False
    return _is_equal_plain(left, right) or _is_equal_list(left, right)


def _plain(text: str) -> str:
    text = _DECORATION.sub("", text.lower())
    previous = None
    while previous != text:
        previous = text
        text = _FRACTION.sub(lambda m: f"{m[1] or m[2]}/{m[3] or m[4]}", _WRAPPERS.sub(r"\1", text))
    text = _THOUSANDS.sub("", " ".join(text.split())).rstrip(".").strip()
    named = _NAMED.fullmatch(text)
    return _POWER_OF_TEN.sub(lambda m: f"{'' if m[1] else '1'}e{m[2]}", named[1] if named else text)


def _is_equal_plain(left: str, right: str) -> bool:
    left, right = _unwrapped(left), _unwrapped(right)
    if left.replace(" ", "") == right.replace(" ", ""):
        return bool(left)
    left_number, left_unit = _number_and_unit(left)
    right_number, right_unit = _number_and_unit(right)
    if left_number is None or left_number != right_number:
        return False
    return not left_unit or not right_unit or left_unit == right_unit


def _unwrapped(text: str) -> str:
    """Returns "a" for "(a)"; the text itself unless one pair of brackets holds the whole of it and no list."""
    if len(text) > 2 and _BRACKETS.get(text[0]) == text[-1] and not set(text[1:-1]) & set("()[]{},"):
        return text[1:-1].strip()
    return text


def _number_and_unit(text: str) -> tuple[Fraction | None, str]:
    unit = _UNIT.search(text)
    if unit is not None:
        text = text[: unit.start()]
    match = _NUMBER.fullmatch(text) if len(text) <= MAX_NUMBER_CHARS else None
    if match is None:
        return None, ""
    sign, whole, number, power, divisor = match.groups()
    if (whole and not divisor) or (divisor is not None and not int(divisor)):
        return None, ""
    value = Fraction(number.rstrip(".")) * Fraction(10) ** int(power or 0) / int(divisor or 1) + int(whole or 0)
    return -value if sign == "-" else value, unit[1].rstrip("s") if unit else ""


def _is_equal_list(left: str, right: str) -> bool:
    """True for two bracketed lists that are equal item by item, such as "(1/2, 3)" and "(0.5, 3)"."""
    if left[0] != right[0] or left[0] not in _BRACKETS or not left[-1] == right[-1] == _BRACKETS[left[0]]:
        return False
    lefts, rights = left[1:-1].split(","), right[1:-1].split(",")
    if len(lefts) != len(rights) or len(lefts) < 2:
        return False
    return all(a.strip() and _is_equal_plain(a.strip(), b.strip()) for a, b in zip(lefts, rights, strict=True))

"""Open answers against their reference: numbers with units, expressions, yes or no, words.

Expressions are compared by their values at fixed points, in floating-point numbers: nothing of a model's text is run,
and no power or product can grow beyond a float, so that the time is that of reading the text.
"""

import ast
import cmath
import math
import re
from typing import Literal

from spatialthinker.answer_grammar import LETTERS, ascii_signs, is_denied, normalize, split_label, without_lead
from spatialthinker.quantities import (
    Number,
    converted,
    is_currency,
    parse_quantity,
    plain_math,
    stated_texts,
    unboxed,
    without_units,
)

RELATIVE_TOLERANCE = 1e-6
MAX_EXPRESSION_CHARS = 200
_MATH = re.compile(r"\\(?:sqrt|d?frac|tfrac|pi|times|cdot|div)|(?<![a-z])[a-z](?![a-z'])|\^|\bsqrt\b|\bpi\b|√|π")
_ROOTS = re.compile(r"\\sqrt|\\pi|[√π^]")
_SIDE_WORDS = r"(?: (?:side|colou?r|direction|one|hand side|part|corner|in colou?r))?"


Outcome = tuple[Literal["number", "text", "unparsed"], bool]


def grade_open(answer: str, reference: str, decimals: int | None = None) -> Outcome:
    """Return how an answer was read and its correctness; `decimals` is the precision that a benchmark states."""
    wanted = parse_quantity(reference)
    raw = unboxed(ascii_signs(answer))
    if wanted is not None and not _MATH.search(without_units(ascii_signs(reference).lower())):
        found = [number for text in stated_texts(raw) if (number := _read_number(text)) is not None]
        return ("number", _is_same_number(found[0], wanted, decimals)) if found else ("unparsed", False)
    if any(_is_same_expression(text, reference) for text in stated_texts(raw)):
        return "number" if wanted is not None else "text", True
    return "text", any(_says(text, normalize(reference)) for text in stated_texts(raw))


def read_number(answer: str) -> float | None:
    """Return the value of the number that an answer states; None for none, several or a range."""
    found = (_read_number(text) for text in stated_texts(unboxed(ascii_signs(answer))))
    return next((number.value for number in found if number is not None), None)


def _read_number(text: str) -> Number | None:
    """Return the number that a text is, as an expression without unknowns, or that it states."""
    if is_denied(text.lower()):
        return None
    if not is_currency(text[:4000]) and (sides := _parse_expression(text)) is not None:
        try:
            first, second = (_evaluate(sides[-1], point) for point in (0, 1))
        except (ValueError, ArithmeticError, RecursionError):
            return None if _ROOTS.search(text) else parse_quantity(text)
        if isinstance(first, complex) and first == second and not first.imag:
            return Number(first.real, "")
    return None if _ROOTS.search(without_units(text)) else parse_quantity(text)


def _is_same_number(found: Number, wanted: Number, decimals: int | None) -> bool:
    """True for equal numbers; units count where both are known: 100 cm are 1 m, and 10 cm are not 10 m.

    What is counted counts, too, where both say it.
    """
    value, true = converted(found, wanted), wanted.value
    if value is None:
        return False
    if decimals is not None:
        return round(value, decimals) == round(true, decimals)
    return math.isclose(value, true, rel_tol=RELATIVE_TOLERANCE, abs_tol=1e-12)


# Expressions ---------------------------------------------------------------------------------------------------------

_FUNCTIONS = {"sqrt": cmath.sqrt, "sin": cmath.sin, "cos": cmath.cos, "tan": cmath.tan, "log": cmath.log}
_FUNCTIONS |= {"ln": cmath.log, "exp": cmath.exp}
_POINTS = (0.7310585786, 1.3862943611, 2.2360679775)
_TOKEN = re.compile(r"\d+\.?\d*|\.\d+|sqrt|sin|cos|tan|log|ln|exp|pi|[a-z]|\*\*|[-+*/(),=]")
_LATEX = (
    (re.compile(r"\\(?:left|right|displaystyle|,|!|;|:| )|\$|\\[()\[\]]"), ""),
    (re.compile(r"\\(?:text|mathrm|mathbf)\s?\{([^{}]{0,40})\}"), r"\1"),
    (re.compile(r"\\[dt]?frac\s?(\d)\s?(\d)"), r"((\1)/(\2))"),
    (re.compile(r"\\sqrt\s?(\d)"), r"sqrt(\1)"),
    (re.compile(r"\\(?:times|cdot)|×|·"), "*"),
    (re.compile(r"\\div|÷"), "/"),
    (re.compile(r"\\pi|π"), "(pi)"),
    (re.compile(r"√\s?(\d+|(?=\())"), r"sqrt(\1)"),
)
_FRACTION = re.compile(r"\\[dt]?frac\s?\{([^{}]*)\}\s?\{([^{}]*)\}")
_ROOT = re.compile(r"\\sqrt\s?\{([^{}]*)\}")


def _is_same_expression(answer: str, reference: str) -> bool:
    """True for two expressions, equations or tuples of equal value at all points."""
    left, right = (_parse_expression(text) for text in (answer, reference))
    if left is None or right is None:
        return False
    if len(left) > len(right) == 1:  # "x = 5" for "5"
        left = left[-1:]
    if len(left) != len(right):
        return False
    pairs = (
        [(left, right)]
        if len(left) == 1
        else [([ast.BinOp(left[0], ast.Sub(), left[1])], [ast.BinOp(right[0], ast.Sub(), right[1])])]
    )
    try:
        return all(
            _is_close(_evaluate(a[0], point), _evaluate(b[0], point))
            for a, b in pairs
            for point in range(len(_POINTS))
        )
    except (ValueError, ArithmeticError, RecursionError):
        return False


def _is_close(left: object, right: object) -> bool:
    if isinstance(left, tuple) and isinstance(right, tuple):
        return len(left) == len(right) and all(_is_close(a, b) for a, b in zip(left, right, strict=True))
    if not isinstance(left, complex) or not isinstance(right, complex):
        return False
    return cmath.isclose(left, right, rel_tol=RELATIVE_TOLERANCE, abs_tol=1e-9)


def _parse_expression(text: str) -> list[ast.expr] | None:
    """Return the sides of an equation, or the one expression; None for what is neither."""
    text = plain_math(ascii_signs(text).strip().rstrip("."))
    if not text or len(text) > MAX_EXPRESSION_CHARS or re.search(r"\d\s+\d", text):
        return None
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    previous = None
    while previous != text:
        previous = text
        text = _ROOT.sub(r"sqrt(\1)", _FRACTION.sub(r"((\1)/(\2))", text))
    text = text.replace("{", "(").replace("}", ")").replace("^", "**").replace("[", "(").replace("]", ")").lower()
    tokens = _TOKEN.findall(text)
    if "".join(tokens) != "".join(text.split()) or not tokens:
        return None
    written = ""
    for before, token in zip(["", *tokens], tokens, strict=False):
        if (
            before
            and (before[-1].isalnum() or before == ")")
            and (token[0].isalnum() or token == "(")
            and before not in _FUNCTIONS
        ):
            written += "*"  # 2x, 2 sqrt(3), (x)(y)
        written += token
    try:
        sides = [ast.parse(side, mode="eval").body for side in written.split("=")]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return sides if len(sides) <= 2 else sides[-1:]


def _evaluate(node: ast.expr, point: int):
    """Return an expression's value: a complex number, or a tuple of these."""
    match node:
        case ast.Tuple(elements):
            return tuple(_evaluate(element, point) for element in elements)
        case ast.Constant(int() | float() as value):
            return complex(float(value))
        case ast.Name("pi"):
            return complex(math.pi)
        case ast.Name(name) if len(name) == 1:
            return complex(_POINTS[point] + LETTERS.index(name.upper()) / 7)
        case ast.UnaryOp(ast.USub(), operand):
            return -_evaluate(operand, point)
        case ast.UnaryOp(ast.UAdd(), operand):
            return _evaluate(operand, point)
        case ast.Call(ast.Name(name), [argument]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](_evaluate(argument, point))
        case ast.BinOp(left, operator, right):
            a, b = _evaluate(left, point), _evaluate(right, point)
            if isinstance(a, complex) and isinstance(b, complex):
                match operator:
                    case ast.Add():
                        return a + b
                    case ast.Sub():
                        return a - b
                    case ast.Mult():
                        return a * b
                    case ast.Div():
                        return a / b
                    case ast.Pow():
                        return a**b
    raise ValueError("not an expression")


# Words ---------------------------------------------------------------------------------------------------------------


def _says(answer: str, wanted: str) -> bool:
    """True for an answer that is the text, or a short sentence that states it and nothing else."""
    said = normalize(answer)
    if said == wanted or (bool(wanted) and without_lead(said) == without_lead(wanted) != ""):
        return True
    if wanted in ("yes", "no"):
        return re.match(rf"{wanted}\b(?! (?:or|and)\b)", said) is not None
    letter, rest = split_label(answer.strip(), LETTERS)
    if letter and normalize(rest) == wanted:
        return True
    if len(said) > 200 or not wanted:
        return False
    stated = re.fullmatch(
        r"(?:(?!.*\b(?:not|or|no|never)\b)[^.,;]*\b(?:is|are|was|looks|be|appears) )?(?:a |an |the )?"
        rf"{re.escape(wanted)}{_SIDE_WORDS}",
        said,
    )
    return stated is not None

"""Quantities in a text: a number in digits or words, its unit, what is counted, and its distance from the true one."""

import math
import re
from typing import NamedTuple

from spatialthinker.answer_grammar import is_denied, plain_text, singular, statements

MRA_THRESHOLDS = tuple(0.5 + 0.05 * step for step in range(10))
"""Confidence levels of the mean relative accuracy: https://arxiv.org/abs/2412.14171, section 3.2."""

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_WORDS = {word: value for value, word in enumerate(_SMALL)}
_WORDS |= {ten: 20 + 10 * i for i, ten in enumerate(_TENS)}
_WORDS |= {f"{ten}-{one}": 20 + 10 * i + j for i, ten in enumerate(_TENS) for j, one in enumerate(_SMALL[1:10], 1)}
_WORDS |= {"single": 1, "none": 0, "half": 0.5, "quarter": 0.25}
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 1_000_000}
_ONE_WORD = "|".join(sorted([*_WORDS, *_SCALES], key=len, reverse=True))
_WORD = re.compile(rf"(?<![\w-])(?:{_ONE_WORD})(?:(?: and)? (?:{_ONE_WORD})){{0,8}}(?![\w-])")
_ORDINALS = "third fourth fifth sixth seventh eighth ninth tenth".split()
_PARTS = {
    "half": 2,
    "halves": 2,
    "quarter": 4,
    "quarters": 4,
    **{f"{part}s": i for i, part in enumerate(_ORDINALS, 3)},
}
_PARTS |= {rf"{part}(?= of\b|\W*$)": i for i, part in enumerate(_ORDINALS, 3)}  # but not "one third chair"
_PART = re.compile(
    rf"(?<![\w-])(an?|{'|'.join(_SMALL[1:])})[ -](?:{'|'.join(f'({part})' for part in _PARTS)})(?![\w-])"
)
_SCALED = re.compile(rf"(?<![\w.,])(\d+(?:\.\d+)?) ({'|'.join(_SCALES)})(?![\w-])")
_NO_THING = re.compile(r"(?:there (?:is|are|were) )?(?:no|zero|not any)\b(?! one) [\w ]{1,40}")
_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d)\.(?!\d))?(?:e[-+]?\d{1,3})?(?:\s?/\s?\d+(?![\w.]))?"
)
_MIXED = re.compile(r"(?<![\w.])(\d+)[ -](?:and )?(\d+)\s?/\s?(\d+)(?![\w.])")
_RESULT = re.compile(r"(?:=|->|≈|\b(?:so|thus|therefore|hence|total of|in total)\b)\s{0,3}")
_RANGE = re.compile(
    r"\d\s?(?:-|–|to|or|and|~)\s?(?:\d|more|less|fewer)|\d\+|"
    r"\b(?:at least|at most|more than|less than|between|not|if)\s\d"
)
_DENIED_NUMBER = rf"(?:\d[\d.,/]*|(?:{_ONE_WORD})(?: (?:{_ONE_WORD})){{0,8}})(?![\w-])"
_DENIED = re.compile(
    rf",?\s?\b(?:not|rather than|instead of) {_DENIED_NUMBER}(?:,? (?:n?or )?{_DENIED_NUMBER}){{0,9}}"
)
_UNITS = {"mm": ("m", 1e-3), "cm": ("m", 1e-2), "m": ("m", 1.0), "km": ("m", 1e3), "in": ("m", 0.0254)}
_UNITS |= {"ft": ("m", 0.3048), "yd": ("m", 0.9144), "mi": ("m", 1609.344)}
_UNITS |= {"ms": ("s", 1e-3), "s": ("s", 1.0), "min": ("s", 60.0), "h": ("s", 3600.0), "d": ("s", 86400.0)}
_UNITS |= {"g": ("g", 1.0), "kg": ("g", 1e3), "%": ("%", 1.0), "deg": ("deg", 1.0)}
_ALIASES = {"millimeter": "mm", "centimeter": "cm", "meter": "m", "kilometer": "km", "millimetre": "mm"}
_ALIASES |= {"centimetre": "cm", "metre": "m", "kilometre": "km", "inch": "in", "inches": "in", "foot": "ft"}
_ALIASES |= {"feet": "ft", "yard": "yd", "mile": "mi", "second": "s", "sec": "s", "minute": "min", "hour": "h"}
_ALIASES |= {"hr": "h", "day": "d", "gram": "g", "kilogram": "kg", "percent": "%", "degree": "deg", "°": "deg"}
_UNIT = re.compile(r"\s{0,2}(?!in [a-z])(?:\^\{?\\circ\}?|[%°]|[a-z]+)")

_CURRENCIES = {"$": "dollars", "€": "euros", "£": "pounds"}
_CURRENCY = re.compile(r"([$€£])\s?(\d[\d.,]*)(?![^$]*\$)")
_COUNTED = re.compile(
    r"[\s{]{0,3}(?:more )?(?:of )?(?:the |these |those |them |such )?((?:(?!(?:in|on|at|of|to|from|and|or|with|near"
    r"|is|are|that"
    r"|which|who|by|for|per|out|i|because|since|as|but|though|not|so|while|when|if)\b)[a-z][a-z'-]*\s?){1,4})"
)
_NOT_COUNTED = frozenset(
    "in on at total all altogether wide long tall high deep away apart exactly only here there visible present "
    "objects object things thing items item times pieces them these those answer option choice number count about "
    "roughly around approximately is be total no the equals".split()
)
_LABEL = re.compile(r"(?:.{0,20}\bnumber of ([a-z' -]{1,40}?)|(?:the )?([a-z]+))\s?(?:is|are|:|=)?\s?")


class Number(NamedTuple):
    """A number, its unit's short name, "" without one that is known, and the words for what is counted."""

    value: float
    unit: str
    counted: tuple[str, ...] = ()


def mean_relative_accuracy(predicted: float, true: float) -> float:
    """Return the share of thresholds t with |predicted - true| / |true| < 1 - t; 1 or 0 where the true value is 0."""
    error = abs(predicted - true) / abs(true) if true else math.inf * (predicted != true) if predicted != true else 0.0
    return sum(error < 1 - threshold - 1e-12 for threshold in MRA_THRESHOLDS) / len(MRA_THRESHOLDS)


def unboxed(text: str) -> str:
    """Return what stands in the last box, braces balanced, or the text."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return text
    start += len("\\boxed{")
    depth = 1
    for position in range(start, min(len(text), start + 1000)):
        depth += (text[position] == "{") - (text[position] == "}")
        if depth == 0:
            return text[start:position]
    return text


def stated_texts(raw: str) -> list[str]:
    """Return the texts that may be the answer: the last statement's, then the whole."""
    plain = plain_text(raw)
    stated = [re.split(r"\n|\.\s|\.$", text, maxsplit=1)[0] for text in statements(plain) if not is_denied(text)]
    return [text for text in (*stated[-1:], plain if stated else raw.strip()) if text][
        : 1 if stated and stated[-1] else 2
    ]


def parse_quantity(text: str) -> Number | None:
    """Return the one number that a text states, in digits or words, and its unit; None for none, several or a range.

    Where a calculation or a conclusion is written out, its result counts: "1 + 2 = 3", "... so 0".
    """
    plain = re.sub(r"\\[dt]?frac\s?\{(\d+)\}\s?\{(\d+)\}", r"\1/\2", text[:4000].lower())
    plain = plain_math(_CURRENCY.sub(lambda match: f"{match[2]} {_CURRENCIES[match[1]]}", plain))
    if results := list(_RESULT.finditer(plain)):
        tail = plain[results[-1].end() :]
        plain = tail if _NUMBER_IN.search(tail) or _WORD.search(tail) else plain
    if _NO_THING.fullmatch(none := plain.strip(" .")):
        return Number(0.0, "", _find_counted(none, *re.search(r"\b(?:no|zero|any)\b", none).span()))  # type: ignore
    plain = _DENIED.sub(
        "", re.sub(r"\ban? (\w+) and a half\b", r"1.5 \1", plain.replace("-and-a-half", " and a half"))
    )
    plain = _PART.sub(_part, plain)
    if _RANGE.search(_MIXED.sub("", plain)):
        return None
    plain = _SCALED.sub(lambda m: f"{float(m[1]) * _SCALES[m[2]]:.10g}", re.sub(r"\bhalf a dozen\b", "6", plain))
    plain = _WORD.sub(
        lambda match: _spelled_out(match[0]), re.sub(r"\b(?:this|that|the|no) one\b|\bone of\b", "", plain)
    )
    plain = re.sub(r"\b(?:minus|negative) (?=[\d.])", "-", plain)
    plain = _MIXED.sub(lambda m: str(float(m[1]) + float(m[2]) / max(float(m[3]), 1.0)), plain)
    found = [match for match in _NUMBER.finditer(plain) if any(char.isdigit() for char in match[0])]
    numbers = {_value(match[0]): match for match in found}
    if len(numbers) != 1 or None in numbers:
        return None
    (value, match) = next(iter(numbers.items()))
    unit = _UNIT.match(plain, match.end())
    if re.match(r"[a-z](?![a-z])", plain[match.end() :]) and not _unit_name(plain[match.end()]):
        return None  # 5x
    name = _unit_name(unit[0].strip()) if unit else ""
    return Number(value or 0.0, name, () if name else _find_counted(plain, *match.span()))


def _find_counted(text: str, start: int, end: int) -> tuple[str, ...]:
    """Return the words for what the number between these positions counts, the noun last; () where none are said."""
    after = _COUNTED.match(text, end)
    words = [word for word in (after[1].split() if after else ()) if word not in _NOT_COUNTED]
    if not words and (label := _LABEL.fullmatch(text[:start].strip())):  # "number of dogs: 2", "image 2"
        words = [word for word in (label[1] or label[2]).split() if word not in _NOT_COUNTED]
    return tuple(singular(word) for word in words)


def is_same_kind(found: Number, wanted: Number) -> bool:
    """False where both say what they count and it differs: two cats are not two dogs, 5 people no 5 m.

    Abbreviations, which have no vowel, are not compared.
    """
    a, b = (number.counted or ((number.unit,) if number.unit else ()) for number in (found, wanted))
    if not a or not b or (found.unit and wanted.unit):
        return True
    if {a[-1], b[-1]} == {"am", "pm"}:
        return False
    is_abbreviated = any(
        number.counted and not re.search(r"[aeiouy]", number.counted[-1]) for number in (found, wanted)
    )
    is_disjoint = a[-1] == b[-1] and a[:-1] and b[:-1] and not set(a[:-1]) & set(b[:-1])  # red chairs, blue chairs
    return is_abbreviated or ((a[-1] in b or b[-1] in a) and not is_disjoint)  # "3 people sitting" are 3 people


def _part(match: re.Match[str]) -> str:
    """Return "3/4" for "three quarters"."""
    divisor = list(_PARTS.values())[(match.lastindex or 0) - 2]
    return f"{_WORDS.get(match[1], 1)}/{divisor}"


_NUMBER_IN = re.compile(r"\d")
_MANTISSA = re.compile(r"[-+]?\.?\d")


def _spelled_out(words: str) -> str:
    """Return the digits of a number in words: "one hundred and five" is 105; other words stay apart."""
    total, current = 0.0, 0.0
    for word in words.split():
        if word in _SCALES:
            current = (current or 1) * _SCALES[word]
            if word != "hundred":
                total, current = total + current, 0.0
        elif word != "and":
            if 0 < current < 100 and current % 10 != 0 or current == 0 and word != words.split()[0] and not total:
                return words  # "one two"
            current += _WORDS[word]
    return f"{total + current:g}" if total + current < 1e6 else str(int(total + current))


def _value(text: str) -> float | None:
    number, _, divisor = text.replace(",", "").replace(" ", "").partition("/")
    if not _MANTISSA.match(number) or (divisor and not float(divisor)):
        return None  # "/6", "e5"
    value = float(number) / float(divisor or 1)
    return None if math.isnan(value) else value


def _unit_name(text: str) -> str:
    if "circ" in text:
        return "deg"
    name = _ALIASES.get(text) or _ALIASES.get(text.rstrip("s")) or text
    return name if name in _UNITS else ""


def converted(found: Number, wanted: Number) -> float | None:
    """Return a number's value in the other's unit; None where unit or counted things are of another kind."""
    if not is_same_kind(found, wanted):
        return None
    if not (found.unit and wanted.unit):
        return found.value
    (kind, scale), (true_kind, true_scale) = _UNITS[found.unit], _UNITS[wanted.unit]
    return found.value * (scale / true_scale) if kind == true_kind else None


def is_currency(text: str) -> bool:
    """True where a text holds a sum of money, whose sign is no mathematics."""
    return _CURRENCY.search(text) is not None


def without_units(text: str) -> str:
    text = re.sub(r"\^\s?\{?\\circ\}?", "", text)
    return re.sub(r"(?<=\d)\s{0,2}[a-z]{1,2}(?![a-z])", lambda m: "" if _unit_name(m[0].strip()) else m[0], text)


def plain_math(text: str) -> str:
    for old, new in (
        ("−", "-"),
        ("–", "-"),
        ("—", "-"),
        ("≈", ""),
        ("\\$", ""),
        ("$", ""),
        ("½", " 1/2"),
        ("¼", " 1/4"),
        ("¾", " 3/4"),
        ("⅓", " 1/3"),
        ("⅔", " 2/3"),
    ):
        text = text.replace(old, new)
    return re.sub(r"\\(?:text|mathrm|left|right|,|!|;| )|[*_`\"](?=\W|$)|(?<!\S)[*_`\"]+", "", text)

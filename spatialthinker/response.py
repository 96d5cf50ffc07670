"""Parsing of a model's response: its four tagged sections and its answer.

The sections come in the order `<observe>`, `<scene>` (JSON), `<think>`, `<answer>`. All searches are linear in
the length of the text, whatever it holds.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from spatialthinker.answer_grammar import (
    BARE_LETTER,
    LETTER_IN_SENTENCE,
    LETTERS,
    MAX_CACHED_CHARS,
    OR_MAYBE,
    REFUSAL,
    WITHDRAWAL,
    ascii_signs,
    gives_reason,
    is_denial,
    is_denied,
    is_denied_letter,
    is_hedged,
    is_undecided,
    marked_letters,
    mentions,
    normalize,
    ordinal_index,
    plain_text,
    split_label,
    stated_letters,
    statements,
    verdicts,
    without_lead,
)

SECTIONS = ("observe", "scene", "think", "answer")
"""The tags of a full response, in the prompt's order."""

Kind = Literal["letter", "text", "number", "conflict", "unparsed", "truncated"]
"""letter: named by its letter, with or without its text; text: by its text alone; number: an open answer read as a
number; conflict: letter and text, or several letters, disagree; unparsed: nothing that could be read; truncated: the
response ended at its length limit before an answer."""

_TAGS = tuple((f"<{tag}>", f"</{tag}>") for tag in SECTIONS)
_NO_TAG = "[^<]*+"
_CANONICAL = re.compile(_NO_TAG + _NO_TAG.join(f"<{tag}>({_NO_TAG})</{tag}>" for tag in SECTIONS) + _NO_TAG)
"""A response with no other `<` than those of its four sections: nearly all of a trained model's."""
_SEAMS = tuple(re.compile(rf"</{a}>\s*<{b}>") for a, b in zip(SECTIONS, SECTIONS[1:], strict=False))
_THINK_ANSWER_SEAM = re.compile(r"</think>\s*<answer>")
_TAG = re.compile(
    r"<\s{0,4}(/?)\s{0,4}(think(?:ing)?|thoughts?|reason(?:ing)?|analysis|reflection|scratchpad|observe|scene|answer)"
    r"\s{0,4}>|\[(/?)(THINK)\]",
    re.IGNORECASE,
)
_FINAL_CHANNEL = "<|channel|>final<|message|>"
_ENDS_OF_TURN = re.compile(r"<\|(?:im_end|endoftext|eot_id|end|return)\|>|</s>|<eos>|<end_of_turn>")
_MAX_RESPONSE_CHARS = 200_000
"""Longer responses are read at their beginning and their end, half of this each."""
_LIST_LINES = 60
NUMBER_WORDS: tuple[str, ...] = tuple("zero one two three four five six seven eight nine ten eleven twelve".split())
_NUMBER_WORD = re.compile(rf"(?<![\w-])({'|'.join(NUMBER_WORDS)})(?![\w-])", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\n|(?<=[.!?])\s(?!\w{1,12}\s{0,2}$)")
_CLAUSE_END = re.compile(r"[:;.!?](?:\s|$)")
_NONE_OPTION = re.compile(r"(?:none|neither)\b.*", re.IGNORECASE)
_CONCLUSION = re.compile(
    r"\b(?:so|thus|therefore|hence|overall|in conclusion|in total)\b,? |\bi (?:count|see) |(?:->|=)\s|"
    r"\bmak(?:es?|ing) (?=\d)",
    re.IGNORECASE,
)


class Response(NamedTuple):
    """The text of each section's first pair of tags; None when there is no such pair."""

    observe: str | None
    scene_text: str | None
    think: str | None
    answer: str | None


def section(text: str, tag: str) -> str | None:
    """Returns the text between the first `<tag>` and the `</tag>` after it, or None."""
    return _between(text, f"<{tag}>", f"</{tag}>")


def _between(text: str, opening: str, closing: str) -> str | None:
    start = text.find(opening)
    if start < 0:
        return None
    start += len(opening)
    end = text.find(closing, start)
    return None if end < 0 else text[start:end]


def parse_response(text: str) -> Response:
    """Returns the sections of a response; the answer comes without surrounding blanks."""
    canonical = _CANONICAL.fullmatch(text)  # seven times faster than the searches
    observe, scene, think, answer = canonical.groups() if canonical else [_between(text, *pair) for pair in _TAGS]
    return Response(observe, scene, think, None if answer is None else answer.strip())


def is_think_answer(text: str) -> bool:
    """True when the text is exactly a think block, optional blanks and an answer block."""
    return _is_chain(text, "<think>", (_THINK_ANSWER_SEAM,), "</answer>")


def is_four_sections(text: str) -> bool:
    """True when the text is exactly the four blocks in order with only blanks between them."""
    return _is_chain(text, "<observe>", _SEAMS, "</answer>")


def _is_chain(text: str, opening: str, seams: tuple[re.Pattern[str], ...], closing: str) -> bool:
    if not (text.startswith(opening) and text.endswith(closing)):
        return False
    position, limit = len(opening), len(text) - len(closing)
    for seam in seams:
        match = seam.search(text, position, max(limit, position))
        if match is None:
            return False
        position = match.end()
    return True


def find_answer(text: str, finish_reason: str | None = None) -> str | None:
    """Returns the part of a response that is its answer, or None where it holds none.

    Thinking is left out: pairs of tags, what stands before a lone closing tag and after a lone opening one. Of the
    rest it is the last pair of answer tags that holds something, what follows an opening one alone, else all of it.
    A response cut off at its length limit has an answer only within a closed pair.
    """
    if len(text) > _MAX_RESPONSE_CHARS:
        text = f"{text[: _MAX_RESPONSE_CHARS // 2]}\n{text[-_MAX_RESPONSE_CHARS // 2 :]}"
    text = _ENDS_OF_TURN.sub("\n", ascii_signs(text).rpartition(_FINAL_CHANNEL)[2])
    outside: list[str] = []
    pairs: list[str] = []
    opened: int | None = None  # number of texts outside before an answer's opening tag
    position, is_thinking, tag = 0, False, None
    for tag in _TAG.finditer(text):
        is_closing, is_answer = bool(tag[1] or tag[3]), (tag[2] or "").lower() == "answer"
        if is_thinking and (is_answer or not is_closing):
            continue
        if not is_thinking:
            outside.append(text[position : tag.start()])
        position = tag.end()
        if is_answer and opened is not None and (is_closing or outside[-1].strip()):
            pairs += ["".join(outside[opened:]).strip()]
            opened = None if is_closing else len(outside)
        elif is_answer:
            opened = None if is_closing else len(outside)
        elif is_closing:
            if not is_thinking:  # a lone closing tag: everything before it was thinking
                outside, pairs, opened = [], [], None
            is_thinking = False
        else:
            is_thinking = True
    if is_thinking:
        pairs = pairs or _pair_at_end(text)
        return next((pair for pair in reversed(pairs) if pair), None)
    last = text[position:]
    if any(pairs):
        return next(pair for pair in reversed(pairs) if pair)
    if finish_reason == "length" or pairs:
        return None
    if opened is not None:
        return "".join([*outside[opened:], last]).strip() or None
    return " ".join([*outside, last]).strip() or None


def _pair_at_end(text: str) -> list[str]:
    """Returns the answer tags' content at the very end of a response whose thinking was never closed."""
    before, closing, after = text.rpartition("</answer>")
    _, opening, content = before.rpartition("<answer>")
    return [content.strip()] if closing and opening and not after.strip() and not _TAG.search(content) else []


@dataclass(frozen=True)
class Choice:
    """A choice that an answer names; letter None where it names none or several."""

    kind: Kind
    letter: str | None
    text: str | None


_CONFLICT, _UNPARSED = Choice("conflict", None, None), Choice("unparsed", None, None)


def extract_choice(answer: str, options: Sequence[str]) -> Choice:
    """Returns the choice that an answer names by letter, by text or by both, the strongest evidence first.

    1. the whole answer is one option's text; 2. the last explicit statement ("the answer is B"); 3. an option that
    is called right; 4. a letter at a place of its own, the first or last line; 5. the text of one option, affirmed.
    Without options any single letter is accepted. Letter and text of different options are a conflict in which the
    letter counts; several letters are a conflict that names nothing.
    """
    if len(answer) <= MAX_CACHED_CHARS:
        return _extract_short(answer, tuple(options))  # a group's responses repeat each other's answers
    return _extract_choice(answer, tuple(options))


def _extract_choice(answer: str, options: tuple[str, ...]) -> Choice:
    plain = plain_text(answer)
    reader = _reader(options)
    if (index := reader.match_text(plain)) is not None:  # it may be a letter itself
        return reader.choice("text", index)
    withdrawals = list(WITHDRAWAL.finditer(plain))
    choice = reader.read(plain[withdrawals[-1].end() :].strip()) if withdrawals else _UNPARSED
    if choice.letter is None:
        choice = reader.read(plain)
    return _CONFLICT if choice.letter is not None and is_undecided(plain) else choice


_extract_short = lru_cache(maxsize=8192)(_extract_choice)


class _Reader:
    """Reads what plain texts say about these options."""

    def __init__(self, options: tuple[str, ...]) -> None:
        self.options = options[: len(LETTERS)]
        self.known = LETTERS[: len(self.options)] if options else LETTERS
        self.texts = [normalize(option) for option in self.options]
        self.is_numeric = bool(options) and all(text.replace(".", "", 1).isdigit() for text in self.texts)

    def read(self, plain: str) -> Choice:
        """The choice by the strongest evidence that there is."""
        for read in (self.read_statements, self.read_verdict, self.read_place, self.read_mentions):
            if (choice := read(plain)) is not None:
                return choice
        return _UNPARSED

    def choice(self, kind: Kind, index: int) -> Choice:
        return Choice(kind, LETTERS[index], self.options[index] if self.options else None)

    def normal(self, text: str) -> str:
        """Returns a normalized text, its numbers as digits among numbers."""
        text = normalize(text)
        if self.is_numeric:
            text = _NUMBER_WORD.sub(lambda match: str(NUMBER_WORDS.index(match[0])), text)
        return text

    def match_text(self, text: str) -> int | None:
        """Returns the option with this text, a leading article aside; None for none, and for several alike."""
        wanted = self.normal(text[:2000])
        if not wanted or len(text) > 2000:
            return None
        found = [i for i, option in enumerate(self.texts) if option == wanted]
        if not found and len(wanted) > 1:
            bare = without_lead(wanted)
            found = [i for i, option in enumerate(self.texts) if without_lead(option) == bare and bare]
        return found[0] if len(found) == 1 else None

    def denies(self, letter: str, rest: str) -> bool:
        """True where what stands after a letter denies it, and is no option's own text, such as "not visible"."""
        if not is_denial(rest):
            return False
        said, text = self.normal(rest), self.texts[self.known.index(letter)] if self.options else ""
        return self.match_text(rest) is None and not (text and said.startswith(text))

    def read_statements(self, plain: str) -> Choice | None:
        """The last statement that names something."""
        for target in reversed(statements(plain)):
            if is_denied(target):
                continue
            if (choice := self.read_target(target)) is not None:
                return choice
        return None

    def read_target(self, target: str) -> Choice | None:
        end = _SENTENCE_END.search(target)
        line = target[: end.start()] if end else target
        if line.endswith("?"):
            return None
        if (index := self.match_text(line)) is not None:
            return self.choice("text", index)
        letters = stated_letters(target, self.known)
        if len(letters) > 1:
            return _CONFLICT
        if letters:
            rest = split_label(target, self.known)[1] if split_label(target, self.known)[0] else target[1:]
            if self.denies(letters[0], rest):
                return None
            return self.with_text(letters[0], rest)
        if not self.options or REFUSAL.search(line):
            return None
        index = None if self.is_numeric else ordinal_index(line, len(self.options))
        if index is not None:
            return self.choice("text", index)
        affirmed, denied, _ = mentions(self.normal(line), self.options)
        if affirmed and denied and OR_MAYBE.search(line):
            return _CONFLICT
        if len(affirmed) == 1:
            return self.choice("text", affirmed[0])
        leading = next((i for i in affirmed if self.normal(line).startswith(self.texts[i])), None)
        if leading is not None and not re.search(r"\b(?:or|and)\b|/", line):
            return self.choice("text", leading)
        return _CONFLICT if affirmed else None

    def with_text(self, letter: str, rest: str) -> Choice:
        """The choice of a letter beside which a text stands: another option's text is a conflict."""
        index = self.match_text(rest.split("\n")[0]) if self.options else None
        text = self.options[self.known.index(letter)] if self.options else (rest.strip() or None)
        is_conflict = index is not None and LETTERS[index] != letter
        return Choice("conflict" if is_conflict else "letter", letter, text)

    def read_verdict(self, plain: str) -> Choice | None:
        found = set(verdicts(plain, self.known))
        if len(found) > 1:
            return _CONFLICT
        return self.with_text(found.pop(), "") if found else None

    def read_place(self, plain: str) -> Choice | None:
        """A letter that begins the first or the last line, unless the lines only list the options."""
        lines = [line.strip() for line in plain.split("\n") if line.strip()]
        if not lines:
            return None
        lines = [*lines[:_LIST_LINES], *lines[-_LIST_LINES:]] if len(lines) > 2 * _LIST_LINES else lines
        labels = [split_label(line, self.known) for line in lines]
        labelled = [
            (i, letter, rest) for i, (letter, rest) in enumerate(labels) if letter and not self.denies(letter, rest)
        ]
        if not labelled:
            return None
        last = len(lines) - 1
        if len(labelled) > 1 and labelled[-1][0] == last:
            return self._last_label(lines, labelled)
        position, letter, rest = labelled[0]
        if position == 0 and (len(labelled) == 1 or len(rest) < 2 or self.match_text(rest) is not None):
            if len(labelled) > 1 and len(rest) >= 2 and labelled[1][0] == 1:  # a list of options
                return _CONFLICT
            return self._labelled(lines[0], letter, rest)
        if position == last:
            return self._labelled(lines[last], letter, rest)
        return None

    def _last_label(self, lines: list[str], labelled: list[tuple[int, str, str]]) -> Choice | None:
        _, letter, rest = labelled[-1]
        _, previous, previous_rest = labelled[-2]
        is_bare, was_bare = len(rest) < 2, len(previous_rest) < 2
        marked = marked_letters(lines[labelled[-2][0]], self.known)
        if len(marked) > 1:  # a line that goes through the options: what stands alone below it is the choice
            return self._labelled(lines[-1], letter, rest)
        if is_bare == was_bare and LETTERS.find(letter) == LETTERS.find(previous) + 1:
            return _CONFLICT
        if letter != previous and is_bare and was_bare:
            return _CONFLICT
        return self._labelled(lines[-1], letter, rest)

    def _labelled(self, line: str, letter: str, rest: str) -> Choice | None:
        if re.match(r"(?:maybe|perhaps|possibly|or not)?\?", rest):
            return None
        others = set(marked_letters(rest, self.known)) - {letter}
        if len(stated_letters(line, self.known)) > 1 or (others and not gives_reason(rest)):
            return _CONFLICT
        return self.with_text(letter, rest)

    def read_mentions(self, plain: str) -> Choice | None:
        """The one option whose text is affirmed, or the one letter that is named in a sentence."""
        letters = list(dict.fromkeys(marked_letters(plain, self.known)))
        if len(letters) > 1:
            return _CONFLICT
        if letters and (is_denied(plain) or is_denied_letter(plain, self.known)):
            return _UNPARSED
        if letters and self.options:
            affirmed, _, _ = mentions(self.normal(plain), self.options)
            choice = self.with_text(letters[0], "")
            is_conflict = len(affirmed) == 1 and LETTERS[affirmed[0]] != letters[0]
            return Choice("conflict", choice.letter, choice.text) if is_conflict else choice
        if letters:
            return self.with_text(letters[0], "")
        if not self.options:
            return None
        if not self.is_numeric and (index := ordinal_index(plain, len(self.options))) is not None:
            return self.choice("text", index)
        return self._mentioned(self.normal(plain)) or self._letter_in_sentence(plain)

    def _mentioned(self, sentence: str) -> Choice | None:
        affirmed, denied, rest = mentions(sentence, self.options)
        if REFUSAL.search(rest):
            return _UNPARSED
        if denied and affirmed and (sentence.startswith("not ") or OR_MAYBE.search(sentence)):
            return _CONFLICT
        if len(affirmed) == 1:
            return self.choice("text", affirmed[0])
        if affirmed:
            return self._conclusion(sentence, affirmed)
        nones = [i for i, text in enumerate(self.texts) if _NONE_OPTION.fullmatch(text)]
        if len(nones) == 1 and len(denied) == len(self.texts) - 1 and nones[0] not in denied:
            return self.choice("text", nones[0])
        return _UNPARSED if denied else None

    def _conclusion(self, sentence: str, affirmed: list[int]) -> Choice:
        """Several options are mentioned: the one that opens a yes or no, or that a last "so ..." concludes."""
        opening = re.match(r"(yes|no)\b[,.;:]", sentence)
        if opening and opening[1] in self.texts:
            return self.choice("text", self.texts.index(opening[1]))
        marks = list(_CONCLUSION.finditer(sentence))
        if marks:
            end = _CLAUSE_END.search(sentence, marks[-1].end())
            found = mentions(sentence[marks[-1].end() : end.start() if end else None], self.options)[0]
            if len(found) == 1:
                return self.choice("text", found[0])
        return _CONFLICT

    def _letter_in_sentence(self, plain: str) -> Choice | None:
        if len(plain) > 200 or REFUSAL.search(plain):
            return None
        if len(set(BARE_LETTER.findall(plain)) & set(self.known)) > 1:
            return _CONFLICT
        named = [match for match in LETTER_IN_SENTENCE.finditer(plain) if not is_hedged(plain, match.end() - 1)]
        found = {"".join(filter(None, match.groups())) for match in named} & set(self.known)
        return self.with_text(found.pop(), "") if len(found) == 1 else None


_reader = lru_cache(maxsize=2048)(_Reader)

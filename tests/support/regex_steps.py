"""Steps of regular expressions, counted by a plain backtracking matcher over Python's own parse tree."""

import re
from collections.abc import Callable, Iterator, Sequence
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from types import ModuleType
from typing import Any

Then = Callable[[int], bool]
REPEATS = (codes.MAX_REPEAT, codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT)
WIDTH_ONE = (codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN)
CLASSES = {
    codes.CATEGORY_SPACE: r"\s",
    codes.CATEGORY_NOT_SPACE: r"\S",
    codes.CATEGORY_DIGIT: r"\d",
    codes.CATEGORY_WORD: r"\w",
}


class StepCounter:
    """Stands in for a compiled pattern: the same results, and the steps that a backtracking matcher takes for them."""

    def __init__(self, pattern: re.Pattern[str], steps: list[int]) -> None:
        self.pattern, self.steps = pattern, steps
        self.tree = list(_parser.parse(pattern.pattern, pattern.flags))
        self.ones: dict[str, re.Pattern[str]] = {}

    def fullmatch(self, text: str) -> re.Match[str] | None:
        self._run(text, self.tree, 0, 0, lambda end: end == len(text))
        return self.pattern.fullmatch(text)

    def match(self, text: str) -> re.Match[str] | None:
        self._run(text, self.tree, 0, 0, lambda _: True)
        return self.pattern.match(text)

    def search(self, text: str, start: int = 0, end: int | None = None) -> re.Match[str] | None:
        end = len(text) if end is None else end
        any(self._run(text[:end], self.tree, 0, place, lambda _: True) for place in range(start, end + 1))
        return self.pattern.search(text, start, end)

    def finditer(self, text: str) -> Iterator[re.Match[str]]:
        place = 0
        while place <= len(text) and (match := self.search(text, place)) is not None:
            yield match
            place = max(match.end(), match.start() + 1)

    def findall(self, text: str) -> list[Any]:
        list(self.finditer(text))
        return self.pattern.findall(text)

    def sub(self, replacement: Any, text: str, count: int = 0) -> str:
        list(self.finditer(text))
        return self.pattern.sub(replacement, text, count=count)

    def _run(self, text: str, nodes: Sequence[Any], index: int, place: int, then: Then) -> bool:
        """True when the nodes from `index` on match at `place` and `then` accepts the end."""
        self.steps[0] += 1
        if index == len(nodes):
            return then(place)
        code, argument = nodes[index]

        def rest(end: int) -> bool:
            return self._run(text, nodes, index + 1, end, then)

        if code in WIDTH_ONE:
            return self._is_one(text, nodes[index], place) and rest(place + 1)
        if code in REPEATS:
            return self._repeat(text, code, argument, place, rest)
        if code is codes.SUBPATTERN:
            return self._run(text, argument[-1], 0, place, rest)
        if code is codes.BRANCH:
            return any(self._run(text, branch, 0, place, rest) for branch in argument[1])
        if code in (codes.ASSERT, codes.ASSERT_NOT):
            direction, inner = argument
            start = place if direction > 0 else place - 1  # all look-behinds here are one character wide
            found = start >= 0 and self._run(text, inner, 0, start, lambda _: True)
            return found == (code is codes.ASSERT) and rest(place)
        if code is codes.AT:
            return self._is_at(text, argument, place) and rest(place)
        raise NotImplementedError(str(code))

    def _repeat(self, text: str, code: Any, argument: Any, place: int, rest: Then) -> bool:
        least, most, inner = argument
        if len(inner) == 1 and inner[0][0] in WIDTH_ONE:
            end = place
            while end - place < most and self._is_one(text, inner[0], end):
                end += 1
            if code is codes.POSSESSIVE_REPEAT:
                return end - place >= least and rest(end)
            ends = range(place + least, end + 1) if code is codes.MIN_REPEAT else range(end, place + least - 1, -1)
            return any(rest(end) for end in ends)

        def again(done: int, start: int) -> bool:
            def once_more(end: int) -> bool:
                return end > start and again(done + 1, end)

            return (done < most and self._run(text, inner, 0, start, once_more)) or (done >= least and rest(start))

        return again(0, place)

    def _is_one(self, text: str, node: Any, place: int) -> bool:
        self.steps[0] += 1
        if place >= len(text):
            return False
        code, argument = node
        if code is codes.ANY:
            return bool(self.pattern.flags & re.DOTALL) or text[place] != "\n"
        one = text[place].casefold() if self.pattern.flags & re.IGNORECASE else text[place]
        if code in (codes.LITERAL, codes.NOT_LITERAL):
            wanted = chr(argument).casefold() if self.pattern.flags & re.IGNORECASE else chr(argument)
            return (one == wanted) == (code is codes.LITERAL)
        return any(self._is_in(item, text[place]) for item in argument if item[0] is not codes.NEGATE) != (
            argument[0][0] is codes.NEGATE
        )

    def _is_in(self, item: Any, one: str) -> bool:
        code, argument = item
        if code is codes.LITERAL:
            return ord(one) == argument
        if code is codes.RANGE:
            return argument[0] <= ord(one) <= argument[1]
        return re.match(CLASSES[argument], one) is not None

    def _is_at(self, text: str, argument: Any, place: int) -> bool:
        if argument in (codes.AT_BEGINNING, codes.AT_BEGINNING_STRING):
            return place == 0
        if argument in (codes.AT_END, codes.AT_END_STRING):
            return place == len(text) or (argument is codes.AT_END and text[place:] == "\n")
        sides = [0 <= i < len(text) and re.match(r"\w", text[i]) is not None for i in (place - 1, place)]
        return (sides[0] != sides[1]) == (argument is codes.AT_BOUNDARY)


class _CountingRe:
    """The functions of `re` that a module calls with the text of a pattern."""

    def __init__(self, steps: list[int]) -> None:
        self.escape, self.steps = re.escape, steps

    def search(self, pattern: str, text: str) -> re.Match[str] | None:
        return StepCounter(re.compile(pattern), self.steps).search(text)

    def findall(self, pattern: str, text: str) -> list[Any]:
        return StepCounter(re.compile(pattern), self.steps).findall(text)

    def sub(self, pattern: str, replacement: str, text: str) -> str:
        return StepCounter(re.compile(pattern), self.steps).sub(replacement, text)


def count_steps(monkeypatch: Any, module: ModuleType, work: Callable[[], object]) -> int:
    """Return the steps of all regular expressions that `work` runs in a module."""
    steps = [0]

    def counted(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(counted(item) for item in value)
        return StepCounter(value, steps) if isinstance(value, re.Pattern) else value

    with monkeypatch.context() as patch:
        for name, value in vars(module).items():
            if isinstance(value, re.Pattern | tuple):
                patch.setattr(module, name, counted(value))
        patch.setattr(module, "re", _CountingRe(steps))
        work()
    return steps[0]

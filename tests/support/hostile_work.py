"""Long hostile responses, and the work that scoring one may cost, counted rather than timed."""

import json
import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from scipy import optimize

import spatialthinker
from spatialthinker import matching, scene_graph
from spatialthinker.rewards import equality

PACKAGE = spatialthinker.__path__[0]


def fill(unit, size=65_536):
    return (unit * (size // len(unit) + 1))[:size]


def around(scene, answer="(B) left of it"):
    return f"<observe></observe><scene>{scene}</scene><think></think><answer>{answer}</answer>"


def many(number, name):
    return json.dumps({"objects": [{"id": f"{name(i)}.{i}", "bbox": [i % 9, 1, 20, 9]} for i in range(number)]})


def word(number):
    return "".join(chr(97 + number // 26**k % 26) for k in range(3))


def many_relations(number, predicate):
    relations = [f'{{"subject":"a.1","predicate":"{predicate(i)}","object":"b.1"}}' for i in range(number)]
    return '{"relationships":[' + ",".join(relations) + "]}"


LONG = {
    **{
        f"only {unit!r}": fill(unit)
        for unit in (" ", "\n", "<", "< / > ", "9", "\0", "\ud800", "語", "[", '{"a":', "\\")
    },
    **{
        f"tags {unit!r}": fill(unit)
        for unit in ("<answer>", "</think>", "<answer>\n", "<answer></answer>", "<scene>{}")
    },
    "seams": "<observe>" + fill("</observe> ") + "</answer>",
    "answers": "<think>" + fill("</think> <answer>") + "</answer>",
    "boxes": "<think></think>" + fill("\\boxed{"),
    "braces": "<think></think>\\boxed{" + fill("{}"),
    "fractions": "<think></think><answer>" + fill("\\frac{1}{2}", 1000) + "</answer>",
    "wrappers": "<think></think><answer>" + fill("\\text{", 900) + fill("}", 100) + "</answer>",
    "digits": "<think></think><answer>" + fill("9", 60_000) + "</answer>",
    "blank answer": "<think></think><answer>1" + fill(" ", 1000) + "m</answer>",
    "deep scene": around(fill("[", 32_000)),
    "deeper scene": around(fill('{"a":', 32_000)),
    "long id": around(json.dumps({"objects": [{"id": "a" * 32_000 + ".1", "bbox": [1, 2, 3, 4]}]})),
    "huge integer": around('{"objects": [{"id": "a.1", "bbox": [1, 2, 3, ' + "9" * 30_000 + "]}]}"),
    "one label": around(many(600, lambda i: "cat")),
    "many labels": around(many(600, lambda i: "".join(chr(97 + i // 26**k % 26) for k in range(3)))),
    "special words": around(many(500, lambda i: "cant_im_" + chr(97 + i % 26) + chr(97 + i // 26))),
    "10,000 boxes": around(many(10_000, lambda i: "cat")),
    "same relations": around(many_relations(540, lambda i: "on")),
    "odd words": around(many_relations(185, lambda i: " ".join(f"{word(i * 37 + j)}'" for j in range(25)))),
    "few odd words": around(many_relations(480, lambda i: f"{word(2 * i)}' {word(2 * i + 1)}'")),
    "an odd word": around(many_relations(560, lambda i: f"'{word(i)}'")),
    "signs": around(many_relations(185, lambda i: "'" * 60 + word(i) + "'" * 60)),
    "plain words": around(many_relations(185, lambda i: " ".join(word(i * 37 + j) for j in range(30)))),
    "a long odd word": around(many_relations(1, lambda i: "\u8a9e" * 30_000)),
    "long words": around(many_relations(180, lambda i: chr(0x4E00 + i) * 120)),
}


MOST_WORK = {
    "decoded characters": 32_768,
    "compared characters": 512,
    "tokenized words": 600,
    "tokenized signs": 1_200,
    "longest tokenized word": 128,
    "looked-up tokens": 10_000,
    "similarities": 10_000,
    "assigned pairs": 10_000,
    "executed lines": 250_000,
}
"""Most of each kind that one response of 65,536 characters may cost."""


def count_work(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> Counter[str]:
    """Return how much of each kind of work a call does."""
    counts = Counter[str]()

    def count(owner: Any, name: str, measure: Callable[..., dict[str, int]]) -> None:
        function = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            result = None
            try:
                result = function(*args, **kwargs)
                return result
            finally:
                counts.update(measure(result, *args))

        patch.setattr(owner, name, counted)

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        counts["executed lines"] += event == "line"
        return trace

    solve = optimize.linear_sum_assignment

    def solve_counted(gain: Any, **kwargs: Any) -> Any:
        counts["assigned pairs"] += gain.size
        return solve(gain, **kwargs)

    def measure_word(_: object, __: object, word: str) -> dict[str, int]:
        counts["longest tokenized word"] = max(counts["longest tokenized word"], len(word))
        return {"tokenized words": 1, "tokenized signs": sum(not letter.isalpha() for letter in word)}

    with monkeypatch.context() as patch:
        patch.setattr(optimize, "linear_sum_assignment", solve_counted)
        count(matching, "label_similarity", lambda result, *_: {"similarities": result.size})
        count(matching.LabelVectors, "_split", measure_word)
        count(matching.LabelVectors, "_tokens", lambda result, *_: {"looked-up tokens": len(result)})
        count(equality, "_plain", lambda _, text: {"compared characters": len(text)})
        count(scene_graph, "_decode", lambda _, __, text: {"decoded characters": len(text)})
        sys.settrace(trace)
        try:
            work()
        finally:
            sys.settrace(None)
    return counts

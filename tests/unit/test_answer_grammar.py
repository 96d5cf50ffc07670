# ruff: noqa: E501 - tables of texts
"""Answers in thousands of forms: statements x reasoning before them x letters x decorations, in several languages."""

import json
from itertools import product
from pathlib import Path

import pytest

from evaluation.scoring.strict import Reference, grade_response, resolve_reference

CAREFUL_ANSWERS = Path(__file__).parents[1] / "support/careful_answers.jsonl"
THINGS = ("the red mug", "the blue bowl", "the lamp", "the book")
PETS = ("dog", "cat", "cow", "hen")
SIDES = ("left", "right", "above", "below")
BODIES = {
    "none": "",
    "names the options": "I look at each one. There is {0} at the back, {1} and {2} are near, and {3} is far away.\n\n",
    "names letters": "Option A could fit, B is too small, and C is hidden. D remains to be checked.\n\n",
    "one line": "(A) {0} is far. (B) {1} is at the edge. (C) {2} is behind. (D) {3} is on the shelf.\n\n",
    "a list": "A. {0}: too far.\nB. {1}: near the edge.\nC. {2}: hidden.\nD. {3}: on the shelf.\n\n",
    "bullets": "- **A**: {0}, no match\n- **B**: {1}, no match\n- **C**: {2}, perhaps\n- **D**: {3}, perhaps\n\n",
    "denies": "It is not {0}, and the answer is not obvious at first sight.\n\n",
    "an earlier statement": "At first sight the answer is A. Wait, let me check again.\n\n",
    "thinking": "<think>It may be (A) or (C). <answer>(A)</answer> is the form.</think>\n",
    "other thinking": "◁think▷It may be {0} or (C)◁/think▷",
    "lone end": "So maybe (A), or {2}.\n</think>\n\n",
    "steps": "Step 1: find the objects.\nStep 2: compare 3 distances: 1.5, 2 and 4.\nStep 3: decide.\n\n",
}
STATEMENTS = (
    "The answer is {x}.", "The correct answer is {x}.", "Therefore, the correct option is {x}.", "Answer: {x}",
    "Final answer: {x}", "**Final Answer:** {x}", "### Final Answer\n{x}", "**Answer**: {x}", "My answer: {x}",
    "So the best choice would be {x}.", "Hence the answer should be {x}.", "I would choose {x}.", "I'll go with {x}.",
    "Therefore, I pick option {x}.", "My final answer is {x}.", "Thus, the answer must be {x}.", "So it is {x}.",
    "The final answer is: $\\boxed{{{x}}}$", "\\[\\boxed{{\\text{{{x}}}}}\\]", "Thus, $\\boxed{{{x}}}$.",
    "Therefore, the answer is:\n\n{x}", "<answer>{x}</answer>", "<Answer> {x} </Answer>", "<answer>The answer is {x}</answer>",
    '{{"answer": "{x}"}}', '```json\n{{"answer": "{x}"}}\n```', "The answer to this question is {x}.", "Answer - {x}",
    "The right answer here is {x}.", "Correct answer: {x}", "Answer = {x}", "{x}", "**{x}**", "> {x}",
    "答案是{x}", "答案：{x}。", "正确答案是{x}。", "因此，答案为{x}", "所以选{x}", "【答案】{x}", "答えは{x}です。", "正解：{x}", "정답은 {x}입니다.",
    "정답: {x}", "La réponse est {x}.", "Réponse : {x}", "La bonne réponse est {x}.", "Die Antwort ist {x}.", "Antwort: {x}",
    "Die richtige Antwort lautet {x}.", "La respuesta correcta es {x}.", "Respuesta: {x}", "A resposta correta é {x}.",
    "Resposta final: {x}", "La risposta è {x}.", "Risposta: {x}", "Ответ: {x}", "Правильный ответ: {x}.", "Odpowiedź: {x}",
    "Cevap: {x}", "Jawaban: {x}", "Het antwoord is {x}.", "Svar: {x}", "الإجابة: {x}", "Đáp án: {x}",
)  # fmt: skip
FORMS = (
    "{l}",
    "({l})",
    "**{l}**",
    "({l}) {t}",
    "{l}. {t}",
    "**({l}) {t}**",
    "（{f}）",
    "{l}) {t}",
    "[{l}]",
    "`{l}`",
    "{f}",
    "{l}: {t}",
)
VERDICTS = (
    "Hence, option {l} is correct.", "So ({l}) is the correct answer.", "Option {l} is the best answer.",
    "Therefore, {l} is correct.", "The answer is {l} because it fits.", "The answer is ({l}), since the others do not fit.",
)  # fmt: skip
CASES = [
    (
        body.format(*options),
        statement.format(x=form.format(l=letter, f=chr(ord(letter) + 0xFEE0), t=text)),
        options,
        letter,
    )
    for options in (THINGS, PETS)
    for body, statement, form in product(BODIES.values(), STATEMENTS, FORMS)
    for letter, text in [("ABCD"[len(body + statement + form) % 4], options[len(body + statement + form) % 4])]
]
CASES += [
    (body.format(*THINGS), statement.format(l=letter), THINGS, letter)
    for body, statement, letter in product(BODIES.values(), VERDICTS, "ABCD")
]


def read(text, options):
    return grade_response(text, options, Reference("A", options[0]), "stop").letter


def test_statements_after_reasoning_are_read():
    wrong = [
        (body + said, letter, got)
        for body, said, options, letter in CASES
        if (got := read(body + said, options)) != letter
    ]
    assert len(CASES) > 5000
    assert len(wrong) <= len(CASES) * 0.005, (len(wrong), wrong[:: max(1, len(wrong) // 40)])
    credited = [case for case in wrong if case[2] is not None]
    assert len(credited) <= len(CASES) / 300, credited[:20]


UNSAID = (
    "", "...", "I don't know.", "I cannot tell from the picture.", "It could be {a} or {b}.", "Either A or B.", "A or B",
    "The answer is A or B.", "The answer is either (A) or (B).", "A, B, C, D", "A/B", "(A) {a} (B) {b} (C) {c} (D) {d}",
    "A. {a}\nB. {b}\nC. {c}\nD. {d}", "Options: A. {a}, B. {b}, C. {c}, D. {d}", "The options are {a}, {b}, {c} and {d}.",
    "I'm sorry, but I can't help with that.", "As an AI, I am unable to see images.", "The answer depends on the view.",
    "The answer is not A.", "It is not {a}.", "There is no {a} here.", "The answer is unclear.", "A picture of a street.",
    "The image shows a street with many things.", "Answer:", "The answer is", "<answer></answer>", "<think>It is (A)",
    "Both (A) and (B) are correct.", "None of the options fits.", "Neither A nor B.", "Not A.", "E", "(F)", "答案是A或B",
    "The answer might be A.", "Maybe {a}, maybe {b}.", "Let me think about this step by step.", "A and C", "\\boxed{{}}",
    "I see {a} and {b}.", "The answer could be {a}.", "A: {a}\nB: {b}\nC: {c}\nD: {d}", '["A", "B"]', "Is it A? Or B?",
    "Choose one: A, B, C or D.", "I would need a better picture to choose.", "N/A", "unknown", "Answer: A, B", "A & B",
    "It can't be (A).", "(A) is wrong.", "I don't think that it is (A).", "Anything but (A)", "Maybe (A)", "It isn't {a}, or {b}.",
    "I doubt that the answer is A.", "It is neither {a}, {b}, nor {c}.", "(A) doesn't fit.", "It is possible that it's (A).",
    "I don't think the answer is A.", "There is a chance that it is {a}.", "The {a} can be ruled out.", "Anything but {a}",
)  # fmt: skip


@pytest.mark.parametrize("text", UNSAID)
@pytest.mark.parametrize("options", [THINGS, PETS])
@pytest.mark.parametrize("wrap", ["{}", "<think>a thought</think>{}", "<think>a thought</think><answer>{}</answer>"])
def test_nothing_unsaid_is_credited(text, options, wrap):
    said = text.format(**dict(zip("abcd", options, strict=True)))
    assert read(wrap.format(said), options) is None


PLAIN = {
    PETS: {
        "The animal is a cat.": "B", "This is clearly a cow, not a dog.": "C", "I believe it's a hen": "D",
        "It is a dog, not a cat.": "A", "A cat, because of its whiskers.": "B", "cat (not a dog)": "B",
        "The third option": "C", "Option 4": "D", "B because it is not a dog.": "B", "The answer is B because it is not a dog.": "B",
        "B, because A is a dog and C is a cow.": "B", "It can't be A. It must be (B).": "B", "B is the right answer": "B",
        "b) cat": "B", "(b)": "B", "My choice: **C**": "C", "<answer>A</answer> Wait. <answer>B</answer>": "B",
        "<answer>The animal is a cow.</answer>": "C", "[THINK]dog or cat[/THINK]C": "C", "<ANSWER>C</ANSWER>": "C",
        "Answer:\n\nB": "B", "A) dog: no\nB) cat: yes\nC) cow: no": "B", "Selected option: D": "D", "**Choice C**": "C",
        "<|channel|>analysis<|message|>maybe A<|end|><|start|>assistant<|channel|>final<|message|>B": "B",
        "Hmm, B. Actually no, C.": "C", "The answer is B... no, C.": "C", "(A) is wrong.\n(B) cat": "B", "It's not clear, but (B)": "B",
        "The answer is neither A nor B, it is C.": "C", "The answer was not A - it was B": "B", "The answer isn't A but C.": "C",
        "The answer is B, not A.": "B", "The answer isn't A, it's B. Final answer: B": "B", "The answer is **B** (cat).": "B",
    },
    ("Yes", "No"): {
        "Yes, there are no clouds.": "A", "No, there is not.": "B", "No, the cup is yes-shaped": "B", "The answer is yes": "A",
        "Yes. The dog is not there.": "A", "**No**, it is not possible.": "B", "<answer>yes</answer>": "A",
    },
    ("1", "2", "3", "4"): {
        "There are three chairs.": "C", "I can see 4 of them.": "D", "Two.": "B", "The total is 2 + 1 = 3.": "C", "(C) 3": "C",
        "The answer is 2": "B", "I count two dogs": "B",
    },
    ("Box B", "Box A"): {"Box A": "B", "The answer is Box B": "A", "It is box a.": "B"},
    ("A is closer", "B is closer", "Same distance"): {
        "Same distance": "C", "They are at the same distance.": "C", "B": "B", "A is closer": "A", "A is closer than B.": "A",
        "The answer is A is closer": "A", "Object B is closer": "B",
    },
    SIDES: {"It is on the left.": "A", "to the right": "B", "The lamp is above the sofa.": "C", "It is on the right side": "B"},
    ("north-east", "east", "north"): {"It lies north-east.": "A", "East": "B", "The answer is north.": "C"},
}  # fmt: skip


def read_rightly(row):
    """True where an answer is read as a careful reader reads it."""
    if "choices" in row:
        grade = grade_response(row["text"], row["choices"], Reference("A", row["choices"][0]), row["finish_reason"])
        return grade.letter == row["letter"]
    reference = resolve_reference(row["reference"], "value", ())
    return grade_response(row["text"], (), reference, row["finish_reason"]).is_correct == row["right"]


def test_answers_are_read_as_a_careful_reader_reads_them():
    rows = [json.loads(line) for line in CAREFUL_ANSWERS.read_text("utf-8").splitlines()]
    assert len(rows) >= 60
    assert [row for row in rows if not read_rightly(row)] == []


@pytest.mark.parametrize(
    ("options", "text", "letter"), [(o, t, e) for o, rows in PLAIN.items() for t, e in rows.items()]
)
def test_what_a_careful_reader_takes_an_answer_for(options, text, letter):
    assert read(text, options) == letter

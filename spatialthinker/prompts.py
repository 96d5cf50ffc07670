"""Prompt texts by template name, and the one function that fills them in."""

import re
from string import Template

IMAGE_MARK = "<image>"
_ANSWER_SHAPE = "<answer> ({correct_option}) {correct_answer} </answer>"

_REASONING_RULES = (
    "Think before you answer: write your reasoning as an inner monologue between <think> and </think>, then give the "
    "result between <answer> and </answer>. The answer tags hold nothing but your choice, its letter and its text, "
    f"like this: {_ANSWER_SHAPE}"
)

_SPATIAL_RULES = (
    "Work in four steps. First say what you see that matters for the question, between <observe> and </observe>. "
    "Then write the scene graph of the objects involved, with their relations, between <scene> and </scene>. "
    "Then reason as an inner monologue between <think> and </think>. "
    "Last, give your choice between <answer> and </answer>, its letter and its text and nothing else, "
    f"like this: {_ANSWER_SHAPE}"
)

# Of questions with and without options: the question says in which form its answer is given.
_THINK_ANSWER_RULES = (
    "Look closely and think before you answer: write your reasoning between <think> and </think>, then give nothing "
    "but the answer between <answer> and </answer>. Coordinates are pixels of the image. Where there are options, the "
    "answer is the letter and the text of one of them."
)

# The training prompt. Each of the four tags appears twice on purpose: once in the outline, once in the example.
_SPATIAL_THINKER_FULL = """\
<image>You are a visual reasoning assistant that answers questions about where things are.
Your task:
- Find the objects and the relations that the question is about, and locate each object in the image.
- Build a scene graph of exactly these, and leave out everything else.
- Use the scene graph to think, then choose one option.
Object ids have the form name.number, such as boy.1. Boxes are pixel coordinates [x1, y1, x2, y2].

Write your reply in this form:
<observe>
What the image shows that matters here
</observe>
<scene>
{"objects": [{"id": "name.number", "bbox": [x1, y1, x2, y2]}], \
"relationships": [{"subject": "name.number", "predicate": "relation", "object": "name.number"}]}
</scene>
<think>
How the scene leads to the answer
</think>
<answer>
(letter) text of the option
</answer>

Example:
Q. Where is the man in relation to the bike? Options: (A) behind (B) in front of (C) on top of (D) to the left of
<observe>
A man stands on the far side of a parked bike.
</observe>
<scene>
{"objects": [{"id": "man.1", "bbox": [208, 60, 322, 371]}, {"id": "bike.1", "bbox": [141, 190, 402, 428]}], \
"relationships": [{"subject": "man.1", "predicate": "behind", "object": "bike.1"}]}
</scene>
<think>
The bike hides the legs of the man, so the man is behind the bike.
</think>
<answer>
(A) behind
</answer>

Image size: ($width x $height)
Here is the question:

Q. $question"""

PROMPTS: dict[str, str] = {
    "reasoning": _REASONING_RULES + "\nQuestion: $question",
    "reasoning_end": "Question: $question\nReason between <think> and </think> first, then put the answer between "
    "<answer> and </answer>.",
    "no_reasoning": "Question: $question",
    "spatial_thinker": _SPATIAL_RULES + "\n\nImage size: ($width x $height)\n\nThe question is:\n\n$question",
    "spatial_thinker_full": _SPATIAL_THINKER_FULL,
    "think_answer": IMAGE_MARK + _THINK_ANSWER_RULES + "\n\nImage size: ($width x $height)\n\nQ. $question",
    "vision": "Hint: the picture itself contains the question. Answer the question shown in the picture.",
    "yes_no": "Hint: this question wants yes or no as its answer.\nQuestion: $question",
}

_IMAGE_SIZE = re.compile(r"Image size: \((\d+) x (\d+)\)")


def render_prompt(name: str, question: str, width: int | None = None, height: int | None = None) -> str:
    """The prompt of template `name` for a question (options included in its text).

    `width` and `height` are those of the original image in pixels; templates that state the size need both. Raises
    ValueError for an unknown template or a missing size.
    """
    if name not in PROMPTS:
        raise ValueError(f"unknown prompt template {name!r}; known: {', '.join(PROMPTS)}")
    template = PROMPTS[name]
    if "$width" in template and (width is None or height is None):
        raise ValueError(f"prompt template {name!r} states the image size: got width {width} and height {height}")
    return Template(template).substitute(question=question, width=width, height=height)


def parse_image_size(problem: str) -> tuple[int, int]:
    """(width, height) in pixels from the first `Image size: (W x H)` in a prompt; ValueError when there is none."""
    match = _IMAGE_SIZE.search(problem)
    if match is None:
        raise ValueError("the prompt has no line 'Image size: (W x H)' with two integers")
    return int(match[1]), int(match[2])

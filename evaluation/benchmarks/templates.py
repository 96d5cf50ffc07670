"""The text of a question under a template: one of PROMPTS by its name, or a Jinja file of one's own.

A Jinja file may use `question` (choices included where the benchmark lists them), `choices` (texts), `letters`,
`width` and `height` of the first image, and `sizes`, a list of (width, height) of every image in pixels. It may hold
one image mark `<image>` for each image, at its place; without any the images come first.
"""

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from spatialthinker.prompts import IMAGE_MARK, PROMPTS, render_prompt
from spatialthinker.response import LETTERS

VARIABLES = ("question", "choices", "letters", "width", "height", "sizes")


def is_template_file(template: str) -> bool:
    """True for a template that is a file and none of PROMPTS."""
    return template not in PROMPTS and Path(template).is_file()


def check_template_file(template: str) -> str:
    """Return the file's text. Errors: ValueError for broken Jinja, a variable that we do not know or no question."""
    from jinja2 import TemplateSyntaxError, meta
    from jinja2.sandbox import SandboxedEnvironment

    try:
        text = Path(template).read_text(encoding="utf-8")
        used = meta.find_undeclared_variables(SandboxedEnvironment().parse(text))
    except UnicodeDecodeError as error:
        raise ValueError(f"--template {template}: is not UTF-8 text") from error
    except TemplateSyntaxError as error:
        raise ValueError(f"--template {template}, line {error.lineno}: {error.message}") from error
    if unknown := sorted(used - set(VARIABLES)):
        raise ValueError(f"--template {template}: unknown variable {unknown[0]!r}; known: {', '.join(VARIABLES)}")
    if "question" not in used:
        raise ValueError(f"--template {template}: does not use {{{{ question }}}}")
    return text


def digest_template(template: str) -> str:
    """Return a short hash of a template's text, which tells prompts of one name apart."""
    text = check_template_file(template) if is_template_file(template) else PROMPTS[template]
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@cache
def _compile(template: str):
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(undefined=StrictUndefined).from_string(check_template_file(template))


def render_question(template: str, question: str, choices: Sequence[str], sizes: Sequence[tuple[int, int]]) -> str:
    """Return the prompt without the image mark before it; sizes are (width, height) of every image in pixels."""
    width, height = sizes[0]
    if template in PROMPTS:
        # The templates know one image: of several each one's size is stated, the first in the training form.
        prompt = render_prompt(template, question, width, height).removeprefix(IMAGE_MARK)
        first = f"Image size: ({width} x {height})"
        others = (f"Size of image {i}: ({w} x {h})" for i, (w, h) in enumerate(sizes[1:], 2))
        return prompt.replace(first, "\n".join([first, *others]), 1)
    from jinja2 import TemplateError

    try:
        return _compile(template).render(
            question=question,
            choices=list(choices),
            letters=LETTERS[: len(choices)],
            width=width,
            height=height,
            sizes=list(sizes),
        )
    except TemplateError as error:  # what the sandbox forbids, too
        raise ValueError(f"--template {template}: {error}") from None

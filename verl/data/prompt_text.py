"""Prompt texts: marks of images and videos, formats around a row's text, and the parts of a chat message."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2.sandbox import SandboxedEnvironment

from verl.config.checks import is_path

IMAGE_TAG = "<image>"
VIDEO_TAG = "<video>"
_TAGS = f"{IMAGE_TAG}|{VIDEO_TAG}"


def without_tags(text: str) -> str:
    """The text without its marks."""
    return re.sub(_TAGS, "", text)


def video_places(text: str) -> list[int]:
    """Places of the videos among all marks of the text."""
    return [place for place, tag in enumerate(re.findall(_TAGS, text)) if tag == VIDEO_TAG]


def split_parts(text: str) -> list[dict[str, Any]]:
    """The text as parts of a chat message: texts, and an image or a video for each mark."""
    content: list[dict[str, Any]] = []
    for part in re.split(f"({_TAGS})", text):
        if part in (IMAGE_TAG, VIDEO_TAG):
            content.append({"type": part.strip("<>")})
        elif part:
            content.append({"type": "text", "text": part})
    return content


def read_format_prompt(format_prompt: str | None) -> Callable[[str], str]:
    """The function that formats a row's text as a prompt."""
    if format_prompt is None:
        return lambda content: content
    if is_path(format_prompt):
        template = SandboxedEnvironment().from_string(Path(format_prompt).read_text(encoding="utf-8").strip())
        return lambda content: template.render(content=content)
    text = format_prompt.strip()
    return lambda content: _put_before(text, content)


def _put_before(text: str, content: str) -> str:
    """The text before a row's prompt but behind its image or video, as in the release.

    Of several, which the release does not know, those at the start stay there, unless the text places them.
    """
    if re.search(_TAGS, text):
        return f"{text} {without_tags(content).lstrip()}"
    tags = re.findall(_TAGS, content)
    if len(tags) == 1:
        return f"{tags[0]} {without_tags(f'{text} {content}').strip()}"
    rest = re.sub(rf"^(\s*({_TAGS}))+", "", content)
    first = content.removesuffix(rest).lstrip()
    return f"{first} {text} {rest}" if first else f"{text} {rest}"

"""`RewardError`, and the words for what a user's code raised or returned."""

import traceback
from collections.abc import Callable, Mapping, Sequence
from inspect import iscoroutine
from typing import Any


class RewardError(RuntimeError):
    """A reward function raised, did not return, or returned invalid scores; the message names function and row."""


def call_function(call: Callable[[], Any], items: Sequence[Mapping[str, Any]]) -> Any:
    """The result of a user's code, which may raise anything, leave the process or raise what cannot be pickled."""
    try:
        result = call()
    except RewardError:
        raise
    except BaseException as error:  # noqa: BLE001  SystemExit too, which would end the driver without a word
        raise RewardError(f"the reward function raised {describe(error)} while it scored {name_rows(items)}") from None
    if iscoroutine(result):
        result.close()  # or Python would warn that nobody awaited it
        raise RewardError(
            f"the reward function returned a coroutine, and scores {name_rows(items)} never; define it by async def"
        )
    return result


def describe(error: BaseException) -> str:
    """The error's type, text and place."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {as_text(error, str)} ({frame.filename}, line {frame.lineno})"


def name_rows(items: Sequence[Mapping[str, Any]]) -> str:
    """The rows of the items in words."""
    rows = list(dict.fromkeys(str(item.get("uid")) for item in items))
    more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(rows[:3])}{more}"


def show(value: Any) -> str:
    """The value as it is printed, cut to 80 characters."""
    text = as_text(value, repr)
    return text if len(text) <= 80 else f"{text[:80]} ..."


def as_text(value: Any, convert: Callable[[Any], str]) -> str:
    """The value as text; its own conversion is the user's code, which may fail."""
    try:
        return convert(value)
    except Exception as error:  # noqa: BLE001
        return f"a {type(value).__name__} whose text cannot be made ({type(error).__name__})"

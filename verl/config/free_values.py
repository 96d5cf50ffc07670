"""`read_free_value`: values of dictionaries whose keys are free, as they stand on the command line."""

import re
from typing import Any

from yaml import SafeLoader, ScalarNode


class _FreeValues(SafeLoader):
    """YAML that reads no more than JSON does as something else than text: no dates, no `1_000`, no `yes`."""

    yaml_implicit_resolvers: dict[str, Any] = {}


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"null|Null|NULL", "nN"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|(0|[1-9][0-9]*)(?=[eE]))([eE][-+]?[0-9]+)?", "-+.0123456789"),
):
    _FreeValues.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)


def read_free_value(text: str) -> Any:
    """A list `[...]`, a dictionary `{key: value, ...}`, a number, true, false or null; all else is text as it stands.

    Quotes around the whole make text of anything.

    Raises:
        YAMLError: a list or dictionary that cannot be read.
    """
    ends = text[:1] + text[-1:]
    if ends in ("''", '""') and len(text) > 1:
        return text[1:-1]
    if ends == "[]" or ends == "{}" and (":" in text or not text[1:-1].strip()):
        loader = _FreeValues(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    loader = _FreeValues("")
    return loader.construct_object(ScalarNode(loader.resolve(ScalarNode, text, (True, False)), text))

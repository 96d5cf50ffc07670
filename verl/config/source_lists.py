"""`read_sources`: lists of sources as they are given, each key checked and named."""

import json
from typing import Any

from pydantic import TypeAdapter, ValidationError

from verl.config.fields import find_keys
from verl.config.records import SourceConfig
from verl.config.sources import SOURCE_KEYS


def read_sources(values: dict[str, Any], faults: dict[str, str]) -> None:
    """Checks lists of sources in nested values; a list with a fault is taken out, and named in `faults`."""
    known = find_keys(SourceConfig)
    for key in SOURCE_KEYS:
        data, name = values["data"], key.removeprefix("data.")
        entries = data.get(name) if isinstance(data, dict) else None
        if not isinstance(entries, list):
            continue
        found = {}
        for index, entry in enumerate(entries):
            try:
                TypeAdapter(SourceConfig).validate_json(json.dumps(entry, default=str))
            except ValidationError as error:
                for detail in error.errors(include_url=False):
                    field = str(detail["loc"][0]) if detail["loc"] else ""
                    kind = str(known[field].kind) if field in known else f"one of the keys {', '.join(known)}"
                    value = entry.get(field) if isinstance(entry, dict) else entry
                    found[f"{key}[{index}].{field}"] = f"{key}[{index}].{field} = {value!r}: must be {kind}"
        if not entries:
            found[key] = f"{key} = []: must name a source; give a path, or a list of sources"
        if found:
            faults |= found
            del data[name]

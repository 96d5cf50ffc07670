"""Help of the trainer and `docs/configuration.md`, both from the fields of `verl.config.records`.

python3 -m verl.config.docs --write    writes docs/configuration.md anew; without --write it is printed
"""

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from verl.config.fields import Key, find_keys, find_sections, suggest
from verl.config.old_keys import DERIVED_KEYS, RENAMED_KEYS, SETTLED_KEYS, explain_old_key

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "configuration.md"
USAGE = """\
Usage: python3 -m verl.trainer.main [config=FILE] [key=value ...]

  config=FILE              YAML file with the keys to set; all others keep their defaults
  key=value                such as worker.rollout.n=16; wins over the file; values are YAML, text stays as it stands
  defaults=NAME            defaults of keys left out: paper, or those of easyr1 or release, as a file of theirs takes
  trainer.dry_run=true     prints what the run would do and need, and stops before anything starts
  --help [SECTION | KEY]   prints all keys, those of a section such as worker.rollout, or one
  --list                   prints the recipes, the rewards and the choices
"""


def render_help(names: Sequence[str] = ()) -> str:
    """The usage and every key by section; with names only the keys of these sections or these keys.

    Raises ValueError, with the nearest name, for one that is neither a section nor a key.
    """
    keys = find_keys()
    sections = find_sections(keys)
    for name in names:
        if name not in keys and name not in sections:
            near = f"is no section or key; {suggest(name, [*sections, *keys])}"
            raise ValueError(f"{name} {explain_old_key(name) or near}")
    within = tuple(f"{name}." for name in names) or ""
    picked = {name: key for name, key in keys.items() if f"{name}.".startswith(within)}
    texts = []
    for section, members in _by_section(picked).items():
        lines = [f"{key.name} = {_as_yaml(key.default)}   ({key.kind})\n      {key.meaning}" for key in members]
        texts.append("\n  ".join([section, *lines]) + "\n")
    return "\n".join(texts if names else [USAGE, *texts])


def render_list(rewards: Mapping[str, Callable[..., Any]]) -> str:
    """The recipes with their comments and files, the rewards with their first lines and the choices of each key."""
    recipes = []
    for path in sorted(ROOT.glob("scripts/*.sh")):
        text = path.read_text(encoding="utf-8")
        if "\nexec python3 -m" in text:
            config = re.search(r"config=(\S+)", text)
            comment = text.splitlines()[1].lstrip("# ")
            recipes.append((f"scripts/{path.name}", f"{comment} ({config[1]})" if config else comment))
    scores = [(name, (function.__doc__ or "").partition("\n")[0]) for name, function in rewards.items()]
    choices = [(key.name, ", ".join((key.kind.item or key.kind).choices)) for key in find_keys().values()]
    tables = {
        "Recipes": recipes,
        "Rewards, for worker.reward.score_function": scores,
        "Choices": [(name, values) for name, values in choices if values],
    }
    return "\n".join(f"{title}\n{_columns(rows)}" for title, rows in tables.items())


def render_page() -> str:
    """The page `docs/configuration.md`."""
    keys = find_keys()
    parts = [
        "# Configuration",
        "Written by `python3 -m verl.config.docs --write` from `verl/config/records.py`; the same text is in "
        "`python3 -m verl.trainer.main --help`.",
        "A run is described by `config=FILE` and `key=value` arguments, of which the arguments win. Values are YAML, "
        "but text on the command line is taken as it stands, also inside dictionaries with keys of their own, such as "
        "`worker.reward.reward_function_kwargs.x=a # b`, where only numbers, true, false, null, `[...]` and `{...}` "
        "are no text. Dictionaries are merged key by key, and an unknown key or a value that is not taken ends the "
        "program with "
        "code 2 before anything starts. Defaults are the paper's run; `defaults=easyr1` and `defaults=release` take "
        "[those of the other programs](migration.md#other-defaults), as a file that was written for them does.",
    ]
    for section, members in _by_section(keys).items():
        rows = [(f"`{key.name}`", str(key.kind), f"`{_as_yaml(key.default)}`", key.meaning) for key in members]
        parts += [f"## {section}", _table(("key", "type", "default", "meaning"), rows)]
    renamed = [(f"`{old}`", f"`{new}`") for old, new in RENAMED_KEYS.items()]
    settled = [
        (f"`{key}`", "any" if allowed is None else " or ".join(f"`{_as_yaml(value)}`" for value in allowed), reason)
        for key, (allowed, reason) in SETTLED_KEYS.items()
    ]
    derived = [(f"`{key}`", origin) for key, origin in DERIVED_KEYS.items()]
    parts += ["## Old keys", "Keys of EasyR1 and of SpatialThinker's release that are no keys here."]
    parts += ["### Renamed: taken under the new name", _table(("key", "new name"), renamed)]
    parts += ["### Settled: taken, and nothing follows", _table(("key", "values taken", "reason"), settled)]
    parts += ["### Derived: never set", _table(("key", "follows from"), derived)]
    return "\n\n".join(parts) + "\n"


def _by_section(keys: Mapping[str, Key]) -> dict[str, list[Key]]:
    return {section: list(members) for section, members in groupby(keys.values(), lambda key: key.section)}


def _columns(rows: Sequence[tuple[str, str]]) -> str:
    width = max((len(name) for name, _ in rows), default=0)
    return "".join(f"  {name:<{width}}   {text}\n" for name, text in rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', r'\|') for cell in row)} |" for row in cells)


def _as_yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(render_page(), encoding="utf-8")
    else:
        sys.stdout.write(render_page())

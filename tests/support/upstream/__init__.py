"""Recipes of EasyR1 and of SpatialThinker's release, as argument lists, and what they mean there."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

PROGRAMS = {"easyr1": "EasyR1", "release": "release"}


@dataclass(frozen=True)
class Recipe:
    """A published recipe: its arguments over the program's YAML, and the key that stops it here, if any."""

    program: str
    name: str
    arguments: tuple[str, ...]
    stop: str | None

    def __str__(self) -> str:
        return f"{self.program}/{self.name}"


@cache
def read_program(program: str) -> dict[str, Any]:
    return yaml.safe_load((Path(__file__).parent / f"{program}.yaml").read_text(encoding="utf-8"))


def read_recipes() -> list[Recipe]:
    return [
        Recipe(program, name, tuple(arguments), read_program(program)["stops"].get(name))
        for program in PROGRAMS
        for name, arguments in read_program(program)["recipes"].items()
    ]


def write_config(program: str, folder: Path) -> Path:
    """The program's YAML, as a file."""
    path = folder / f"{program}.yaml"
    path.write_text(yaml.safe_dump(read_program(program)["config"]), encoding="utf-8")
    return path


def resolve(recipe: Recipe) -> dict[str, Any]:
    """Dotted key -> value, as the program itself would have it: defaults, then its YAML, then the arguments."""
    values: dict[str, Any] = {}
    for source in ("defaults", "config"):
        values |= flatten(read_program(recipe.program)[source])
    for argument in recipe.arguments:
        key, _, text = argument.partition("=")
        value = text if key.endswith("format_prompt") else yaml.safe_load(text)
        is_number = isinstance(value, str) and text[:1].isdigit() and "e" in text  # YAML 1.1 wants a dot: 3e-4
        value = float(text) if is_number else value
        values[key] = {**(values.get(key) or {}), **value} if isinstance(value, dict) else value
    return values


def flatten(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in section.items():
        is_section = isinstance(value, dict) and not name.endswith(("override_config", "kwargs"))
        leaves |= flatten(value, f"{prefix}{name}.") if is_section else {prefix + name: value}
    return leaves


def render_table() -> str:
    """The recipes as a table of the documentation."""
    lines = ["| of | recipe | GPUs | prompts x responses | here |", "|---|---|---|---|---|"]
    for recipe in read_recipes():
        values = resolve(recipe)
        size = f"{values['data.rollout_batch_size']} x {values['worker.rollout.n']}"
        here = f"stops: `{recipe.stop}`" if recipe.stop else "runs"
        gpus = values["trainer.n_gpus_per_node"]
        lines.append(f"| {PROGRAMS[recipe.program]} | `{recipe.name}` | {gpus} | {size} | {here} |")
    return "\n".join(lines) + "\n"

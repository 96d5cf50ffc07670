"""Options of preprocess_data."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_gen.arguments import read_bool, read_budget, read_choice, read_count, read_share
from data_gen.generate.rules import TEMPLATE_VERSION
from data_gen.questions.prompts import PROMPT_VERSION
from data_gen.scenes.boxes import AUTO, BOX_FORMATS

PROVIDERS = ("anthropic", "openai", "template")


@dataclass(frozen=True)
class GenerationOptions:
    """Arguments of preprocess_data; see there."""

    source: str
    out: Path
    must_exist: bool
    data_cap: int | None
    provider: str
    model: str
    temperature: float
    base_url: str | None
    concurrency: int
    is_batch: bool
    max_cost_usd: float | None
    relation_percent: float
    has_image: bool
    seed: int
    box_format: str
    is_dry_run: bool
    is_overwritten: bool

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> "GenerationOptions":
        """The checked arguments of preprocess_data by their names there. Raises ValueError for the first wrong one."""
        return cls(
            source=str(given["source"]),
            out=Path(given["out"] or given["resume_file"]),
            must_exist=read_bool("resume", given["resume"]),
            data_cap=read_count("data_cap", given["data_cap"]),
            provider=read_choice("provider", given["provider"], PROVIDERS),
            model=str(given["model_name"]),
            temperature=read_share("temperature", given["temperature"], 0, 2),
            base_url=given["base_url"],
            concurrency=read_count("concurrency", given["concurrency"]) or 1,
            is_batch=read_bool("batch_api", given["batch_api"]),
            max_cost_usd=read_budget(given["max_cost_usd"]),
            relation_percent=read_share("relation_percent", given["relation_percent"], 0, 100),
            has_image=read_bool("with_image", given["with_image"]),
            seed=read_count("seed", given["seed"], 0) or 0,
            box_format=read_choice("box_format", given["box_format"], BOX_FORMATS),
            is_dry_run=read_bool("dry_run", given["dry_run"]),
            is_overwritten=read_bool("overwrite", given["overwrite"]),
        )

    def settings(self) -> dict[str, Any]:
        """Settings that must agree for two runs to share a journal: not number of images, speed or limits."""
        common = {"source": self.source, "provider": self.provider, "seed": self.seed}
        common["relation_percent"] = self.relation_percent
        if self.box_format != AUTO:
            common["box_format"] = self.box_format
        if self.provider == "template":
            return common | {"model": "rules", "prompt_version": TEMPLATE_VERSION}
        model = {"model": self.model, "temperature": self.temperature, "with_image": self.has_image}
        return common | model | {"prompt_version": PROMPT_VERSION}

    def provenance(self) -> Mapping[str, str]:
        """The provenance columns of the rows."""
        settings = self.settings()
        return {name: str(settings[name]) for name in ("source", "provider", "model", "prompt_version", "seed")}

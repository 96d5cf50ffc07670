"""What a run of preprocess_data was asked to do."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_gen.prompts import PROMPT_VERSION
from data_gen.rules import TEMPLATE_VERSION


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
    is_dry_run: bool
    is_overwritten: bool

    def settings(self) -> dict[str, Any]:
        """What must agree for two runs to share a journal; not the number of images, the speed or the limits."""
        common = {"source": self.source, "provider": self.provider, "seed": self.seed}
        common["relation_percent"] = self.relation_percent
        if self.provider == "template":
            return common | {"model": "rules", "prompt_version": TEMPLATE_VERSION}
        model = {"model": self.model, "temperature": self.temperature, "with_image": self.has_image}
        return common | model | {"prompt_version": PROMPT_VERSION}

    def provenance(self) -> Mapping[str, str]:
        """The provenance columns of the rows."""
        settings = self.settings()
        return {name: str(settings[name]) for name in ("source", "provider", "model", "prompt_version", "seed")}

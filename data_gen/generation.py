"""The stage preprocess_data: settings checked, journal opened, provider run, CSV written."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_gen.journal import Journal, JournalFault
from data_gen.records import journal_of, read_records, write_csv
from data_gen.sources import Source, open_source
from data_gen.stages import TEMPLATE_VERSION, run_templates


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
        from data_gen.prompts import PROMPT_VERSION

        model = {"model": self.model, "temperature": self.temperature, "with_image": self.has_image}
        return common | model | {"prompt_version": PROMPT_VERSION}

    def provenance(self) -> Mapping[str, str]:
        """The provenance columns of the rows."""
        settings = self.settings()
        return {name: str(settings[name]) for name in ("source", "provider", "model", "prompt_version", "seed")}


def generate(options: GenerationOptions) -> None:
    """Run the stage and print what came of it."""
    source = open_source(options.source, options.seed).check()
    if options.data_cap is not None and source.num_rows is not None and options.data_cap > source.num_rows:
        print(f"--data_cap {options.data_cap}: the source has {source.num_rows} rows; all are used")  # noqa: T201
    check_output(options)
    start = time.monotonic()
    with Journal(journal_of(options.out), options.settings(), options.is_overwritten) as journal:
        try:
            run_provider(options, source, journal)
        finally:
            number = write_csv(read_records(journal.path), options.out)
        outcomes = ", ".join(f"{n} {status}" for status, n in sorted(journal.outcomes().items()))
    print(f"{options.out}: {number} rows; images: {outcomes or 'none'}; {time.monotonic() - start:.1f} s")  # noqa: T201


def run_provider(options: GenerationOptions, source: Source, journal: Journal) -> None:
    """Ask what the journal does not know yet."""
    assert options.provider == "template"
    run_templates(source, journal, options.data_cap, options.relation_percent, options.seed)


def check_output(options: GenerationOptions) -> None:
    """Raise JournalFault for an output that another program wrote, or a journal that should be there."""
    journal = journal_of(options.out)
    if options.must_exist and not journal.is_file():
        raise JournalFault(f"--resume=True, but there is no journal {journal}; leave it out to start")
    if options.out.is_file() and not journal.is_file() and not options.is_overwritten:
        raise JournalFault(f"{options.out} exists without a journal; name another --out or pass --overwrite=True")
    if options.out.suffix != ".csv":
        raise JournalFault(f"--out {options.out}: name a file that ends in .csv")

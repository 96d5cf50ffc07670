"""The stage preprocess_data: settings checked, journal opened, provider run, CSV written."""

import time

from data_gen.generate.options import GenerationOptions
from data_gen.generate.rules import run_templates
from data_gen.journal import RESERVE_BYTES, SceneJournal
from data_gen.questions.records import find_journal, journal_of, read_records, write_csv
from data_gen.scenes.boxes import open_scenes
from data_gen.scenes.sources import Source
from spatialthinker.clients.model_api import Api
from spatialthinker.storage.journal import JournalFault, Line


def generate(options: GenerationOptions) -> None:
    """Run the stage and print what came of it."""
    source = open_scenes(options.source, options.box_format)
    if options.data_cap is not None and source.num_rows is not None and options.data_cap > source.num_rows:
        print(f"--data_cap {options.data_cap}: the source has {source.num_rows} rows; all are used")  # noqa: T201
    if options.is_dry_run:
        from data_gen.generate.estimate import print_price

        print_price(options, source)
        return
    check_output(options)
    api = connect(options)
    start = time.monotonic()
    with open_journal(options) as journal:
        try:
            run_provider(options, source, journal, api)
        finally:
            number = write_csv(read_records(journal.path), options.out)
        outcomes = ", ".join(f"{n} {status}" for status, n in sorted(journal.outcomes().items()))
    print(f"{options.out}: {number} rows; images: {outcomes or 'none'}; {time.monotonic() - start:.1f} s")  # noqa: T201


def connect(options: GenerationOptions) -> Api | None:
    """The client of the provider; None for the templates. Raises ApiStop without a key, or without a price."""
    if options.provider == "template":
        return None
    from spatialthinker.clients.providers import APIS

    api = APIS[options.provider](options.model, options.base_url, options.concurrency)
    api.check_budget(options.max_cost_usd)
    return api


def open_journal(options: GenerationOptions, further: Line | None = None) -> SceneJournal:
    """The run's journal, with `further` settings and with room on the disk for the answers under way."""
    reserve = 0 if options.provider == "template" else options.concurrency * RESERVE_BYTES
    return SceneJournal(journal_of(options.out), options.settings() | (further or {}), options.is_overwritten, reserve)


def run_provider(options: GenerationOptions, source: Source, journal: SceneJournal, api: Api | None) -> None:
    """Ask what the journal does not know yet."""
    if api is None:
        run_templates(source, journal, options.data_cap, options.relation_percent, options.seed)
    elif options.is_batch:
        from data_gen.generate.batch_api import run_batches

        run_batches(options, source, journal, api)
    else:
        from data_gen.generate.live import run_model

        run_model(options, source, journal, api)


def check_output(options: GenerationOptions) -> None:
    """Raise JournalFault for an output that another program wrote, or a journal that should be there."""
    journal = find_journal(options.out)
    if options.must_exist and journal is None:
        raise JournalFault(f"--resume=True, but there is no journal {journal_of(options.out)}; leave it out to start")
    if options.out.is_file() and journal is None and not options.is_overwritten:
        raise JournalFault(f"{options.out} exists without a journal; name another --out or pass --overwrite=True")
    if options.out.suffix != ".csv" or options.out.is_dir():
        raise JournalFault(f"--out {options.out}: name a file that ends in .csv")

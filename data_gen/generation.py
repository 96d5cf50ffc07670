"""The stage preprocess_data: settings checked, journal opened, provider run, CSV written."""

import time

from data_gen.generation_options import GenerationOptions
from data_gen.journal import Journal, JournalFault
from data_gen.records import journal_of, read_records, write_csv
from data_gen.sources import Source, open_source
from data_gen.stages import run_templates


def generate(options: GenerationOptions) -> None:
    """Run the stage and print what came of it."""
    source = open_source(options.source, options.seed).check()
    if options.data_cap is not None and source.num_rows is not None and options.data_cap > source.num_rows:
        print(f"--data_cap {options.data_cap}: the source has {source.num_rows} rows; all are used")  # noqa: T201
    if options.is_dry_run:
        from data_gen.estimate import print_price

        print_price(options, source)
        return
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
    if options.provider == "template":
        run_templates(source, journal, options.data_cap, options.relation_percent, options.seed)
        return
    from data_gen.running import run_model
    from spatialthinker.model_api import APIS

    api = APIS[options.provider](options.model, options.base_url, options.concurrency)
    if options.max_cost_usd is not None and api.price is None:
        raise JournalFault(
            f"--max_cost_usd needs a price, and none is known of {api.model!r}; see spatialthinker/prices.py"
        )
    if options.is_batch:
        from data_gen.batching import run_batches

        run_batches(options, source, journal, api)
    else:
        run_model(options, source, journal, api)


def check_output(options: GenerationOptions) -> None:
    """Raise JournalFault for an output that another program wrote, or a journal that should be there."""
    journal = journal_of(options.out)
    if options.must_exist and not journal.is_file():
        raise JournalFault(f"--resume=True, but there is no journal {journal}; leave it out to start")
    if options.out.is_file() and not journal.is_file() and not options.is_overwritten:
        raise JournalFault(f"{options.out} exists without a journal; name another --out or pass --overwrite=True")
    if options.out.suffix != ".csv":
        raise JournalFault(f"--out {options.out}: name a file that ends in .csv")

"""Millions of scenes: the stages of preprocess_data over Ray Data, on a cluster that is already there.

    python data_gen/generate_data.py preprocess_on_cluster --source=FOLDER --out=FOLDER --provider=template

The source's parquet files are cut into blocks of scenes; each block is one ordinary run with its own journal under
OUT/blocks, so that a block that dies goes on from its journal wherever it is started again. Quotas hold inside every
block. OUT must be a folder that all machines see.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from data_gen.generation import connect, run_provider
from data_gen.generation_options import GenerationOptions
from data_gen.journal import ACCEPTED, Journal, newest_lines
from data_gen.records import journal_of, read_records, write_csv
from data_gen.sources import Row, Source, open_source


@dataclass(frozen=True)
class Block:
    """Scenes `start` to `start + size` of a source."""

    number: int
    start: int
    size: int

    def slice(self, source: Source) -> Source:
        """The block's rows as a source of their own."""

        def rows(start: int = 0) -> Iterator[Row]:
            return islice(source.rows(self.start + start), max(0, self.size - start))

        return replace(source, rows=rows, num_rows=self.size)


def cut(num_rows: int, block_rows: int) -> list[Block]:
    """The blocks of a source."""
    starts = range(0, num_rows, block_rows)
    return [Block(number, start, min(block_rows, num_rows - start)) for number, start in enumerate(starts)]


def run_block(item: dict[str, Any], options: GenerationOptions) -> dict[str, Any]:
    """Run one block on whichever machine this is; return its numbers."""
    block = Block(int(item["number"]), int(item["start"]), int(item["size"]))
    source = block.slice(open_source(options.source, options.seed))
    path = block_csv(options.out, block)
    settings = options.settings() | {"block": [block.start, block.size]}
    options = replace(options, out=path, data_cap=None)
    with Journal(journal_of(path), settings, options.is_overwritten) as journal:
        run_provider(options, source, journal, connect(options))
        outcomes = journal.outcomes()
        return {"accepted": outcomes[ACCEPTED], "images": outcomes.total(), "cost_usd": journal.cost_usd}


def block_csv(out: Path, block: Block) -> Path:
    """The CSV of a block, whose journal stands beside it."""
    return out.with_suffix("") / "blocks" / f"{block.number:06d}.csv"


def run_cluster(options: GenerationOptions, block_rows: int, address: str | None) -> None:
    """Run all blocks over a Ray cluster and gather their journals into the one beside `options.out`."""
    import ray

    source = open_source(options.source, options.seed).check()
    if source.num_rows is None:
        raise ValueError(f"--source {options.source} does not say how many rows it has")
    blocks = cut(min(source.num_rows, options.data_cap or source.num_rows), block_rows)
    options = replace(options, out=options.out.resolve())
    if not ray.is_initialized():
        ray.init(address=address, include_dashboard=False, log_to_driver=False)
    data = ray.data.from_items([block.__dict__ for block in blocks])
    found = data.repartition(len(blocks)).map(partial(run_block, options=options)).take_all()
    gather(options, blocks)
    images, accepted = sum(x["images"] for x in found), sum(x["accepted"] for x in found)
    dollars = sum(x["cost_usd"] for x in found)
    print(f"{options.out}: {accepted} rows of {images} images in {len(blocks)} blocks, {dollars:.2f} dollars")  # noqa: T201


def gather(options: GenerationOptions, blocks: list[Block]) -> None:
    """Write one journal and CSV from those of the blocks; lines that are there already stay."""
    with Journal(journal_of(options.out), options.settings(), options.is_overwritten) as journal:
        for block in blocks:
            for line in newest_lines(journal_of(block_csv(options.out, block))):
                if not journal.is_settled(line["key"]):
                    journal.add(line | {"index": line["index"] + block.start})
    number = write_csv(read_records(journal_of(options.out)), options.out)
    print(f"{number} rows gathered", file=sys.stderr)  # noqa: T201

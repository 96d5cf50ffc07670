"""The run: a first look at all pictures, then blocks of pictures, each one parquet file and its lines of the journal.

A block's file gets its name after its lines are in the journal, so that what has its name is complete. After a kill
the block under way is made anew, byte by byte the same.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import batched, islice
from pathlib import Path

from data_gen.curate.export import export_row, write_rows
from data_gen.journal import ACCEPTED, QUARANTINED, SceneJournal
from data_gen.questions.records import Record, find_journal, journal_of, read_records, write_csv
from data_gen.selfsup.annotations import read_annotations
from data_gen.selfsup.options import SelfsupOptions
from data_gen.selfsup.pictures import Fingerprint, Picture, Seen, UnfitPicture, list_pictures, look
from data_gen.selfsup.rows import make_rows
from data_gen.selfsup.workers import map_in_order
from spatialthinker.storage.journal import JournalFault, Line

BLOCK_PICTURES = 64
"""Pictures of one parquet file."""
PARTIAL = ".part"


@dataclass(frozen=True)
class Block:
    """Pictures of one parquet file."""

    number: int
    pictures: tuple[Picture, ...]

    def shard(self, options: SelfsupOptions) -> Path:
        return options.shards / f"train-{self.number:05d}.parquet"


@dataclass(frozen=True)
class BlockDone:
    """A block whose file is written under its preliminary name, and its outcomes."""

    block: Block
    lines: tuple[Line, ...]


def generate(options: SelfsupOptions) -> None:
    """Make the rows and print what came of it."""
    check_output(options)
    things = {} if options.annotations is None else read_annotations(options.annotations)
    pictures = list_pictures(options.source, things, options.depth)
    start = time.monotonic()
    with SceneJournal(journal_of(options.out), options.settings(), options.is_overwritten) as journal:
        clear_shards(options)
        try:
            settle_unfit(pictures, options, journal)
            make_blocks(pictures, options, journal)
        finally:
            number = write_csv(read_records(journal.path), options.out)
        reasons = journal.outcomes()[QUARANTINED]
    seconds = time.monotonic() - start
    print(f"{options.out}: {number} rows in {options.shards}; {reasons} pictures left out; {seconds:.1f} s")  # noqa: T201
    if not number:
        first = next((line["reason"] for line in _quarantined(journal.path)), "no picture")
        raise ValueError(f"--source {options.source}: no picture gave a row; the first reason: {first}")


def _quarantined(path: Path) -> Iterator[Line]:
    from data_gen.journal import newest_lines

    return (line for line in newest_lines(path) if line["status"] == QUARANTINED)


def check_output(options: SelfsupOptions) -> None:
    """Raise JournalFault for an output that another program wrote, or a journal that should be there."""
    journal = find_journal(options.out)
    if options.out.suffix != ".csv" or options.out.is_dir():
        raise JournalFault(f"--out {options.out}: name a file that ends in .csv")
    if options.must_exist and journal is None:
        raise JournalFault(f"--resume=True, but there is no journal {journal_of(options.out)}; leave it out to start")
    for path in (options.out, options.shards):
        if path.exists() and journal is None and not options.is_overwritten:
            raise JournalFault(f"{path} exists without a journal; name another --out or pass --overwrite=True")


def clear_shards(options: SelfsupOptions) -> None:
    """Remove what a killed run left half-written, and everything where the run starts over."""
    options.shards.mkdir(parents=True, exist_ok=True)
    ending = "*" if options.is_overwritten else f"*{PARTIAL}"
    for path in options.shards.glob(f"train-{ending}"):
        path.unlink()


def settle_unfit(pictures: Iterable[Picture], options: SelfsupOptions, journal: SceneJournal) -> None:
    """Give each broken, small, empty or near-duplicate picture its line in the journal."""
    seen = Seen()
    chunks = batched(islice(pictures, options.data_cap), BLOCK_PICTURES)
    work = map_in_order(look_at_all, chunks, options.processes)
    for picture_id, index, found in (item for chunk in work for item in chunk):
        reason = found.fault
        if not reason and (twin := seen.twin(picture_id, found.sketch)) is not None:
            reason = f"near-duplicate: looks like {twin}"
        if reason and not journal.is_settled(picture_id):
            journal.add(quarantined(picture_id, index, reason))


def look_at_all(pictures: Sequence[Picture]) -> list[tuple[str, int, Fingerprint]]:
    """Id, index and fingerprint of each picture."""
    return [(picture.id, picture.index, look(picture)) for picture in pictures]


def quarantined(picture_id: str, index: int, reason: str) -> Line:
    """The journal's line of a picture without rows."""
    return {"key": picture_id, "index": index, "status": QUARANTINED, "reason": reason}


def make_blocks(pictures: Iterable[Picture], options: SelfsupOptions, journal: SceneJournal) -> None:
    """Make every block that is not complete."""
    left_out = {key for key, entry in journal.entries.items() if entry.status == QUARANTINED}
    made_of = {key.rpartition("#")[0] for key, entry in journal.entries.items() if entry.status == ACCEPTED}
    blocks = (
        Block(number, tuple(chunk))
        for number, chunk in enumerate(batched(islice(pictures, options.data_cap), BLOCK_PICTURES))
    )

    def is_complete(block: Block) -> bool:
        has_lines = all(p.id in made_of or p.id in left_out for p in block.pictures)
        return has_lines and (block.shard(options).is_file() or not any(p.id in made_of for p in block.pictures))

    missing = (block for block in blocks if not is_complete(block))
    fit = (replace(b, pictures=tuple(p for p in b.pictures if p.id not in left_out)) for b in missing)
    for done in map_in_order(partial(make_block, options=options), fit, options.processes):
        shard = done.block.shard(options)
        shard.unlink(missing_ok=True)  # of a run over fewer pictures: while lines are missing, no file has this name
        for line in done.lines:
            if not journal.is_settled(line["key"]):
                journal.add(line)
        if (partial_path := shard.with_name(shard.name + PARTIAL)).is_file():
            partial_path.replace(shard)


def make_block(block: Block, options: SelfsupOptions) -> BlockDone:
    """Write a block's rows under the preliminary name; its pictures are not sent back."""
    lines: list[Line] = []
    rows = []
    for picture in block.pictures:
        try:
            for made in make_rows(picture, options):
                lines.append(accepted(made.record, picture.index))
                rows.append(export_row(made.record, made.image))
        except UnfitPicture as fault:
            lines.append(quarantined(picture.id, picture.index, str(fault)))
    if rows:
        shard = block.shard(options)
        write_rows(rows, shard.with_name(shard.name + PARTIAL))
    return BlockDone(replace(block, pictures=()), tuple(lines))


def accepted(record: Record, index: int) -> Line:
    """The journal's line of a row."""
    return {"key": record.image_id, "index": index, "status": ACCEPTED, "record": record.as_dict()}

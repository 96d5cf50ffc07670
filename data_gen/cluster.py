"""Millions of scenes: generation and validation over Ray Data, on this machine or a cluster that is already there.

    python data_gen/generate_data.py preprocess_on_cluster --source=FOLDER --out=data/large.csv --provider=template
    python data_gen/generate_data.py validate_on_cluster --input_file=data/large.csv --output_file=data/checked.csv

With --ray_address=HOST:PORT they run there; without it here, whatever RAY_ADDRESS says.

The source is cut into blocks of scenes; each block is one ordinary run with its own journal under OUT/blocks, so that
a block that dies goes on from its journal wherever it is started again. Quotas hold inside every block. OUT must be a
folder that all machines see, and the checkout must lie at the same path on each.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from data_gen.curate.validation import ValidationOptions, validate
from data_gen.generate.generation import check_output, connect, open_journal, run_provider
from data_gen.generate.options import GenerationOptions
from data_gen.journal import ACCEPTED, SceneJournal, newest_lines
from data_gen.questions.records import journal_of, read_records, read_settings, write_csv
from data_gen.scenes.boxes import open_scenes
from data_gen.scenes.sources import Row, Source, absolute_locator, open_source

ROOT = Path(__file__).resolve().parents[1]


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

    def csv(self, out: Path) -> Path:
        """The block's part of an output; its journal stands beside it."""
        return out.with_suffix("") / "blocks" / f"{self.number:06d}.csv"


def cut(num_rows: int, block_rows: int) -> list[Block]:
    """The blocks of a source."""
    starts = range(0, num_rows, block_rows)
    return [Block(number, start, min(block_rows, num_rows - start)) for number, start in enumerate(starts)]


def generate_blocks(options: GenerationOptions, block_rows: int, address: str) -> None:
    """Generate a question for every scene, and gather the blocks' journals into the one beside `options.out`."""
    source = open_scenes(options.source, options.box_format)
    if source.num_rows is None:
        raise ValueError(f"--source {options.source} does not say how many rows it has")
    check_output(options)
    connect(options)  # reports a missing key once, before any block starts
    blocks = cut(min(source.num_rows, options.data_cap or source.num_rows), block_rows)
    options = replace(options, out=options.out.resolve(), source=absolute_locator(options.source))
    run_blocks(partial(generate_block, options=options, num_rows=sum(block.size for block in blocks)), blocks, address)
    gather(options.out, blocks, options.settings(), options.is_overwritten)


def generate_block(item: dict[str, int], options: GenerationOptions, num_rows: int) -> dict[str, Any]:
    """Generate one block, on whichever machine this is, with its share of the budget."""
    block = Block(**item)
    budget = None if options.max_cost_usd is None else options.max_cost_usd * block.size / num_rows
    path = block.csv(options.out)
    source = block.slice(open_scenes(options.source, options.box_format))
    part = replace(options, out=path, data_cap=None, max_cost_usd=budget)
    with open_journal(part, {"block": [block.start, block.size]}) as journal:
        run_provider(part, source, journal, connect(part))
    return item


def validate_blocks(options: ValidationOptions, address: str) -> None:
    """Validate the records of every block, and gather the blocks' journals into the one beside the output."""
    options = replace(options, input_file=options.input_file.resolve(), output_file=options.output_file.resolve())
    if options.source:
        options = replace(options, source=absolute_locator(options.source))
    blocks = find_blocks(options.input_file)
    options.connect()
    total = sum(block.size for block in blocks)
    run_blocks(partial(validate_block, options=options, num_rows=total), blocks, address)
    locator = options.source or read_settings(options.input_file)["source"]
    gather(options.output_file, blocks, options.settings() | {"source": locator}, options.is_overwritten)


def validate_block(item: dict[str, int], options: ValidationOptions, num_rows: int) -> dict[str, Any]:
    """Validate one block's records, on whichever machine this is, with its share of the budget."""
    block = Block(**item)
    budget = None if options.max_cost_usd is None else options.max_cost_usd * block.size / num_rows
    path = block.csv(options.input_file)
    source = block.slice(open_source(options.source or read_settings(path)["source"]))
    part = replace(options, input_file=journal_of(path), output_file=block.csv(options.output_file))
    if any(True for _ in read_records(part.input_file)):
        validate(replace(part, max_cost_usd=budget), source)
    return item


def find_blocks(path: Path) -> list[Block]:
    """The blocks of which an output was gathered. Raises ValueError where it was not written over a cluster."""
    folder = Block(0, 0, 0).csv(path).parent
    blocks = [
        Block(int(journal.stem), *read_settings(journal)["block"]) for journal in sorted(folder.glob("*[0-9].jsonl"))
    ]
    if not blocks:
        raise ValueError(f"--input_file {path}: no blocks in {folder}; validate_with_gpt4o judges it in one piece")
    return blocks


def run_blocks(task: Callable[[dict[str, int]], dict[str, Any]], blocks: Sequence[Block], address: str) -> None:
    """Run a task for every block over the cluster. Raises ValueError where one failed; what is done stays done."""
    import ray
    from ray.exceptions import RayError

    if not ray.is_initialized():
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
        start: Any = {"include_dashboard": False} if address == "local" else {}
        try:
            ray.init(address, log_to_driver=False, runtime_env={"env_vars": environment}, **start)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ValueError(f"--ray_address {address}: no Ray cluster can be joined there ({error})") from error
    data = ray.data.from_items([block.__dict__ for block in blocks]).repartition(len(blocks))
    try:
        data.map(task).materialize()
    except RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"a block failed, the same command goes on: {reason}") from error


def gather(out: Path, blocks: Sequence[Block], settings: dict[str, Any], is_overwritten: bool) -> None:
    """Write one journal and CSV from those of the blocks; lines that are there already stay."""
    with SceneJournal(journal_of(out), settings, is_overwritten) as journal:
        for block in blocks:
            path = journal_of(block.csv(out))
            for line in newest_lines(path) if path.is_file() else ():
                if not journal.is_settled(line["key"]):
                    journal.add(line | {"index": line["index"] + block.start})
        number = write_csv(read_records(journal.path), out)
    outcomes = journal.outcomes()
    assert number == outcomes[ACCEPTED]
    print(f"{out}: {number} rows, {outcomes.total()} outcomes, {len(blocks)} blocks, {journal.cost_usd:.2f} dollars")  # noqa: T201

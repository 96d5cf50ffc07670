"""The stage that makes a data set: select, split, write, describe, and upload only where that was asked for."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2

from data_gen.arguments import check_repo, read_bool, read_count, read_share
from data_gen.curate.export import export_parquet, image_source, save_dataset
from data_gen.curate.selection import Selection, select
from data_gen.curate.tables import format_tables, tables
from data_gen.questions.records import PROVENANCE, find_journal, read_records, read_settings, write_csv
from spatialthinker.schema import parquet_path
from spatialthinker.storage.files import claim_output
from spatialthinker.storage.journal import read_lines

FOLDER = "hf_data"


@dataclass(frozen=True)
class PublishOptions:
    """Arguments of generate_hf_data; see there."""

    input_file: Path
    out: Path
    source: str | None
    target_samples: int | None
    relation_percent: float
    val_split: float
    seed: int
    repo: str | None
    """Repository of the upload; None for no upload."""
    is_private: bool
    is_saved: bool
    is_overwritten: bool

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> "PublishOptions":
        """The checked arguments of generate_hf_data by their names there. Raises ValueError for a wrong one."""
        is_uploaded = read_bool("upload_to_hf", given["upload_to_hf"])
        return cls(
            input_file=Path(given["input_file"]),
            out=Path(given["out"]),
            source=given["source"],
            target_samples=read_count("target_samples", given["target_samples"]),
            relation_percent=read_share("relation_percent", given["relation_percent"], 0, 100),
            val_split=read_share("val_split", given["val_split"], 0, 0.99),
            seed=read_count("seed", given["seed"], 0) or 0,
            repo=check_repo(given["target_repo"]) if is_uploaded else None,
            is_private=read_bool("private", given["private"]),
            is_saved=read_bool("save_to_disk", given["save_to_disk"]),
            is_overwritten=read_bool("overwrite", given["overwrite"]),
        )


def publish(options: PublishOptions) -> Path:
    """Write the data set's folder, its CSV copies and its card; return the folder."""
    folder = options.out / FOLDER
    for path in (folder, *(options.out / f"data_{split}.csv" for split in ("train", "val"))):
        claim_output(path, options.is_overwritten)
    settings = read_settings(options.input_file)
    selection = select(
        (replace(record, full_scene={}) for record in read_records(options.input_file)),  # all stay in memory
        options.target_samples,
        options.relation_percent,
        options.val_split,
        options.seed,
    )
    if not any(selection.splits.values()):
        raise ValueError(f"--input_file {options.input_file} holds no row that could be exported")
    source = image_source(options.input_file, options.source)
    paths = export_parquet(selection.splits, source, folder)
    for split in set(selection.splits) - set(paths):  # of an older data set, whose rows may now be in another split
        parquet_path(folder, split).unlink(missing_ok=True)
    for split, records in selection.splits.items():
        write_csv(records, options.out / f"data_{split}.csv", is_exported=True)
    summary = summarize(selection, options, settings)
    (folder / "selection.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
    write_card(folder / "README.md", selection, summary)
    if options.is_saved:
        save_dataset(paths, options.out / f"{FOLDER}_saved")
    print_selection(selection, folder)
    if options.repo is not None:
        upload_folder(folder, options.repo, options.is_private)
    return folder


def summarize(selection: Selection, options: PublishOptions, settings: dict[str, Any]) -> dict[str, Any]:
    """The selection and its reasons, as JSON values."""
    return {
        "rows": {split: len(records) for split, records in selection.splits.items()},
        "wanted": selection.allocation.wanted,
        "taken": selection.allocation.taken,
        "shortfalls": selection.allocation.shortfalls,
        "left_out": dict(selection.left_out),
        "seed": options.seed,
        "generation": settings,
        "price": describe_price(find_journal(options.input_file)),
    }


def describe_price(journal: Path | None) -> str:
    """The cost of the stage before, from its journal."""
    if journal is None:
        return "Not recorded in the input."
    outcomes: Counter[str] = Counter()
    dollars = 0.0
    for line in read_lines(journal):
        if "key" in line:
            outcomes[line["status"]] += 1
            dollars += line.get("cost_usd", 0.0)
    numbers = ", ".join(f"{number} {status}" for status, number in sorted(outcomes.items()))
    return f"{dollars:.2f} US dollars by list prices in {journal.name}: {numbers}."


def write_card(path: Path, selection: Selection, summary: dict[str, Any]) -> None:
    """Write the card beside the data."""
    template = Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8")
    records = [record for rows in selection.splits.values() for record in rows]
    origins = Counter(tuple(record.provenance.get(name, "") for name in PROVENANCE) for record in records)
    values = summary | {"splits": selection.splits, "records": records, "tables": tables(records)}
    values |= {"provenance": PROVENANCE, "origins": origins.most_common()}
    values["generation"] = json.dumps(summary["generation"]) if summary["generation"] else ""
    card = jinja2.Template(template, trim_blocks=True, lstrip_blocks=True).render(values)
    path.write_text(card.rstrip() + "\n", encoding="utf-8")


def print_selection(selection: Selection, folder: Path) -> None:
    """Print the numbers of a selection."""
    lines = [format_tables(tables(record for records in selection.splits.values() for record in records))]
    lines += [f"{split}: {len(records)} rows" for split, records in selection.splits.items()]
    short = selection.allocation.shortfalls.items()
    lines += [f"{name}: {number} rows short of its quota, taken from the other categories" for name, number in short]
    lines += [f"left out {number}: {reason}" for reason, number in selection.left_out.items()]
    print("\n".join([*lines, f"data set: {folder}"]))  # noqa: T201


def upload_folder(folder: Path, repo: str, is_private: bool) -> None:
    """Upload a folder as a data set repository. Raises ValueError without a token."""
    import os

    from huggingface_hub import HfApi

    token = os.environ.get("HF_TOKEN")
    if not token:
        raise ValueError(f"uploading to {repo} needs the environment variable HF_TOKEN; the data set is in {folder}")
    api = HfApi(token=token)
    api.create_repo(repo, repo_type="dataset", private=is_private, exist_ok=True)
    # An existing repository keeps its visibility, whatever was asked for.
    if is_private and not api.repo_info(repo, repo_type="dataset").private:
        raise ValueError(
            f"{repo} exists and is public, nothing was uploaded; make it private there, name another --target_repo, "
            f"or pass --private=False. The data set is in {folder}"
        )
    api.upload_folder(repo_id=repo, repo_type="dataset", folder_path=str(folder))
    is_private = bool(api.repo_info(repo, repo_type="dataset").private)
    print(f"uploaded to {repo} ({'private' if is_private else 'public'})")  # noqa: T201

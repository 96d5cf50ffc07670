"""From scenes to a folder that trains: quotas, splits, letters, columns, and every command of the command line."""

import csv
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path
from types import FrameType

import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_gen.curate.export import export_schema, image_locator
from data_gen.curate.filters import best_rated
from data_gen.curate.selection import select
from data_gen.generate_data import main
from data_gen.publish.publishing import upload_folder
from data_gen.questions.quotas import allocate, val_rows
from data_gen.questions.records import (
    RAW_COLUMNS,
    Record,
    answer_index,
    journal_of,
    read_rating,
    read_records,
    write_csv,
)
from data_gen.scenes.sources import synthetic_row
from spatialthinker.rewards import REWARDS, RewardInput, check_ground_truth
from spatialthinker.rewards.gold import gold_response
from spatialthinker.schema import CATEGORIES, COLUMNS, VqaRow, read_parquet

NUM_ROWS = 360


def run(*arguments: str) -> int:
    return main([str(argument) for argument in arguments])


def gold_scores(rows: list[VqaRow]) -> list[float]:
    for row in rows:
        check_ground_truth(row.answer_option_text, row.problem)
    inputs = [
        RewardInput(gold_response("spatial_sgg", row.answer_option_text), row.answer_option_text, row.problem)
        for row in rows
    ]
    return [score["overall"] for score in REWARDS["spatial_sgg"](inputs)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A finished data set of template questions."""
    path = tmp_path_factory.mktemp("data_gen")
    source = f"--source=synthetic:{NUM_ROWS}"
    assert run("preprocess_data", "--provider=template", source, f"--out={path / 'train.csv'}") == 0
    arguments = ("--save_to_disk=True", f"--out={path}", "--upload_to_hf=false")
    assert run("generate_hf_data", f"--input_file={path / 'train.csv'}", *arguments) == 0
    return path


def test_every_row_earns_the_full_reward_with_its_own_answer(folder):
    rows = read_parquet(folder / "hf_data/train-00000-of-00001.parquet")
    rows += read_parquet(folder / "hf_data/val-00000-of-00001.parquet")
    assert len(rows) == NUM_ROWS
    assert gold_scores(rows) == pytest.approx([1.0] * NUM_ROWS)
    assert {row.category for row in rows} == set(CATEGORIES)


@pytest.mark.parametrize("mode, kind", [("L", "JPEG"), ("RGBA", "PNG"), ("P", "PNG"), ("CMYK", "JPEG")])
def test_images_of_every_kind_leave_as_the_bytes_that_came(tmp_path, mode, kind):
    picture = Image.new("RGB", (112, 112), "white").convert(mode)
    picture.save(tmp_path / "image", kind)
    (tmp_path / "rows.jsonl").write_text(json.dumps(synthetic_row(0, 0) | {"image": "image"}))
    assert (
        run(
            "preprocess_data",
            "--provider=template",
            f"--source={tmp_path / 'rows.jsonl'}",
            f"--out={tmp_path / 't.csv'}",
        )
        == 0
    )
    assert run("generate_hf_data", f"--input_file={tmp_path / 't.csv'}", f"--out={tmp_path}", "--val_split=0") == 0
    [row] = read_parquet(tmp_path / "hf_data/train-00000-of-00001.parquet")
    assert row.images == (tmp_path / "image").read_bytes() and gold_scores([row]) == [pytest.approx(1.0)]


def test_columns_are_the_public_ones_and_provenance_after_them(folder):
    schema = pq.read_schema(folder / "hf_data/train-00000-of-00001.parquet")
    assert tuple(schema.names[:15]) == COLUMNS
    assert schema.names[15:] == ["source", "provider", "model", "prompt_version", "seed"]
    assert schema.equals(export_schema())
    row = pq.read_table(folder / "hf_data/val-00000-of-00001.parquet").to_pylist()[0]
    assert row["source"] == f"synthetic:{NUM_ROWS}" and row["model"] == "rules"


def num_prompts(locator: str) -> int:
    """The rows that the trainer's data set takes from a split, every one checked."""
    from transformers import AutoProcessor

    from verl.data.dataset import RLHFDataset

    processor = AutoProcessor.from_pretrained("configs/toy_model")
    return len(RLHFDataset(locator, processor, row_check=lambda p, g, _: check_ground_truth(g, p)))


def test_trainer_evaluation_and_datasets_read_the_folder(folder):
    import datasets

    from evaluation.benchmarks.rows import BENCHMARKS
    from evaluation.benchmarks.samples import load_samples

    for name, split in (("hf_data", "train"), ("hf_data", "val"), ("hf_data_saved", "val")):
        number = pq.read_metadata(folder / f"hf_data/{split}-00000-of-00001.parquet").num_rows
        assert num_prompts(f"{folder / name}@{split}") == number
    for path in (folder / "hf_data", folder / "hf_data_saved/val"):
        samples = load_samples("stvqa", BENCHMARKS["stvqa"], str(path), "val")
        assert samples[0].ground_truth and samples[0].read_images()[0].size == (112, 112)
    assert "images" in datasets.load_from_disk(str(folder / "hf_data_saved"))["train"].features


def test_csvs_have_the_released_columns_and_the_journal_is_the_truth(folder):
    with (folder / "train.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == RAW_COLUMNS and len(rows) == NUM_ROWS
    from_journal = list(read_records(folder / "train.csv"))
    copy = folder / "copy.csv"
    copy.write_bytes((folder / "train.csv").read_bytes())
    from_csv = list(read_records(copy))
    assert [(r.question, r.options, r.answer_index, r.scene) for r in from_csv] == [
        (r.question, r.options, r.answer_index, r.scene) for r in from_journal
    ]


def test_letters_are_balanced_and_images_keep_their_split(folder):
    splits = {name: read_parquet(folder / f"hf_data/{name}-00000-of-00001.parquet") for name in ("train", "val")}
    assert not {row.image_id for row in splits["train"]} & {row.image_id for row in splits["val"]}
    for category in CATEGORIES:
        letters = Counter(
            row.answer_only for row in splits["train"] if row.category == category and len(row.options) == 4
        )
        counts = [letters[letter] for letter in "ABCD"] if letters else [0]
        assert max(counts) - min(counts) <= 1


def test_a_half_of_the_rows_is_relation(folder):
    counts = Counter(record.category for record in read_records(folder / "train.csv"))
    assert counts["relation"] == NUM_ROWS / 2
    assert all(abs(counts[name] - NUM_ROWS / 16) <= 1 for name in CATEGORIES[1:])


def test_the_same_command_again_changes_nothing(folder):
    before = journal_of(folder / "train.csv").read_bytes()
    csv_before = (folder / "train.csv").read_bytes()
    source = f"--source=synthetic:{NUM_ROWS}"
    assert run("preprocess_data", "--provider=template", source, f"--out={folder / 'train.csv'}") == 0
    assert journal_of(folder / "train.csv").read_bytes() == before
    assert (folder / "train.csv").read_bytes() == csv_before


def test_outputs_and_journals_of_other_settings_are_never_overwritten(folder, capsys, tmp_path):
    out = f"--out={folder / 'train.csv'}"
    assert run("preprocess_data", "--provider=template", "--source=synthetic:9", "--seed=1", out) == 2
    message = capsys.readouterr().err
    assert "source: 'synthetic:360' there, 'synthetic:9' now" in message and "--overwrite" in message
    assert run("generate_hf_data", f"--input_file={folder / 'train.csv'}", f"--out={folder}") == 2
    assert "exists" in capsys.readouterr().err
    foreign = tmp_path / "other.csv"
    foreign.write_text("a,b\n")
    assert run("preprocess_data", "--provider=template", "--source=synthetic:9", f"--out={foreign}") == 2
    assert "without a journal" in capsys.readouterr().err and foreign.read_text() == "a,b\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("generate_hf_data", "--upload_to_hf=maybe"), "--upload_to_hf 'maybe' is no boolean"),
        (("generate_hf_data", "--upload_to_hf=true"), "needs --target_repo=OWNER/NAME"),
        (("generate_hf_data", "--val_split=1.5"), "--val_split 1.5"),
        (("generate_hf_data", "--input_file=nothing.csv"), "nothing.csv: no such file"),
        (("preprocess_data", "--provider=anthropc"), "nearest is anthropic"),
        (("preprocess_data", "--data_cap=-3"), "--data_cap -3"),
        (("preprocess_data", "--sorce=synthetic:3"), "has no argument --sorce; nearest is --source"),
        (("preprocess_data", "--source=synthetic:3", "--provider=template", "--resume=True"), "no journal"),
        (("preprocess_data", "--source=missing.parquet", "--provider=template"), "no such file"),
        (("data_review", "--dataset_name=."), "holds no train-*.parquet"),
        (("print_data_stats", "--filename=pyproject.toml"), "no such file"),
    ],
)
def test_mistakes_end_with_one_message_and_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


def test_an_older_split_does_not_outlive_its_data_set(folder, tmp_path):
    export = ("generate_hf_data", f"--input_file={folder / 'train.csv'}", f"--out={tmp_path}")
    assert run(*export) == 0 and (tmp_path / "hf_data/val-00000-of-00001.parquet").is_file()
    assert run(*export, "--val_split=0", "--overwrite=True") == 0
    assert not (tmp_path / "hf_data/val-00000-of-00001.parquet").exists()
    assert len(read_parquet(tmp_path / "hf_data/train-00000-of-00001.parquet")) == NUM_ROWS


def test_allocation_follows_the_table():
    many = dict.fromkeys(CATEGORIES, 10_000)
    exact = allocate(many, 10_000, 50)
    assert exact.taken["relation"] == 5000 and exact.taken["depth"] == 625
    assert val_rows(exact.taken, 0.1)["relation"] == 500 and val_rows(exact.taken, 0.1)["depth"] == 62
    assert sum(allocate(many, 1000, 33).taken.values()) == 1000
    assert allocate(many, 1000, 33).taken["relation"] == 330
    assert allocate(many, 100, 100).taken == {name: 100 * (name == "relation") for name in CATEGORIES}
    assert set(val_rows(exact.taken, 0).values()) == {0}
    for bad in (1, -0.1):
        with pytest.raises(ValueError, match="val_split"):
            val_rows(exact.taken, bad)


def test_what_a_category_lacks_comes_from_the_others():
    uniform = dict.fromkeys(CATEGORIES, 1333)
    found = allocate(uniform, 10_000, 50)
    assert sum(found.taken.values()) == 10_000
    assert found.shortfalls == {"relation": 3667}
    assert allocate(uniform, 20_000, 50).taken == uniform


def record(index: int, category: str = "depth", rating: int = 5, image: str | None = None) -> Record:
    scene = {"objects": [{"id": "a.1", "bbox": [0, 0, 1, 1]}], "relationships": []}
    return Record(image or str(index), 9, 9, f"q{index}?", ("w", "x", "y", "z"), 0, category, "easy", rating, scene)


def test_selection_depends_on_content_alone_and_keeps_everything_without_a_target():
    records = [record(i, CATEGORIES[i % 9], 1 + i % 10) for i in range(200)]
    shuffled = random.Random(0).sample(records, 200)
    for target in (None, 90):
        first, second = (select(r, target, 50, 0.1, 7).splits for r in (records, shuffled))
        assert first == second
        assert sum(map(len, first.values())) == (target or 200)
    assert select(records, None, 50, 0.1, 8).splits != first


def test_unknown_categories_and_repeated_questions_are_left_out_with_the_reason():
    found = select([record(1), record(1), record(2, "Relation")], None, 50, 0, 0)
    assert [r.image_id for r in found.splits["train"]] == ["1"] and found.splits["val"] == []
    assert found.left_out == {"the same question on the same image": 1, "unknown category 'Relation'": 1}


def test_questions_on_one_image_share_a_split():
    records = [record(i, image=str(i // 4)) for i in range(80)]
    splits = select(records, None, 50, 0.25, 0).splits
    assert len(splits["val"]) == 20
    assert not {r.image_id for r in splits["val"]} & {r.image_id for r in splits["train"]}


def test_the_best_rated_keep_the_shares_of_their_categories():
    records = [record(i, "relation", 9) for i in range(5)] + [record(10 + i, "depth", i + 1) for i in range(5)]
    kept = best_rated(records, 4)
    assert Counter(r.category for r in kept) == {"relation": 2, "depth": 2}
    assert [r.rating for r in kept if r.category == "depth"] == [4, 5]


def test_answers_and_ratings_as_models_write_them():
    options = ["on", "under", "A"]
    assert [answer_index(text, options) for text in ("B", "(B)", "B.", "(B) under", "Under", "A")] == [
        1,
        1,
        1,
        1,
        1,
        0,
    ]
    for bad in ("D", "", "(A) under", "AB", "1"):
        with pytest.raises(ValueError, match="names none"):
            answer_index(bad, options)
    assert [read_rating(x) for x in (8, "8", "8/10", "7.5")] == [8, 8, 8, 7]
    for bad in ("11", "0", "good", None):
        with pytest.raises(ValueError, match="rating"):
            read_rating(bad)


def test_count_questions_that_disagree_are_left_out_and_nothing_is_edited(tmp_path):
    out = tmp_path / "train.csv"
    assert run("preprocess_data", "--provider=template", "--source=synthetic:90", f"--out={out}") == 0
    before = list(read_records(out))
    journal = journal_of(out)
    lines = journal.read_text().splitlines()
    index = next(i for i, line in enumerate(lines) if '"category": "count"' in line)
    line = json.loads(lines[index])
    line["record"]["answer_index"] = (line["record"]["answer_index"] + 1) % 4
    lines[index] = json.dumps(line)
    journal.write_text(re.sub(r', "crc32": "\w+"', "", "\n".join(lines)) + "\n")
    assert run("fix_count_questions", f"--file={out}") == 0
    after = list(read_records(out))
    assert len(after) == 89 and all(r in before for r in after)
    assert len(journal.read_text().splitlines()) == len(lines) + 1
    journal.unlink()
    assert run("fix_count_questions", f"--file={out}") == 0
    assert len(list(read_records(out))) == 89 and out.with_name("train.before_fix.csv").is_file()


def test_commands_on_a_finished_data_set(folder, tmp_path, capsys):
    review = tmp_path / "review.csv"
    assert run("data_review", f"--dataset_name={folder / 'hf_data'}", f"--out={review}") == 0
    with review.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == NUM_ROWS
    assert run("easy_hard_split", f"--dataset_name={folder / 'hf_data'}", f"--out={tmp_path}") == 0
    old_val = {r.image_id for r in read_parquet(folder / "hf_data/val-00000-of-00001.parquet")}
    for group, levels in (("easy", {"easy"}), ("hard", {"medium", "hard"})):
        rows = read_parquet(tmp_path / f"hf_data_{group}/val-00000-of-00001.parquet")
        assert {row.image_id for row in rows} <= old_val and {row.level for row in rows} <= levels
    kept = tmp_path / "best.csv"
    assert run("filter_by_rating", f"--input_file={folder / 'train.csv'}", f"--output_file={kept}", "--top_k=40") == 0
    assert len(list(read_records(kept))) == 40
    assert run("generate_hf_data", f"--input_file={kept}", f"--out={tmp_path / 'best'}") == 0  # it knows its images
    assert run("print_data_stats", f"--filename={kept}") == 0
    assert "40 rows" in capsys.readouterr().out
    card = (folder / "hf_data/README.md").read_text()
    assert "| relation | 180 | 50.0 % |" in card and "path: val-*.parquet" in card


def test_a_report_shows_distributions_reasons_and_drawn_rows(folder):
    assert run("report", f"--input_file={folder / 'train.csv'}", "--num_rows=9") == 0
    page = (folder / "train.html").read_text()
    assert page.count("data:image/png") == 9 and "left out because" not in page
    assert all(f"<td>{name}</td>" in page for name in CATEGORIES)


@pytest.mark.nightly
def test_ten_thousand_rows_are_complete(tmp_path):
    out = tmp_path / "all"
    make_rows(out, 10_000)
    rows = read_parquet(out / "hf_data/train-00000-of-00001.parquet")
    rows += read_parquet(out / "hf_data/val-00000-of-00001.parquet")
    assert len(rows) == 10_000 and gold_scores(rows) == pytest.approx([1.0] * 10_000)
    assert num_prompts(f"{out}/hf_data@train") + num_prompts(f"{out}/hf_data@val") == 10_000


def make_rows(out: Path, number: int) -> None:
    assert run("preprocess_data", "--provider=template", f"--source=synthetic:{number}", f"--out={out}/t.csv") == 0
    assert run("generate_hf_data", f"--input_file={out}/t.csv", f"--out={out}") == 0


def test_a_row_costs_as_many_calls_in_a_large_set_as_in_a_small_one(tmp_path):
    calls = Counter[int]()

    def count(frame: FrameType, event: str, _: object) -> None:
        calls[number] += event in ("call", "c_call")

    for number in (1, 300, 600):  # the first pays for the imports
        sys.setprofile(count)
        try:
            make_rows(tmp_path / str(number), number)
        finally:
            sys.setprofile(None)
    assert 1.8 < calls[600] / calls[300] < 2.1


class Hub:
    """A hub with one repository, which keeps its visibility whatever is asked for."""

    is_there, is_private = True, False
    uploads: list[str] = []

    def __init__(self, token: str) -> None:
        pass

    def create_repo(self, repo: str, repo_type: str, private: bool, exist_ok: bool) -> None:
        if not self.is_there:
            type(self).is_private = private

    def repo_info(self, repo: str, repo_type: str) -> "Hub":
        return self

    @property
    def private(self) -> bool:
        return self.is_private

    def upload_folder(self, repo_id: str, repo_type: str, folder_path: str) -> None:
        self.uploads.append(repo_id)


@pytest.mark.parametrize(
    ("is_there", "is_private", "wanted", "said"),
    [(True, False, True, None), (True, True, False, "private"), (False, False, True, "private")]
    + [(False, True, False, "public"), (True, False, False, "public"), (True, True, True, "private")],
)
def test_nothing_private_goes_to_a_public_repository(
    tmp_path, monkeypatch, capsys, is_there, is_private, wanted, said
):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setenv("HF_TOKEN", "x")
    Hub.is_there, Hub.is_private, Hub.uploads = is_there, is_private, []
    if said is None:
        with pytest.raises(ValueError, match="exists and is public, nothing was uploaded"):
            upload_folder(tmp_path, "me/set", wanted)
        assert Hub.uploads == []
    else:
        upload_folder(tmp_path, "me/set", wanted)
        assert Hub.uploads == ["me/set"] and f"uploaded to me/set ({said})" in capsys.readouterr().out


def test_no_cell_of_a_csv_is_a_formula_and_records_come_back(tmp_path):
    from dataclasses import replace

    out = tmp_path / "train.csv"
    assert run("preprocess_data", "--provider=template", "--source=synthetic:3", f"--out={out}") == 0
    texts = ("=HYPERLINK(1)", "@SUM(A1)", "-1+1", "+x", "'=y", "-3")
    records = [
        replace(r, question=t, options=(t, "no"), answer_index=0, image_id=t, rating=5, full_scene={})
        for t in texts
        for r in list(read_records(out))[:1]
    ]
    for is_exported in (True, False):
        path = tmp_path / f"{is_exported}.csv"
        write_csv(records, path, is_exported)
        with path.open(newline="") as file:
            cells = [cell for row in csv.reader(file) for cell in row]
        assert not [c for c in cells if c[:1] in "=@" and c] and not [c for c in cells if c in ("-1+1", "+x")]
        assert [(r.image_id, r.question, r.options) for r in read_records(path)] == [(t, t, (t, "no")) for t in texts]


def test_a_csv_without_a_journal_says_where_its_images_are(tmp_path):
    out = tmp_path / "train.csv"
    assert run("preprocess_data", "--provider=template", "--source=synthetic:9", f"--out={out}") == 0
    assert run("generate_hf_data", f"--input_file={out}", f"--out={tmp_path}") == 0
    for name in ("train.csv", "data_train.csv", "data_val.csv"):
        assert image_locator(tmp_path / name) == "synthetic:9"
    rows = (tmp_path / "data_train.csv").read_text().replace("synthetic:9", "")
    (tmp_path / "released.csv").write_text(rows)
    assert image_locator(tmp_path / "released.csv") == "JosephZ/vg150_train_sgg_prompt"


def test_the_released_fourth_step_says_how_to_go_on_in_the_folder_of_the_second(tmp_path, capsys):
    out = tmp_path / "train.csv"
    assert run("preprocess_data", "--provider=template", "--source=synthetic:30", f"--out={out}") == 0
    first = ("generate_hf_data", f"--input_file={out}", f"--out={tmp_path}")
    assert run(*first) == 0
    fourth = ("generate_hf_data", f"--input_file={tmp_path / 'data_train.csv'}", f"--out={tmp_path}")
    assert run(*fourth) == 2
    assert "name another output, or pass --overwrite=True to replace it" in capsys.readouterr().err
    rows = len(list(read_records(tmp_path / "data_train.csv")))
    assert run(*fourth, "--overwrite=True", "--val_split=0") == 0
    assert len(list(read_records(tmp_path / "data_train.csv"))) == rows

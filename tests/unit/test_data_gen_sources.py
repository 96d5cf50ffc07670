"""Sources as users have them: broken rows, repeated ids, files of other programs, images of every kind."""

import json

import pyarrow.parquet as pq
import pytest

from data_gen.generate_data import main
from data_gen.journal import newest_lines
from data_gen.questions.records import journal_of, read_records
from data_gen.scenes.sources import absolute_locator, synthetic_row


def run(*arguments: str) -> int:
    return main([str(argument) for argument in arguments])


def test_bad_rows_are_quarantined_and_the_rest_is_kept(tmp_path, capsys):
    good = synthetic_row(0, 0)
    image = tmp_path / "good.png"
    image.write_bytes(good["image"]["bytes"])
    rows = [
        good | {"image": "good.png"},
        {"image_id": "b", "image": "good.png", "objects": []},
        {"image_id": "c", "image": "none.png", "objects": [], "relationships": []},
        {"image": "good.png", "objects": [], "relationships": []},
        {
            "image_id": "e",
            "image": "good.png",
            "objects": [{"id": "a", "bbox": [0, 0, 30, 30]}],
            "relationships": [],
        },
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out.csv"
    assert run("preprocess_data", "--provider=template", f"--source={tmp_path / 'rows.jsonl'}", f"--out={out}") == 0
    lines = [json.loads(line) for line in journal_of(out).read_text().splitlines()[1:]]
    assert [line["status"] for line in lines] == ["accepted", *["quarantined"] * 3, "accepted"]
    assert [line.get("reason", "")[:20] for line in lines[1:4]] == [
        "the row has no key '",
        "its image file canno",
        "row 3 has no image_i",
    ]


def test_a_file_of_another_program_is_never_taken_for_a_journal(tmp_path, capsys):
    """The journal of rows.csv would be rows.jsonl: here the source itself, whose last line lacks its end."""
    image = tmp_path / "good.png"
    image.write_bytes(synthetic_row(0, 0)["image"]["bytes"])
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(synthetic_row(0, 0) | {"image": "good.png"}))
    before = rows.read_bytes()
    command = ("preprocess_data", "--provider=template", f"--source={rows}", f"--out={tmp_path / 'rows.csv'}")
    for more in ((), ("--overwrite=True",)):
        assert run(*command, *more) == 2
        assert "rows.jsonl is there and no journal of this program" in capsys.readouterr().err
        assert rows.read_bytes() == before
    assert run(*command[:-1], f"--out={tmp_path / 'out.csv'}") == 0
    (tmp_path / "out.jsonl").replace(tmp_path / "kept.jsonl")
    (tmp_path / "out.jsonl").write_text('{"question": "of somebody else"}\n')
    assert len(list(read_records(tmp_path / "out.csv"))) == 1


def test_a_repeated_image_id_is_quarantined(tmp_path):
    (tmp_path / "good.png").write_bytes(synthetic_row(0, 0)["image"]["bytes"])
    row = synthetic_row(0, 0) | {"image": "good.png"}
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [row, row])))
    out = tmp_path / "out.csv"
    for _ in range(2):
        assert (
            run("preprocess_data", "--provider=template", f"--source={tmp_path / 'rows.jsonl'}", f"--out={out}") == 0
        )
    lines = [json.loads(line) for line in journal_of(out).read_text().splitlines()[1:]]
    assert [line["status"] for line in lines] == ["accepted", "quarantined"]
    assert lines[1]["reason"] == "an earlier row has the same image_id"


@pytest.mark.parametrize(
    "bad, message",
    [
        ("{broken", "line 2 is no JSON"),
        ("[1, 2]", "line 2 is no JSON object: [1, 2]"),
        ("[" * 5000 + "]" * 5000, "line 2 is no JSON"),
        ("1" * 5000, "line 2 is no JSON"),
        ('{"image_id": "a\\ud800", "objects": []}', "the image_id of row 1 holds"),
        ('{"image_id": "a\\u0000", "objects": []}', "the image_id of row 1 holds"),
        ('{"image_id": "a\\u001b[2J", "objects": []}', "the image_id of row 1 holds"),
    ],
)
def test_a_broken_line_of_a_source_is_quarantined_with_its_reason(tmp_path, bad, message):
    (tmp_path / "good.png").write_bytes(synthetic_row(0, 0)["image"]["bytes"])
    good = json.dumps(synthetic_row(0, 0) | {"image": "good.png"})
    last = json.dumps(synthetic_row(0, 1) | {"image": "good.png"})
    (tmp_path / "rows.jsonl").write_text(f"{good}\n{bad}\n{last}\n")
    out = tmp_path / "out.csv"
    for _ in range(2):
        source = f"--source={tmp_path / 'rows.jsonl'}"
        assert run("preprocess_data", "--provider=template", source, f"--out={out}") == 0
        lines = list(newest_lines(journal_of(out)))
        assert [line["status"] for line in lines] == ["accepted", "quarantined", "accepted"]
        assert message in lines[1]["reason"] and len(list(read_records(out))) == 2


def test_every_kind_of_source_gives_the_same_rows_from_any_start(tmp_path):
    import datasets
    import pyarrow as pa

    from data_gen.scenes.sources import open_source

    rows = [synthetic_row(0, i) for i in range(70)]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table.slice(0, 50), tmp_path / "train-0.parquet", row_group_size=20)
    pq.write_table(table.slice(50), tmp_path / "train-1.parquet", row_group_size=20)
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    texts = [row | {"image": "x.png"} for row in rows]
    (tmp_path / "rows.json").write_text(json.dumps(texts))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, texts)))
    ids = [row["image_id"] for row in rows]
    for name in ("", "saved", "rows.json", "rows.jsonl"):
        source = open_source(str(tmp_path / name)).check()
        assert source.num_rows == 70
        for start in (0, 19, 33, 50, 69):
            assert [row["image_id"] for row in source.rows(start)] == ids[start:], name


def test_a_source_is_found_from_another_folder_too(tmp_path, monkeypatch):
    (tmp_path / "scenes").mkdir()
    monkeypatch.chdir(tmp_path)
    found = {name: absolute_locator(name) for name in ("scenes", "scenes@val", "synthetic:9@3", "owner/name@train")}
    assert found["scenes"] == str(tmp_path / "scenes") and found["scenes@val"] == f"{tmp_path / 'scenes'}@val"
    assert [found[name] for name in ("synthetic:9@3", "owner/name@train")] == ["synthetic:9@3", "owner/name@train"]


@pytest.mark.parametrize(("asked", "joined"), [([], "local"), (["--ray_address=auto"], "auto")])
def test_blocks_join_a_cluster_only_when_asked_to(asked, joined, tmp_path, monkeypatch):
    class Joined(Exception):
        pass

    def init(address=None, **_):
        raise Joined(address)

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    with pytest.raises(Joined, match=joined):
        run(
            "preprocess_on_cluster",
            "--provider=template",
            "--source=synthetic:9",
            f"--out={tmp_path / 't.csv'}",
            *asked,
        )

"""Archives are read in place and videos by a stated rule; what is broken is named before a model is asked."""

import io
import json
import random
import zipfile
from collections import Counter

import datasets
import pytest
from PIL import Image, ImageStat

from evaluation.benchmarks.media import MediaFolder, place_frames, read_frames
from evaluation.benchmarks.rows import BENCHMARKS
from evaluation.benchmarks.samples import build_request, load_samples
from tests.support.benchmark_rows import PICTURE, ROWS, video, write_benchmark


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_archive(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def load(name, folder):
    return load_samples(name, BENCHMARKS[name], str(folder))


@pytest.mark.parametrize("count", [1, 2, 7, 32])
def test_frames_are_spread_evenly_from_first_to_last(count):
    np = pytest.importorskip("numpy")
    for total in (1, 5, 32, 40, 997):
        expected = np.linspace(0, total - 1, min(count, total), dtype=int).tolist()
        assert place_frames(total, count) == expected


def test_the_frames_of_a_video_are_the_ones_placed():
    frames = [Image.open(io.BytesIO(frame)) for frame in read_frames(video(40), 4)]
    brightness = [ImageStat.Stat(frame.convert("L")).mean[0] for frame in frames]
    assert [frame.size for frame in frames] == [(40, 30)] * 4
    assert brightness == pytest.approx([40, 92, 144, 196], abs=6)
    assert len(read_frames(video(3), 32)) == 3


@pytest.mark.parametrize("data", [b"", b"no video", video()[:400]], ids=["empty", "text", "cut"])
def test_a_video_that_cannot_be_decoded_is_an_error_of_its_item(data, tmp_path):
    write_benchmark("vsi-bench", tmp_path / "data", "test")
    write_archive(tmp_path / "data" / "arkitscenes.zip", {"arkitscenes/41069025.mp4": data})
    sample, _ = load("vsi-bench", tmp_path / "data")
    with pytest.raises(ValueError, match=r"item 000000: arkitscenes/41069025\.mp4: the video cannot be decoded"):
        build_request(sample, "reasoning")


@pytest.mark.parametrize("name", ["mindcube-tiny", "site-image", "spbench-si", "spatialviz"])
def test_an_archive_without_a_row_s_file_is_one_message(name, tmp_path):
    write_benchmark(name, tmp_path / "data", BENCHMARKS[name].split)
    archives = sorted((tmp_path / "data").glob("*.zip"))
    with zipfile.ZipFile(archives[-1]) as archive:
        kept = {member: archive.read(member) for member in archive.namelist() if member.endswith("jsonl")}
    write_archive(archives[-1], kept)
    with pytest.raises(ValueError, match=rf"{name}, row 0: .*\.png is in none of .*{archives[-1].name}; fetch"):
        load(name, tmp_path / "data")


def test_an_archive_that_was_never_fetched_is_one_message(tmp_path):
    write_benchmark("spatialviz", tmp_path / "data", "test")
    (tmp_path / "data" / "images.zip").unlink()
    with pytest.raises(ValueError, match=r"spatialviz, row 0: .* is not in .*; fetch the files again \(2 of 2 items"):
        load_samples("spatialviz", BENCHMARKS["spatialviz"], str(tmp_path / "data"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox": [1, 2, 0, 4]}, "row 1: box .*: width and height must be above 0"),
        ({"bbox": [1, 2, 3]}, r"row 1: box .* is not \[x, y, width, height\]"),
        ({"bbox": None}, "row 1: box None is not"),
        ({"question": "Which?"}, "row 1: column question lists no choices"),
        ({"answer": "(e) moon"}, "row 1: answer .* names none of the choices"),
    ],
)
def test_a_faulty_row_of_boxes_is_one_message(change, message, tmp_path):
    write_benchmark("multihopspatial", tmp_path / "data", "test")
    file = tmp_path / "data/data/multihop_test_4500.json"
    rows = json.loads(file.read_text())
    file.write_text(json.dumps([rows[0], rows[1] | change]))
    with pytest.raises(ValueError, match=message):
        load_samples("multihopspatial", BENCHMARKS["multihopspatial"], str(tmp_path / "data"))


def test_an_archive_that_was_cut_off_is_one_message(tmp_path):
    write_benchmark("spatialviz", tmp_path / "data", "test")
    archive = tmp_path / "data" / "images.zip"
    archive.write_bytes(archive.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"images\.zip: no whole zip archive .*; fetch it again"):
        load("spatialviz", tmp_path / "data")


def test_a_damaged_member_is_an_error_of_its_item(tmp_path):
    write_benchmark("spbench-si", tmp_path / "data", "SPBench-SI")
    archive = tmp_path / "data" / "SPBench-SI-images.zip"
    content = bytearray(archive.read_bytes())
    content[len("SPBench-SI-images/scene0011_00/200.png") + 60] ^= 255
    archive.write_bytes(content)
    sample, _ = load("spbench-si", tmp_path / "data")
    with pytest.raises(ValueError, match="item 000000: its image cannot be read: .*200.png cannot be read: Bad CRC"):
        build_request(sample, "reasoning")


def test_any_damage_of_an_archive_is_a_value_error(tmp_path):
    rng, whole, seen = random.Random(0), io.BytesIO(), Counter()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(4):
            archive.writestr(f"images/é{number}.txt", bytes(range(256)) * 3)
    for number in range(400):
        content = bytearray(whole.getvalue())
        content[rng.randrange(len(content))] ^= rng.randrange(1, 256)
        path = tmp_path / f"{number}.zip"
        path.write_bytes(content)
        try:
            media = MediaFolder(tmp_path, (path.name,))
            for name in ("é0.txt", "é3.txt"):
                if media.has(name):
                    assert media.read(name) == bytes(range(256)) * 3
                    seen["read"] += 1
        except ValueError as error:
            assert path.name in str(error)
            seen["refused"] += 1
    assert seen["read"] > 100 and seen["refused"] > 50


def test_files_unpacked_beside_the_rows_are_read_too(tmp_path):
    write_benchmark("spatialviz", tmp_path / "data", "test")
    with zipfile.ZipFile(tmp_path / "data" / "images.zip") as archive:
        archive.extractall(tmp_path / "data")
    (tmp_path / "data" / "images.zip").unlink()
    for path in (tmp_path / "data" / "images").iterdir():
        path.rename(tmp_path / "data" / path.name)
    assert len(build_request(load("spatialviz", tmp_path / "data")[0], "reasoning").images) == 1


def test_a_member_is_found_below_folders_that_only_one_side_names(tmp_path):
    write_archive(tmp_path / "a.zip", {"wrapped/x/1.png": PICTURE["bytes"]})
    media = MediaFolder(tmp_path, ("*.zip",))
    assert media.has("x/1.png") and media.has("wrapped/x/1.png") and media.has("images/x/1.png")
    assert not media.has("y/1.png") and not media.has("2.png")


def test_columns_that_changed_are_named(tmp_path):
    write_benchmark("embspatial", tmp_path / "data", "test")
    (path,) = (tmp_path / "data").iterdir()
    renamed = [{("options" if k == "answer_options" else k): v for k, v in row.items()} for row in ROWS["embspatial"]]
    datasets.Dataset.from_list(renamed).to_parquet(path)
    with pytest.raises(ValueError, match="embspatial: no column answer_options; the data has .*options"):
        load("embspatial", tmp_path / "data")


@pytest.mark.parametrize("text", ["None", "NA", "null", "N/A", "nan"])
def test_a_choice_that_reads_as_nothing_is_kept(text, tmp_path):
    rows = [row | {"A": text, "B": "cat", "answer": "A"} for row in ROWS["3dsrbench_circular"]]
    datasets.Dataset.from_list(rows).to_csv(tmp_path / "test.tsv", sep="\t", index=False)
    for sample in load("3dsrbench_circular", tmp_path / "test.tsv"):
        assert (sample.choices, sample.reference.text) == ((text, "cat"), text)


def test_realworldqa_s_choices_are_found_in_its_question(tmp_path):
    write_benchmark("realworld_qa", tmp_path / "data", "test")
    chosen, counted = load("realworld_qa", tmp_path / "data")
    assert chosen.choices == ("dog", "cat") and chosen.reference.letter == "B"
    assert counted.choices == () and counted.reference.text == "2"


@pytest.mark.parametrize(("precision", "text", "decimals"), [(1.0, "7.5", 1), (None, "7.5", None)])
def test_mathvista_s_precision_is_the_row_s(precision, text, decimals, tmp_path):
    rows = [ROWS["mathvista"][1] | {"precision": precision, "answer": text}] * 2
    table = datasets.Dataset.from_list(rows).cast_column("decoded_image", datasets.Image())
    table.to_parquet(tmp_path / "testmini-0.parquet")
    assert load("mathvista", tmp_path)[0].reference.decimals == decimals

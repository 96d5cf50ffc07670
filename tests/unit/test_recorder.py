"""Recorder: what lies in a run's files, and faults of disk and process that must not reach training."""

import hashlib
import json
import math
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from spatialthinker.storage.images import encode, load_image
from tests.support.recording import FULL_AT_BYTES, describe, fill_disk
from verl.model.videos import Video, take_frames
from verl.protocol import DataProto
from verl.protocol.row_values import as_objects
from verl.trainer.recording.answered import Answered
from verl.trainer.recording.files import drop_after, step_file
from verl.trainer.recording.pictures import MAX_BYTES, MAX_PIXELS, shrink, store_picture
from verl.trainer.recording.recorder import MAX_WAITING, Recorder
from verl.trainer.recording.table import MAX_CHARACTERS

ROOT = Path(__file__).parents[2]
PICTURES = [b"first picture", b"second picture"]
SCORES = torch.tensor([[0.1, 0.7], [0.3, 0.3]])
ADVANTAGES = torch.tensor([[-0.30000001, 0.29999998], [0.0, 0.0]])
LIMIT = 3


def make_answered(texts: list[str] | None = None, **tensors: torch.Tensor) -> Answered:
    """Two prompts with two responses of 1, 3, 2 and 2 tokens, of at most 3."""
    mask = torch.tensor([[[1, 0, 0], [1, 1, 1]], [[1, 1, 0], [1, 1, 0]]]).bool()
    groups = DataProto.from_dict(
        {
            "responses": torch.arange(12).reshape(2, 2, 3),
            "response_mask": mask,
            "prompt_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
            **tensors,
        },
        {
            "uid": as_objects(["4 (image_id a)", "7"]),
            "problem": as_objects(["Which?", "How many?"]),
            "ground_truth": as_objects(["one", {"count": 2}]),
            "images": as_objects([[PICTURES[0]], [PICTURES[1], PICTURES[0]]]),
        },
    )
    scores = {"overall": SCORES, "format": torch.ones(2, 2), "accuracy": torch.tensor([[0.0, 1.0], [1.0, 1.0]])}
    return Answered(groups, texts or ["It is one.", "It is two.", "three", "It is same."], scores)


def record(run: Path, *steps: tuple[str, int, Answered], **choices: Any) -> Recorder:
    """A recorder that has written the steps and ended."""
    options: dict[str, Any] = {"rule": "all", "describe": describe, "max_response_length": LIMIT} | choices
    recorder = Recorder(run, reward="test", **options)
    recorder.begin(-1)
    for kind, step, answered in steps:
        recorder.read(kind, step, [answered])
        recorder.write()
    recorder.close()
    return recorder


def rows(run: Path, kind: str, step: int) -> list[dict[str, Any]]:
    return pq.read_table(step_file(run / "rollouts", kind, step)).to_pylist()


def test_a_step_is_recorded_with_the_numbers_of_its_update(tmp_path):
    engine = torch.full((2, 2, 3), -1.0)
    old = torch.where(torch.tensor([True, False])[:, None, None], torch.nan, engine + math.log(2))
    entropies = torch.tensor([[0.5, math.nan], [0.25, 1.0]], dtype=torch.double)
    answered = make_answered(
        advantages=ADVANTAGES, old_log_probs=old, rollout_log_probs=engine, entropy_mean=entropies
    )
    recorder = record(tmp_path, ("train", 12, answered), labels={"train": lambda uid: ("set", f"kind {uid[0]}")})
    found = rows(tmp_path, "train", 12)
    assert [(row["group"], row["sample"], row["uid"]) for row in found] == [
        *((0, sample, "4 (image_id a)") for sample in range(2)),
        *((1, sample, "7") for sample in range(2)),
    ]
    # Bit for bit: every float32 is a float64.
    assert [row["score"] for row in found] == SCORES.flatten().tolist()
    assert [row["advantage"] for row in found] == ADVANTAGES.flatten().tolist()
    assert [row["right"] for row in found] == [False, True, True, True]
    assert [row["stop_reason"] for row in found] == ["stop", "length", "stop", "stop"]
    assert [row["response_tokens"] for row in found] == [1, 3, 2, 2] and found[0]["prompt_tokens"] == 2
    assert [row["answer"] for row in found] == ["one.", "two.", "three", "same."]
    assert [row["failure"] for row in found] == [None, None, "no_stop", None]
    assert found[2]["ground_truth"] == json.dumps({"count": 2}) and found[3]["category"] == "kind 7"
    assert [row["log_prob_mean"] for row in found][1:3] == pytest.approx([-1, math.log(2) - 1])
    assert found[0]["ratio_mean"] is None and found[2]["ratio_mean"] == pytest.approx(2)
    assert [row["entropy_mean"] for row in found] == [0.5, None, 0.25, 1.0]
    assert found[0]["token_ids"] is None and found[0]["kind"] == "train" and found[0]["step"] == 12
    names = [hashlib.sha256(picture).hexdigest() for picture in PICTURES]
    assert found[2]["images"] == [names[1], names[0]]
    images = tmp_path / "rollouts" / "images"
    assert [(images / name[:2] / name).read_bytes() for name in names] == PICTURES
    about = json.loads((tmp_path / "rollouts" / "about.json").read_text())
    assert about == {"version": 1, "reward": "test", "rule": "all", "parts": ["format", "accuracy"]}
    assert recorder.metrics() == {"recording/failed_steps": 0, "recording/dropped_steps": 0}


def test_a_video_is_recorded_as_some_of_its_frames(tmp_path):
    """Of 16 frames, each of one grey, the eight that are evenly spaced; all of a video of four."""
    greys = [[10 * index for index in range(16)], [7, 77, 177, 207]]
    videos = []
    for each in greys:
        frames = np.stack([np.full((28, 56, 3), grey, np.uint8) for grey in each])
        videos.append(Video(frames.tobytes(), 28, 56, take_frames(len(frames), 2.0)))
    answered = make_answered()
    answered.groups.non_tensor_batch["videos"] = as_objects([[videos[0]], [videos[1]]])
    record(tmp_path, ("train", 1, answered))
    images, found = tmp_path / "rollouts" / "images", rows(tmp_path, "train", 1)
    for row, num_images, expected in ((found[0], 1, [0, 20, 40, 60, 90, 110, 130, 150]), (found[2], 2, greys[1])):
        frames = [load_image((images / name[:2] / name).read_bytes()) for name in row["images"][num_images:]]
        assert {frame.size for frame in frames} == {(56, 28)}
        assert [frame.getpixel((3, 3))[0] for frame in frames] == pytest.approx(expected, abs=2)


def test_numbers_that_are_none_and_broken_text_are_recorded_as_such(tmp_path):
    broken = make_answered(["It is \ud800.", "x" * (MAX_CHARACTERS + 1), "c.", "d."])
    broken.scores["overall"][:] = torch.tensor([[math.nan, math.inf], [0.5, 0.5]])
    record(tmp_path, ("val", 0, broken))
    found = rows(tmp_path, "val", 0)
    SCORES[:] = torch.tensor([[0.1, 0.7], [0.3, 0.3]])
    assert [row["score"] for row in found] == [None, None, 0.5, 0.5] and found[0]["advantage"] is None
    assert found[0]["response"] == "It is ?." and found[0]["answer"] == "?."
    assert len(found[1]["response"]) == MAX_CHARACTERS
    assert [row["response_cut"] for row in found] == [False, True, False, False]


def test_tokens_are_recorded_on_demand(tmp_path):
    engine = -torch.arange(12.0).reshape(2, 2, 3)
    answered = make_answered(advantages=ADVANTAGES, rollout_log_probs=engine)
    record(tmp_path, ("train", 1, answered), with_tokens=True)
    found = rows(tmp_path, "train", 1)
    assert [row["token_ids"] for row in found] == [[0], [3, 4, 5], [6, 7], [9, 10]]
    assert found[1]["token_log_probs"] == [-3.0, -4.0, -5.0] and found[1]["token_ratios"] is None


def test_a_resumed_run_drops_what_it_will_write_again(tmp_path):
    steps = [("val", 0, make_answered()), *(("train", step, make_answered()) for step in (1, 2, 3))]
    record(tmp_path, *steps)
    folder = tmp_path / "rollouts"
    (folder / "train_step_000004.parquet.tmp").write_text("half of a")
    (folder / "checks.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    recorder = Recorder(tmp_path, "all", max_response_length=LIMIT)
    recorder.begin(1)
    recorder.close()
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    assert names == ["about.json", "checks.jsonl", "train_step_000001.parquet", "val_step_000000.parquet"]
    assert (folder / "checks.jsonl").read_text() == '{"step": 1}\n'
    drop_after(folder, -1)
    assert not list(folder.glob("*.parquet"))


def test_nothing_is_written_or_started_with_none(tmp_path):
    recorder = record(tmp_path, ("train", 1, make_answered()), rule="none")
    assert not list(tmp_path.iterdir()) and recorder.background.pool is None and recorder.metrics() == {}


def test_a_place_that_cannot_be_written_is_said_once_and_counted(tmp_path, capsys):
    (tmp_path / "rollouts").write_text("in the way")
    recorder = record(tmp_path, *(("train", step, make_answered()) for step in (1, 2)))
    assert recorder.metrics()["recording/failed_steps"] == 2
    said = capsys.readouterr().out
    assert said.count("were not recorded in full") == 1 and "train step 1" in said and "training goes on" in said


def test_a_full_disk_leaves_whole_files_alone(tmp_path, capsys):
    """The limit is on the size of a file; what is too large leaves nothing behind."""
    noise = random.Random(1).randbytes(2 * FULL_AT_BYTES)
    large = make_answered([noise.hex(), "a.", "b.", "c."])
    recorder = record(tmp_path, ("train", 1, large), ("train", 2, make_answered()), prepare=fill_disk)
    assert recorder.num_failed == 1 or "Warning" in capsys.readouterr().out
    files = [path.name for path in (tmp_path / "rollouts").iterdir() if path.is_file()]
    assert "train_step_000001.parquet" not in files and not [name for name in files if name.endswith(".tmp")]
    assert "train step 1 were not recorded in full" in capsys.readouterr().out or recorder.num_failed


@pytest.mark.parametrize(("word", "reason"), [("raise", "cannot read it"), ("die", "died")])
def test_responses_that_cannot_be_read_are_recorded_without_what_they_hold(tmp_path, capsys, word, reason):
    bad = make_answered([f"{word}.", "b.", "c.", "d."])
    recorder = record(tmp_path, ("train", 1, bad), ("train", 2, make_answered()))
    assert reason in capsys.readouterr().out and recorder.num_failed == 1
    assert [row["answer"] for row in rows(tmp_path, "train", 1)] == [None] * 4
    assert rows(tmp_path, "train", 1)[0]["response"] == f"{word}."
    assert rows(tmp_path, "train", 2)[0]["answer"] == "one."


def test_a_disk_that_is_too_slow_costs_steps_and_no_memory(tmp_path, capsys):
    recorder = Recorder(tmp_path, "all", describe=describe, max_response_length=LIMIT)
    for step in range(1, MAX_WAITING + 3):
        recorder.read("train", step, [make_answered(["sleep.", "b.", "c.", "d."])])
        recorder.write()
    assert recorder.metrics()["recording/dropped_steps"] == 2
    assert capsys.readouterr().out.count("trainer.rollouts_to_keep=odd") == 1
    recorder.jobs.put(None)
    recorder.background.close()  # as the end of the run does


def test_a_picture_of_20_megapixels_is_stored_small(tmp_path):
    small = encode_noise(112, 112)
    assert shrink(small) is small
    large = encode_noise(5000, 4000, quality=95)
    assert len(large) > 5 * MAX_BYTES
    name = store_picture(tmp_path, large)
    stored = (tmp_path / name[:2] / name).read_bytes()
    assert hashlib.sha256(stored).hexdigest() == name and len(stored) < len(large) / 5
    picture = load_image(stored)
    assert picture.width * picture.height <= MAX_PIXELS and picture.width / picture.height == pytest.approx(1.25, 0.01)
    assert shrink(b"no picture" * MAX_BYTES) == b"no picture" * MAX_BYTES


def encode_noise(width: int, height: int, quality: int = 80) -> bytes:
    """A JPEG of noise in large grains."""
    grains = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return encode(Image.fromarray(grains).resize((width, height)), "JPEG", quality=quality)


def kill_writers(folder: Path, num_kills: int, seed: int) -> int:
    """Kills programs that write at random moments, and reads all that lies there after each; returns the steps."""
    moments, num_steps = random.Random(seed), 0
    for _ in range(num_kills):
        program = [sys.executable, "-m", "tests.support.recording", str(folder)]
        process = subprocess.Popen(program, cwd=ROOT)
        deadline = time.monotonic() + 60
        while len(list(folder.glob("*.parquet"))) <= num_steps and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        files = sorted(folder.glob("*.parquet"))
        assert len(files) > num_steps, "nothing was written"
        for step, file in enumerate(files[num_steps:], num_steps + 1):
            table = pq.read_table(file)
            assert table["response"][0].as_py() == f"step {step} " * 200 and len(table) == 16
            (name,) = table["images"][0].as_py()
            data = (folder / "images" / name[:2] / name).read_bytes()
            assert hashlib.sha256(data).hexdigest() == name
        num_steps = len(files)
    return num_steps


def test_a_kill_at_any_moment_leaves_readable_files(tmp_path):
    assert kill_writers(tmp_path, 8, seed=1) >= 8


@pytest.mark.nightly
def test_fifty_kills_leave_readable_files(tmp_path):
    assert kill_writers(tmp_path, 50, seed=2) >= 50

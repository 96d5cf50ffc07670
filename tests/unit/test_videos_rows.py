"""Rows with videos: tokens, positions and patches are transformers' own; what cannot be trained on is named."""

import io
import pickle
import re

import numpy as np
import pytest
import torch
from PIL import Image

from spatialthinker.storage.videos import BrokenVideo, decode_frames, read_video_header
from tests.support.tiny_qwen import VISION_FAMILIES, tiny_model
from tests.support.videos import draw_frames, frame_list, open_rows, tiny_processor, write_video
from verl.config.records import SourceConfig
from verl.data.dataset import DataError, collate_prompts
from verl.data.mixture import MixedSet
from verl.data.processor import TextProcessor
from verl.model.qwen_vl import image_patches
from verl.model.videos import Sampling, engine_inputs, frame_size, in_order, sample_frames, take_frames
from verl.trainer.dry_run import describe_prompt, read_data_shape
from verl.trainer.resume import _digest_rows

QUESTION = {"prompt": "<video>What moves?", "answer": "a", "images": None}


@pytest.fixture(scope="module")
def processors():
    return {family: tiny_processor(family) for family in VISION_FAMILIES}


def rope_index(family, prompt, clips, image_grids=(), seconds=()):
    """Positions by transformers' model of the family."""
    model = tiny_model(family=family).model
    model.config.vision_config.tokens_per_second = 2  # as in the released models
    kinds = torch.zeros_like(prompt.ids)
    for number, token in ((1, 261), (2, 262)):
        kinds[prompt.ids == token] = number
    grids = {"video_grid_thw": torch.tensor([clip.grid for clip in clips])} if clips else {}
    if image_grids:
        grids["image_grid_thw"] = torch.tensor(image_grids)
    if family == "qwen2_5_vl" and seconds:
        grids["second_per_grid_ts"] = torch.tensor(seconds)
    return model.get_rope_index(prompt.ids.unsqueeze(0), kinds.unsqueeze(0), **grids)[0][:, 0]


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_tokens_positions_and_patches_are_the_processors_own(tmp_path, processors, family):
    processor = processors[family]
    assert (processor.image_token_id, processor.video_token_id) == (261, 262)
    path = write_video(tmp_path / "a.mp4", 20)
    rows = [
        QUESTION | {"videos": [str(path)]},
        {"prompt": "<image>or<video>?", "answer": "a", "images": [frame_list(1)[0]], "videos": [str(path)]},
        {"prompt": "What?", "answer": "a", "images": None, "videos": None},
    ]
    per_second = 2.0 if family == "qwen2_5_vl" else 1.0
    data = open_rows(tmp_path, rows, processor, videos={"tokens_per_second": per_second})
    for prompt, entry in zip(data, data.entries, strict=True):
        text = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "text", "text": prompt.problem}]}], add_generation_prompt=True
        )
        text = text.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
        # transformers 5 leaves a second pair around Qwen3-VL's frames, which its authors' processor and vLLM replace
        is_third = family.startswith("qwen3")
        text = text.replace("<video>", "<|video_pad|>" if is_third else "<|vision_start|><|video_pad|><|vision_end|>")
        given = {"images": [Image.open(path_) for path_ in map(io.BytesIO, prompt.images)] or None}
        if prompt.videos:
            given |= {
                "videos": [video.frames for video in prompt.videos],
                "video_metadata": [
                    {"total_num_frames": 20, "fps": 10.0, "frames_indices": list(video.sampling.indices)}
                    for video in prompt.videos
                ],
                "videos_kwargs": {"do_resize": False, "do_sample_frames": False},
            }
        expected = processor(text=[text], return_tensors="pt", **given)
        assert prompt.ids.tolist() == expected["input_ids"][0].tolist()
        media = in_order(prompt.images, prompt.videos)
        pixels, grids = image_patches(
            media, processor.image_processor, video_processor=processor.video_processor, **data.pixel_limits
        )
        by_kind = sorted(zip(media, pixels, grids, strict=True), key=lambda part: not isinstance(part[0], bytes))
        own = [grid for _, _, grid in by_kind]
        assert own == entry.patch_grids
        found = [expected[key] for key in ("pixel_values", "pixel_values_videos") if key in expected]
        for ours, theirs in zip(by_kind, found, strict=True):
            assert torch.equal(ours[1], theirs)
        seconds = [1.0] * len(entry.clips)
        assert all(clip.interval == per_second or clip.stamps for clip in entry.clips)
        assert torch.equal(prompt.positions, rope_index(family, prompt, entry.clips, entry.grids, seconds))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_frames_are_scaled_as_the_video_processor_scales_them(tmp_path, processors, family):
    path, processor = write_video(tmp_path / "a.mp4", 20, size=(200, 120)), processors[family]
    row = QUESTION | {"videos": [str(path)]}
    (prompt,) = open_rows(tmp_path, [row], processor)
    (video,) = prompt.videos
    raw = decode_frames(path, video.sampling.indices)
    assert raw.shape[1:] == (120, 200, 3)
    assert (video.width, video.height) == ((140, 84), (128, 64))[family == "qwen3_vl"]
    bounds = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    if family == "qwen3_vl":  # whose processor bounds the whole video
        bounds = {name: value * len(raw) for name, value in bounds.items()}
    theirs = processor.video_processor(
        videos=[raw], do_sample_frames=False, cap_pixels_per_frame=False, size=bounds, return_tensors="pt"
    )
    ours, _ = image_patches([video], None, video_processor=processor.video_processor)
    assert torch.equal(ours[0], theirs["pixel_values_videos"])


def test_paths_bytes_and_lists_are_read_alike(tmp_path, processors):
    path = write_video(tmp_path / "a.mp4", 12)
    by_path = open_rows(tmp_path, [QUESTION | {"videos": ["a.mp4"]}], processors["qwen3_vl"], image_dir=str(tmp_path))
    by_bytes = open_rows(tmp_path, [QUESTION | {"videos": [path.read_bytes()]}], processors["qwen3_vl"])
    one = open_rows(tmp_path, [QUESTION | {"videos": str(path)}], processors["qwen3_vl"])
    assert by_path[0].videos == by_bytes[0].videos == one[0].videos
    assert "videos" not in by_path[0].columns

    named = [f"{number}.png" for number in range(5)]
    for name, data in zip(named, frame_list(5), strict=True):
        (tmp_path / name).write_bytes(data)
    as_paths = open_rows(tmp_path, [QUESTION | {"videos": [named]}], processors["qwen3_vl"], image_dir=str(tmp_path))
    as_bytes = open_rows(tmp_path, [QUESTION | {"videos": [frame_list(5)]}], processors["qwen3_vl"])
    pictures = {"bytes": frame_list(5)[0], "path": None}, *[{"bytes": d, "path": None} for d in frame_list(5)[1:]]
    as_pictures = open_rows(tmp_path, [QUESTION | {"videos": [list(pictures)]}], processors["qwen3_vl"])
    (video,) = as_paths[0].videos
    assert [video] == as_bytes[0].videos == as_pictures[0].videos
    assert video.sampling == Sampling((0, 1, 2, 3, 4, 4), 2.0, 6)
    expected = [np.asarray(frame) for frame in draw_frames(5)]
    assert video.frames.shape == (6, 64, 96, 3)
    assert all(np.array_equal(frame, expected[min(i, 4)]) for i, frame in enumerate(video.frames))


def test_an_open_data_set_holds_no_frames_and_videos_are_decoded_once_per_step(tmp_path, processors, monkeypatch):
    from verl.data import videos

    decoded = []
    known = videos.decode_frames
    monkeypatch.setattr(videos, "decode_frames", lambda *a: decoded.append(a) or known(*a))
    path = write_video(tmp_path / "a.mp4", 40)
    data = open_rows(tmp_path, [QUESTION | {"videos": [str(path)]}] * 3, processors["qwen2_5_vl"])
    assert not decoded and len(pickle.dumps(data.entries)) < 3 * 1000
    for _ in range(2):  # epochs
        assert data.readable([0, 1, 2]) == [0, 1, 2]
        batch = collate_prompts([data[index] for index in range(3)], 0)
    assert len(decoded) == 6 and not data.decoded
    assert [len(row[0].sampling.indices) for row in batch.non_tensor_batch["videos"]] == [8] * 3
    data.read(0, has_videos=False)
    assert len(decoded) == 6


def test_frames_follow_rate_and_limits():
    assert (
        sample_frames(300, 30.0, 2.0, 768).indices[:3] == (0, 16, 31)
        and len(sample_frames(300, 30, 2, 768).indices) == 20
    )
    assert len(sample_frames(300, 30.0, 2.0, 9).indices) == 8
    assert sample_frames(300, 30.0, 0.1, 768).indices == (0, 100, 199, 299)  # at least four
    assert sample_frames(3, 30.0, 2.0, 768).indices == (0, 2)
    assert sample_frames(1, 30.0, 2.0, 768) == Sampling((0, 0), 30.0, 2)
    assert take_frames(3, 2.0) == Sampling((0, 1, 2, 2), 2.0, 4)
    assert take_frames(4, 2.0).timestamps == [0.25, 1.25] and take_frames(4, 2.0).seconds_per_patch == 1.0


@pytest.mark.parametrize(
    ("num_frames", "bounds", "pixels"),
    [
        (8, (None, None, None), 768 * 28 * 28),  # 1920 x 1080 is more than a frame's 768 tokens
        (8, (None, 100_000, None), 100_000),
        (400, (None, None, None), 115_200 * 28 * 28 * 2 / 400),
        (64, (None, None, 4_000_000), 4_000_000 * 2 / 64),
        (64, (200_000, None, 4_000_000), 200_000 * 1.05),
    ],
)
def test_frames_are_bounded_one_by_one_and_together(processors, num_frames, bounds, pixels):
    width, height = frame_size((1920, 1080), num_frames, processors["qwen2_5_vl"].video_processor, *bounds)
    assert width % 28 == height % 28 == 0 and 0.85 * pixels < width * height <= pixels
    assert frame_size((3, 2), 2, processors["qwen2_5_vl"].video_processor, 1, None, None) == (28, 28)


def test_the_engine_is_told_the_seconds_that_training_uses(processors):
    """Also where it rounds them to bf16; a file of 23 frames at 10 a second gives no whole number."""
    from transformers.video_utils import VideoMetadata

    sampling = sample_frames(23, 10.0, 2.0, 768)
    assert len(sampling.indices) == 4 and sampling.seconds_per_patch == 1.1484375
    video = open_list(processors)
    video = type(video)(video.data, video.height, video.width, sampling)
    _, options = engine_inputs([video], False)
    (metadata,) = options["videos_kwargs"]["video_metadata"]
    seconds = 2 / VideoMetadata(**metadata).sampled_fps
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert float(torch.tensor(seconds, dtype=dtype)) == sampling.seconds_per_patch


def open_list(processors):
    from verl.model.videos import Video, resize_frames

    frames = np.stack([np.asarray(frame) for frame in draw_frames(4)])
    return Video(resize_frames(frames, (56, 56)), 56, 56, take_frames(4, 2.0))


def broken_files(folder):
    """Name -> a file that is no good video."""
    whole = write_video(folder / "whole.avi", 25).read_bytes()
    (folder / "cut.avi").write_bytes(whole[: len(whole) // 2])
    write_video(folder / "empty.avi", 0)
    (folder / "text.mp4").write_bytes(b"no video " * 50)
    (folder / "picture.mp4").write_bytes(frame_list(1)[0])


MIXED_SIZES = [*frame_list(2), *frame_list(1, (64, 96))]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"videos": ["empty.avi"]}, {}, "empty.avi holds no frames"),
        ({"videos": ["text.mp4"]}, {}, "text.mp4 is no video that OpenCV can open"),
        ({"videos": ["picture.mp4"]}, {}, "picture.mp4 holds no frames, or is a picture and no video"),
        ({"videos": ["gone.mp4"]}, {}, "column 'videos': there is no video file"),
        ({"videos": ["."]}, {}, "is no regular file, and a video is read from nothing else"),
        ({"videos": [[]]}, {}, "a video is a list without frames"),
        ({"videos": [[None, None]]}, {}, "one of its frames is empty"),
        ({"videos": [""]}, {}, "a video is empty; store it"),
        ({"videos": [5]}, {}, "a video must be a path, encoded bytes or a list of frames, got int"),
        ({"videos": [MIXED_SIZES]}, {}, "frame 2 of a video has 64 x 96 pixels and the first one 96 x 64"),
        ({"videos": [[frame_list(1)[0], b"no picture"]]}, {}, "frame 1 of a video cannot be decoded"),
        (
            {"videos": [frame_list(6)]},
            {"videos": {"max_frames": 4}},
            "a list of 6 frames, more than data.max_frames=4",
        ),
        ({"videos": None}, {}, "the prompt has 1 video places but the row has 0 videos; write one <video> per video"),
        ({"prompt": "What?", "videos": [frame_list(2)]}, {}, "0 video places but the row has 1 videos"),
        (
            {"videos": [frame_list(8)]},
            {"max_prompt_length": 40, "filter_overlong_prompts": False},
            "tokens with a video of 8 frames is longer than data.max_prompt_length=40; raise it, lower "
            "data.max_pixels, data.video_fps or data.max_frames",
        ),
    ],
)
def test_a_row_with_a_bad_video_is_named_when_the_set_is_opened(tmp_path, processors, change, options, message):
    broken_files(tmp_path)
    with pytest.raises(DataError, match="row 0: ") as caught:
        open_rows(tmp_path, [QUESTION | change], processors["qwen2_5_vl"], image_dir=str(tmp_path), **options)
    assert message in str(caught.value)


def test_a_video_of_0_seconds_is_named(tmp_path, monkeypatch):
    import cv2

    class Capture:
        """A capture of a header that states no rate."""

        def __init__(self, *_):
            self.values = {cv2.CAP_PROP_FRAME_COUNT: 5.0, cv2.CAP_PROP_FPS: 0.0}

        def isOpened(self):
            return True

        def get(self, key):
            return self.values.get(key, 64.0)

        def release(self):
            pass

    monkeypatch.setattr(cv2, "VideoCapture", Capture)
    with pytest.raises(BrokenVideo, match="lasts 0 seconds: it states 0 frames per second"):
        read_video_header(b"any")


def test_a_video_that_breaks_off_is_left_out_ahead_of_its_step(tmp_path, processors, capsys):
    broken_files(tmp_path)
    rows = [QUESTION | {"videos": [name]} for name in ("whole.avi", "cut.avi", "whole.avi")]
    data = open_rows(tmp_path, rows, processors["qwen3_vl"], image_dir=str(tmp_path), on_bad_row="skip")
    assert data.readable([0, 1], [2]) == [0, 2]
    assert "cut.avi ends behind 10 frames" in capsys.readouterr().out
    stopping = open_rows(tmp_path, rows, processors["qwen3_vl"], image_dir=str(tmp_path))
    with pytest.raises(DataError, match=r"row 1: .*cut.avi ends behind 10 frames, and its header states more than 2"):
        stopping.readable([0, 1])


@pytest.mark.parametrize("suffix", ["ts", "avi", "mpg"])
def test_a_file_that_changes_its_size_is_named_and_not_scaled(tmp_path, suffix):
    """OpenCV would bring the second part to the size of the first without a word."""
    parts = [write_video(tmp_path / f"{size[0]}.{suffix}", 10, size=size) for size in ((64, 48), (96, 80))]
    assert decode_frames(parts[1], [0, 9]).shape == (2, 80, 96, 3)
    path = tmp_path / f"joined.{suffix}"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    words = "changes its size: 64 x 48 pixels at first and 96 x 80 at [0-9.]+ s; encode it in one size"
    for source, name in ((path, f"the video {path}"), (path.read_bytes(), "a video")):
        with pytest.raises(BrokenVideo, match=f"^{re.escape(name)} {words}$"):
            decode_frames(source, [0, 4])


def test_a_header_that_states_a_few_frames_too_many_is_forgiven(tmp_path):
    path = write_video(tmp_path / "a.mp4", 10)
    frames = decode_frames(path, [0, 9, 10, 12])
    assert np.array_equal(frames[1], frames[2]) and np.array_equal(frames[1], frames[3])
    assert not np.array_equal(frames[0], frames[1])
    with pytest.raises(BrokenVideo, match="ends behind 10 frames"):
        decode_frames(path, [0, 13])


def test_text_models_and_rows_without_their_images_take_no_video(tmp_path, processors):
    text = TextProcessor(processors["qwen2_vl"].tokenizer)
    text.tokenizer.chat_template = processors["qwen2_vl"].chat_template
    row = QUESTION | {"videos": [frame_list(4)]}
    with pytest.raises(DataError, match="row 0: the prompt shows a video and the model reads none; set data.text"):
        open_rows(tmp_path, [row], text)
    for processor in (text, processors["qwen2_vl"]):
        (prompt,) = open_rows(tmp_path, [row], processor, text_only=True)
        assert prompt.problem == "What moves?" and not prompt.videos and len(prompt.ids) == len(prompt.raw_ids)


def test_a_chat_template_without_videos_is_named(tmp_path, processors):
    processor = tiny_processor("qwen2_5_vl")
    processor.chat_template = processor.chat_template.replace("'video'", "'film'")
    with pytest.raises(DataError, match="row 0: the chat template writes 0 places for 1 videos; .*override_chat_temp"):
        open_rows(tmp_path, [QUESTION | {"videos": [frame_list(4)]}], processor)


def test_overlong_videos_are_left_out_whole(tmp_path, processors, capsys):
    rows = [QUESTION | {"videos": [frame_list(count)]} for count in (4, 16)]
    data = open_rows(tmp_path, rows, processors["qwen3_vl"], max_prompt_length=90)
    assert len(data) == 1 and len(data[0].videos[0].sampling.indices) == 4
    assert "left out 1 of 2 prompts over 90 tokens" in capsys.readouterr().out


def test_a_text_before_the_prompt_stands_behind_its_video(tmp_path, processors):
    row = {"prompt": "Look <video>What?", "answer": "a", "images": None, "videos": [frame_list(2)]}
    (prompt,) = open_rows(tmp_path, [row], processors["qwen3_vl"], format_prompt="Think first about it.")
    assert prompt.problem == "<video> Think first about it. Look What?"


@pytest.mark.parametrize("count", [8, 32])
def test_prompts_of_many_images_have_the_processors_own_tokens(tmp_path, processors, count):
    images = frame_list(count)
    row = {"prompt": "<image>" * count + "What?", "answer": "a", "images": images, "videos": None}
    (prompt,) = open_rows(tmp_path, [row], processors["qwen2_5_vl"], min_pixels=56 * 56, max_pixels=112 * 112)
    assert prompt.images == images and (prompt.ids == 261).sum() == count * 2 * 3
    assert prompt.positions.max() == prompt.positions[0, -1] == len(prompt.ids) - 1 - count * (6 - 3)


def test_a_dry_run_shows_a_video_and_counts_its_patches_and_frames(tmp_path, processors):
    path = write_video(tmp_path / "a.mp4", 25, size=(120, 90))
    rows = [QUESTION | {"videos": [str(path)]}, QUESTION | {"prompt": "What?", "videos": None}]
    data = open_rows(tmp_path, rows, processors["qwen3_vl"])
    (grid,) = data.entries[0].patch_grids
    shape = read_data_shape(data)
    assert grid == (2, 6, 8) and shape.max_patches == 96 and shape.mean_patches == 48
    assert shape.mean_image_bytes == 4 * 128 * 96 * 3 / 2
    shown = describe_prompt(data, 0, {"overall": 1.0})
    tokens = len(data[0].ids) - len(data[0].raw_ids) + 1
    assert f"{len(data[0].ids)} tokens, {tokens} of them for 0 images and 1 videos" in shown
    assert "Video of 25 frames of 120 x 90 pixels, 10 a second, of which the model sees 4 as 128 x 96" in shown


def test_stored_bytes_make_the_fingerprint(tmp_path, processors):
    one = open_rows(tmp_path, [QUESTION | {"videos": [frame_list(4)]}], processors["qwen2_vl"]).digest_videos(0)
    other = open_rows(tmp_path, [QUESTION | {"videos": [frame_list(4, seed=1)]}], processors["qwen2_vl"])
    path = write_video(tmp_path / "a.mp4", 5)
    by_path = open_rows(tmp_path, [QUESTION | {"videos": [str(path)]}], processors["qwen2_vl"]).digest_videos(0)
    by_bytes = open_rows(tmp_path, [QUESTION | {"videos": [path.read_bytes()]}], processors["qwen2_vl"])
    assert one != other.digest_videos(0) and by_path == by_bytes.digest_videos(0) and len(by_path[0]) == 32


def test_sources_with_videos_are_mixed_and_a_changed_video_changes_their_fingerprint(tmp_path, processors):
    sets = []
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        row = QUESTION | {"videos": [frame_list(4, seed=number)]}
        sets.append(open_rows(tmp_path / str(number), [row], processors["qwen2_vl"]))
    mixed, other = (MixedSet(chosen, [SourceConfig("a"), SourceConfig("b")]) for chosen in (sets[:2], sets[1:]))
    assert mixed.readable([1, 0]) == [1, 0] and len(sets[1].decoded) == 1
    assert mixed[1].videos == sets[1][0].videos and not sets[1].decoded
    assert mixed.read(1, has_videos=False).videos == []
    assert _digest_rows(mixed) != _digest_rows(other)

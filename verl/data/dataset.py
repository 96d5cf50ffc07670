"""Data set: rows to prompts (token ids, M-RoPE positions, images, videos), collation, and shuffled batch order.

Letters: G groups (prompts) of a batch, P prompt tokens.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from torch import Tensor
from tqdm import tqdm

from spatialthinker.storage.images import WIDE_MODES, BrokenImage, check_image, read_file, read_header
from spatialthinker.storage.videos import VideoSource
from verl.data.processor import pixel_limits
from verl.data.prompt_text import (
    IMAGE_TAG,
    VIDEO_TAG,
    read_format_prompt,
    split_parts,
    video_places,
    without_tags,
)
from verl.data.sources import DataError, fit_to_bounds, image_sources, load_rows, resize_encoded
from verl.data.videos import Plan, VideoReader, VideoSettings, digest_video
from verl.model.qwen_vl import Grid, expand_image_tokens, image_grid, mrope_positions
from verl.model.videos import Clip, Video, expand_video_tokens
from verl.protocol import DataProto

__all__ = ["BatchOrder", "DataError", "Prompt", "RLHFDataset", "check_answer", "collate_prompts"]

DECODING_THREADS = 4
"""Threads that look for broken images and decode videos, ahead of the step that needs them."""

READS_NONE = "the model reads none; set data.text_only=true"

RowCheck = Callable[[str, Any, Sequence[tuple[int, int]]], str | None]
"""Problem, ground truth, sizes (width, height) of the images -> a warning or None; raises ValueError."""


@dataclass(frozen=True)
class Prompt:
    """A tokenised row for engine and trainer.

    Attributes:
        raw_ids: [tokens] one token per image and video, for the engine.
        ids: [P] image and video tokens expanded.
        positions: [3, P].
        images: encoded bytes.
        problem, row_id: text.
        ground_truth: as the data set has it, of any type.
        columns: all of the row, but for its images and videos.
        source, reward: names of its source and of its reward; empty without several.
        videos: sampled frames.
    """

    raw_ids: list[int]
    ids: Tensor
    positions: Tensor
    images: list[bytes]
    problem: str
    ground_truth: Any
    row_id: str
    columns: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    reward: str = ""
    videos: list[Video] = field(default_factory=list)


@dataclass(frozen=True)
class _Entry:
    """A checked row without its images and videos.

    Attributes:
        row: index in the data set.
        raw_ids: [tokens] as in Prompt.
        grids: of its images.
        plans: of its videos.
        length: P.
    """

    row: int
    raw_ids: np.ndarray
    grids: list[Grid]
    plans: list[Plan]
    length: int

    @property
    def clips(self) -> list[Clip]:
        """Parts of the prompt that are its videos."""
        return [plan.clip for plan in self.plans]

    @property
    def patch_grids(self) -> list[Grid]:
        """Grids of all images, then of all videos."""
        return [*self.grids, *(clip.grid for clip in self.clips)]


class RLHFDataset(torch.utils.data.Dataset):
    """Prompts of a data set; rows are checked at construction, images and videos are read at access.

    Args:
        locator: `path[@split]`, see `verl.data.sources.load_rows`.
        processor: of the model: tokenizer, chat template and image processor.
        prompt_key, answer_key, image_key: columns; `image_key` may be missing, and empty in some rows.
        image_dir: folder of images and videos that are given by relative paths.
        text_only: leave out the images and videos of all rows.
        mixed_data: leave out those of rows 0, 2, 4, ...
        max_prompt_length: maximum P; prompts are never truncated.
        format_prompt: path of a Jinja file (variable `content`), or a text to put before the prompt and behind its
            image; image tags in the text replace those of the prompt.
        min_pixels, max_pixels: bounds of the image processor, None for its defaults.
        resize_first: scale images to these bounds before the image processor sees them.
        filter_overlong_prompts: drop longer prompts; False raises an error at the first.
        max_images: maximum per prompt, 0 for no limit.
        row_check: returns a warning about a row or None; raises ValueError if the reward cannot score it.
        on_bad_row: "skip" leaves out rows that cannot be trained on and prints why.
        source: name of the rows among those of other sources.
        reward: name of their reward; None: each row's own, in its column `reward`.
        videos: settings of videos; None refuses them.

    Raises:
        DataError: a missing column, an empty set, or the first bad row with its id.
    """

    def __init__(
        self,
        locator: str,
        processor: Any,
        prompt_key: str = "problem",
        answer_key: str = "answer_option_text",
        image_key: str = "images",
        image_dir: str | None = None,
        text_only: bool = False,
        mixed_data: bool = False,
        max_prompt_length: int = 6144,
        format_prompt: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        resize_first: bool = False,
        filter_overlong_prompts: bool = True,
        max_images: int = 0,
        row_check: RowCheck | None = None,
        on_bad_row: str = "stop",
        source: str = "",
        reward: str | None = "",
        videos: VideoSettings | None = None,
    ):
        self.source, self.reward = source, reward
        self.processor = processor
        self.prompt_key, self.answer_key, self.image_key = prompt_key, answer_key, image_key
        self.image_dir, self.text_only, self.mixed_data, self.max_images = image_dir, text_only, mixed_data, max_images
        self.bounds = (min_pixels, max_pixels) if resize_first else None
        self.pixel_limits = pixel_limits(processor, *((None, None) if resize_first else (min_pixels, max_pixels)))
        self.format = read_format_prompt(format_prompt)
        self.row_check, self.on_bad_row = row_check, on_bad_row
        self.video_reader = None if videos is None else VideoReader(videos, processor, image_dir)
        self.rows = load_rows(locator)
        needed = {prompt_key: "data.prompt_key", answer_key: "data.answer_key"}
        needed |= {"reward": "reward: column"} if reward is None else {}
        for key, knob in needed.items():
            if key not in self.rows.column_names:
                columns = ", ".join(self.rows.column_names)
                raise DataError(f"{locator} has no column {key!r} ({knob}); its columns: {columns}")
        self.entries: list[_Entry] = []
        self.warnings: list[str] = []
        self.faults: dict[int, str] = {}  # by prompt, of its decoded images and videos
        self.decoded: dict[int, list[Video]] = {}  # by prompt, ahead of the step that takes them
        self.left_out: set[int] = set()
        num_bad = 0
        for index in tqdm(range(len(self.rows)), desc=f"Prompts of {locator}", disable=len(self.rows) < 1000):
            try:
                entry = self._check(index)
            except DataError as error:
                self.handle_bad_row(error)
                num_bad += 1
                continue
            if entry.length <= max_prompt_length:
                self.entries.append(entry)
            elif not filter_overlong_prompts:
                of_videos = "".join(f" with a video of {len(plan.sampling.indices)} frames" for plan in entry.plans)
                fewer = ", data.video_fps or data.max_frames" if entry.plans else ""
                raise DataError(
                    f"row {self._row_id(self.rows[index], index)}: a prompt of {entry.length} tokens{of_videos} is "
                    f"longer than data.max_prompt_length={max_prompt_length}; raise it, lower data.max_pixels{fewer}, "
                    "or set data.filter_overlong_prompts=true (a prompt is never cut)"
                )
        num_overlong = len(self.rows) - len(self.entries) - num_bad
        if num_overlong:
            print(f"{locator}: left out {num_overlong} of {len(self.rows)} prompts over {max_prompt_length} tokens")  # noqa: T201
        if self.warnings:
            share = f"{len(self.warnings)} of {len(self.rows)}"
            print(f"Warning: {locator}: {share} rows look wrong. First {self.warnings[0]}")  # noqa: T201
        if not self.entries:
            raise DataError(f"{locator}: no prompt is left of {len(self.rows)} rows; see data.max_prompt_length")

    def handle_bad_row(self, fault: DataError) -> None:
        """Prints the fault of a row that is left out, or raises it with data.on_bad_row=stop."""
        if self.on_bad_row == "stop":
            raise DataError(f"{fault}; mend it, or leave out such rows with data.on_bad_row=skip") from fault
        print(f"Warning: {fault}; left out (data.on_bad_row=skip)", flush=True)  # noqa: T201

    def readable(self, indices: Sequence[int], spares: Iterable[int] = ()) -> list[int]:
        """The prompts whose images and videos can be decoded, in order; a bad one makes room for the next spare.

        Which prompts are taken depends on the data alone, so that a resumed run takes the same.

        Raises:
            DataError: a bad row with data.on_bad_row=stop, or no good one.
        """
        unused: Iterator[int] = iter(spares)
        with ThreadPoolExecutor(DECODING_THREADS) as pool:
            list(pool.map(self._find_fault, indices))
        chosen = []
        for index in indices:
            candidate: int | None = index
            while candidate is not None and (fault := self._find_fault(candidate)):
                if candidate not in self.left_out:
                    self.handle_bad_row(DataError(fault))
                    self.left_out.add(candidate)
                candidate = next(unused, None)
            chosen += [] if candidate is None else [candidate]
        if not chosen or spares and len(chosen) < len(indices):
            raise DataError(f"only {len(chosen)} of {len(indices)} prompts of a batch can be read; see the rows above")
        return chosen

    def _find_fault(self, index: int) -> str:
        """The first fault of a prompt's images and videos, decoded to their end; empty if there is none.

        Decoded videos are kept for the next `read`.
        """
        entry = self.entries[index]
        is_missing = bool(entry.plans) and index not in self.decoded and not self.faults.get(index)
        if index not in self.faults or is_missing:
            fault = ""
            row = self.rows[entry.row]
            try:
                problem, images, videos = self._read(row, entry.row)
                for source in images:
                    check_image(source)
                if videos:
                    self.decoded[index] = self._decode(entry, problem, videos)
            except ValueError as error:
                fault = f"row {self._row_id(row, entry.row)}: {_reason(error)}"
            self.faults[index] = fault
        return self.faults[index]

    def _decode(self, entry: _Entry, problem: str, sources: Sequence[VideoSource]) -> list[Video]:
        assert self.video_reader is not None, "rows with videos are refused without it"
        parts = zip(sources, entry.plans, video_places(problem), strict=True)
        return [self.video_reader.decode(source, plan, place) for source, plan, place in parts]

    def digest_videos(self, index: int) -> list[bytes]:
        """SHA-256 of each video of a prompt as it is stored."""
        entry = self.entries[index]
        return [digest_video(source) for source in self._read(self.rows[entry.row], entry.row)[2]]

    def _warn_of_wide(self, row: dict[str, Any], index: int, modes: Sequence[str]) -> None:
        for mode in set(modes) & set(WIDE_MODES):
            fault = f"values of mode {mode} beyond 0 to 255 are cut, as vLLM does; store its image with 8 bits"
            self.warnings.append(f"row {self._row_id(row, index)}: {fault}")

    def _row_id(self, row: dict[str, Any], index: int) -> str:
        number = f"{self.source} {index}".lstrip()
        return f"{number} (image_id {row['image_id']})" if "image_id" in row else number

    def _has_images(self, index: int) -> bool:
        return not self.text_only and not (self.mixed_data and index % 2 == 0)

    def _check(self, index: int) -> _Entry:
        """The entry of a row.

        Raises:
            DataError: the row cannot be trained on; the message names it.
        """
        row: dict[str, Any] = {}
        try:
            row = self.rows[index]
            problem, sources, videos = self._read(row, index)
            _check_there(row[self.answer_key], f"column {self.answer_key!r}")
            headers = [read_header(source) for source in sources]
            sizes = [size for size, _ in headers]
            self._warn_of_wide(row, index, [mode for _, mode in headers])
            if self.row_check is not None:
                warning = self.row_check(self.format(row[self.prompt_key]), row[self.answer_key], sizes)
                self.warnings += [f"row {self._row_id(row, index)}: {warning}"] if warning else []
            self._check_media(problem, len(sources), len(videos))
            plans = [self.video_reader.plan(video) for video in videos] if self.video_reader is not None else []
            raw_ids = self._tokenize(problem)
            image_processor = self.processor.image_processor
            grids = [image_grid(self._fit(size), image_processor, **self.pixel_limits) for size in sizes]
            length = len(self._expand(raw_ids, grids, [plan.clip for plan in plans]))
        except TemplateError as error:
            knobs = "data.override_chat_template or the model's chat template, data.format_prompt"
            raise DataError(f"row {self._row_id(row, index)}: a template fails: {error}; see {knobs}") from error
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise DataError(f"row {self._row_id(row, index)}: {_reason(error)}") from error
        return _Entry(index, np.array(raw_ids, dtype=np.int32), grids, plans, length)

    def _check_media(self, problem: str, num_images: int, num_videos: int) -> None:
        """Passes for a prompt with one mark per image and video, which the model reads; ValueError otherwise."""
        found = {"image": (IMAGE_TAG, num_images), "video": (VIDEO_TAG, num_videos)}
        for noun, (tag, number) in found.items():
            places = problem.count(tag)
            if self.processor.image_processor is None and (number or places):
                raise ValueError(f"the prompt shows a{'n' * (noun == 'image')} {noun} and {READS_NONE}")
            if places != number:
                raise ValueError(
                    f"the prompt has {places} {noun} places but the row has {number} {noun}s; "
                    f"write one {tag} per {noun} into it (data.prompt_key, data.format_prompt, data.{noun}_key)"
                )
        if self.max_images and num_images > self.max_images:
            raise ValueError(f"{num_images} images are more than worker.rollout.limit_images={self.max_images}")

    def _read(self, row: dict[str, Any], index: int) -> tuple[str, list[Any], list[VideoSource]]:
        """The prompt text of a row and the sources of its images and videos."""
        content = row[self.prompt_key]
        if not isinstance(content, str):
            raise ValueError(f"column {self.prompt_key!r} must hold text, got {content!r}")
        has_images = self._has_images(index)
        problem = self.format(content if has_images else without_tags(content))
        if not has_images:
            return without_tags(problem), [], []
        if VIDEO_TAG in problem and self.video_reader is None:
            raise ValueError(f"the prompt has a place for a video ({VIDEO_TAG}); only images are trained on here")
        videos = [] if self.video_reader is None else self.video_reader.find(row)
        return problem, image_sources(row.get(self.image_key), self.image_dir), videos

    def _fit(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height of an image as the image processor gets it."""
        return size if self.bounds is None else fit_to_bounds(size, *self.bounds)

    def _expand(self, raw_ids: Sequence[int], grids: Sequence[Grid], clips: Sequence[Clip]) -> list[int]:
        ids = expand_image_tokens(raw_ids, grids, self.processor.image_token_id, self._merge_size)
        return ids if self.video_reader is None else expand_video_tokens(ids, clips, self.processor)

    @property
    def _merge_size(self) -> int:
        return getattr(self.processor.image_processor, "merge_size", 1)

    def _tokenize(self, problem: str) -> list[int]:
        """The chat prompt's token ids with one token per `<image>` and `<video>`."""
        messages = [{"role": "user", "content": split_parts(problem)}]
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Prompt:
        return self.read(index)

    def read(self, index: int, is_resized: bool = True, has_videos: bool = True) -> Prompt:
        """A prompt; with `is_resized=False` images are as they are stored, videos left out, and nothing is decoded.

        With `has_videos=False` only videos are left out and not decoded.
        """
        entry = self.entries[index]
        row = self.rows[entry.row]
        try:
            problem, sources, video_sources = self._read(row, entry.row)
            images = [read_file(source) for source in sources]
            if self.bounds is not None and is_resized:
                images = [resize_encoded(image, self._fit(read_header(image)[0])) for image in images]
            videos: list[Video] = []
            if video_sources and has_videos and is_resized:
                ahead = self.decoded.pop(index, None)
                videos = self._decode(entry, problem, video_sources) if ahead is None else ahead
        except ValueError as error:
            raise DataError(f"row {self._row_id(row, entry.row)}: {error}") from error
        raw_ids = entry.raw_ids.tolist()
        ids = self._expand(raw_ids, entry.grids, entry.clips)
        tokens = self.processor.image_token_id, self._merge_size, self.processor.video_token_id
        positions = mrope_positions(ids, entry.grids, *tokens, entry.clips)
        row_id = self._row_id(row, entry.row)
        media = (self.image_key, "" if self.video_reader is None else self.video_reader.settings.video_key)
        columns = {name: value for name, value in row.items() if name not in media}
        own = (columns, self.source, row["reward"] if self.reward is None else self.reward, videos)
        return Prompt(raw_ids, torch.tensor(ids), positions, images, problem, row[self.answer_key], row_id, *own)


def _reason(error: Exception) -> str:
    return f"an image cannot be decoded: {error}" if isinstance(error, BrokenImage) else str(error)


def check_answer(problem: str, ground_truth: Any, sizes: Sequence[tuple[int, int]]) -> None:
    """Passes for a ground truth that is read as text; ValueError otherwise."""
    if not isinstance(ground_truth, str | int | float):
        raise ValueError(
            f"the ground truth is {ground_truth!r}, where text or a number is read; give another data.answer_key, "
            "or a worker.reward.reward_function that reads it"
        )


def _check_there(answer: Any, column: str) -> None:
    """Passes for an answer of any type; ValueError for none, and for numbers in it that are not finite."""
    if answer is None:
        raise ValueError(f"{column} must hold an answer, got None")
    try:
        json.dumps(answer, allow_nan=False, default=str)
    except ValueError as error:
        raise ValueError(f"{column} must hold numbers that are finite, got {answer!r}") from error


def _objects(values: Sequence[Any]) -> np.ndarray:
    """A one-dimensional object array, even of lists of equal length."""
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def collate_prompts(prompts: Sequence[Prompt], pad_token_id: int) -> DataProto:
    """A batch of G prompts: `prompt_ids`, `prompt_mask` [G, P] and `prompt_position_ids` [G, 3, P], left-padded."""
    width = max(len(prompt.ids) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad_token_id)
    mask = torch.zeros((len(prompts), width), dtype=torch.bool)
    positions = torch.zeros((len(prompts), 3, width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt.ids) :] = prompt.ids
        mask[row, width - len(prompt.ids) :] = True
        positions[row, :, width - len(prompt.ids) :] = prompt.positions
    return DataProto.from_dict(
        tensors={"prompt_ids": ids, "prompt_mask": mask, "prompt_position_ids": positions},
        non_tensors={
            "raw_prompt_ids": _objects([prompt.raw_ids for prompt in prompts]),
            "images": _objects([prompt.images for prompt in prompts]),
            "videos": _objects([prompt.videos for prompt in prompts]),
            "problem": _objects([prompt.problem for prompt in prompts]),
            "ground_truth": _objects([prompt.ground_truth for prompt in prompts]),
            "uid": _objects([prompt.row_id for prompt in prompts]),
            "columns": _objects([prompt.columns for prompt in prompts]),
            "source": _objects([prompt.source for prompt in prompts]),
            "reward": _objects([prompt.reward for prompt in prompts]),
        },
    )


class BatchOrder:
    """Sampler of batches: rows are a function of seed and step alone, so that resuming is exact.

    Every epoch is a new permutation; an incomplete last batch is dropped.

    Args:
        num_rows: of the data set.
        batch_size: prompts per step.
        shuffle: False uses the data set's order.
        seed: of the permutations.
    """

    def __init__(self, num_rows: int, batch_size: int, shuffle: bool, seed: int):
        if num_rows < batch_size:
            raise DataError(
                f"{num_rows} prompts do not fill one batch of data.rollout_batch_size={batch_size}; lower it"
            )
        self.num_rows, self.batch_size, self.shuffle, self.seed = num_rows, batch_size, shuffle, seed
        self.batches_per_epoch = num_rows // batch_size

    def parts(self, batch: int) -> list[tuple[list[int], list[int]]]:
        """The rows of a batch and those that replace bad ones, as one part."""
        return [(self.rows(batch), self.spares(batch))]

    def mix(self, batch: int, parts: Sequence[Sequence[int]]) -> list[int]:
        """The rows of the only part."""
        return list(parts[0])

    def rows(self, batch: int) -> list[int]:
        """Row indices of batch number `batch`, from 0 over all epochs."""
        return self._from(batch)[: self.batch_size]

    def spares(self, batch: int) -> list[int]:
        """The epoch's other rows, from the end of the batch on round to its start: they replace bad rows."""
        return self._from(batch)[self.batch_size :]

    def _from(self, batch: int) -> list[int]:
        """The rows of the batch's epoch, those of the batch first."""
        epoch, index = divmod(batch, self.batches_per_epoch)
        order = np.arange(self.num_rows)
        if self.shuffle:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.num_rows)
        return np.roll(order, -index * self.batch_size).tolist()

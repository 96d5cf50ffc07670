"""Rows to prompts: token ids, rotary positions and encoded images, one copy per prompt; and the order of batches.

Letters: G groups (prompts) of a batch, P prompt tokens.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Image, load_dataset, load_from_disk
from jinja2 import Template
from PIL import UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from verl.processor import pixel_limits
from verl.protocol import DataProto
from verl.qwen_vl import Grid, expand_image_tokens, image_grid, mrope_positions, upright_size

IMAGE_PLACE = "<image>"
FILE_BUILDERS = {"jsonl": "json", "json": "json", "parquet": "parquet", "csv": "csv", "arrow": "arrow"}

RowCheck = Callable[[str, str], None]


class DataError(ValueError):
    """A data set or a row that cannot be trained on; the message names it and what to change."""


@dataclass(frozen=True)
class Prompt:
    """One row, ready for both the engine and the trainer.

    Attributes:
        raw_ids: [tokens] one image token per image, for the engine.
        ids: [P] image tokens expanded.
        positions: [3, P].
        images: encoded bytes.
        problem, ground_truth, row_id: text.
    """

    raw_ids: list[int]
    ids: Tensor
    positions: Tensor
    images: list[bytes]
    problem: str
    ground_truth: str
    row_id: str


def load_rows(locator: str) -> Dataset:
    """The rows of `path[@split]`: a file, a folder of <split>-*.parquet files, a saved data set, or a hub name.

    Raises:
        DataError: naming the locator and what was looked for.
    """
    path, _, split = locator.rpartition("@") if "@" in locator else (locator, "", "train")
    folder = Path(path)
    try:
        if folder.is_file():
            builder = FILE_BUILDERS.get(folder.suffix.lstrip("."))
            if builder is None:
                raise DataError(f"{path}: a data file ends in one of {', '.join(FILE_BUILDERS)}")
            return load_dataset(builder, data_files=str(folder), split="train")
        if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
            loaded = load_from_disk(path)
            return loaded if isinstance(loaded, Dataset) else loaded[split]
        if folder.is_dir():
            files = sorted(str(file) for file in folder.glob(f"{split}-*.parquet"))
            if not files:
                raise DataError(f"{path} holds no {split}-*.parquet; give path@split with a split that is there")
            return load_dataset("parquet", data_files=files, split="train")
        return load_dataset(path, split=split)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"data set {locator!r} cannot be loaded: {error}") from error


def _row_images(value: Any) -> list[bytes]:
    """The encoded images of a cell: one image, a list of them, or none."""
    entries = value if isinstance(value, list) else [] if value is None else [value]
    images = []
    for entry in entries:
        if isinstance(entry, dict):
            data = entry.get("bytes")
            data = Path(entry["path"]).read_bytes() if data is None and entry.get("path") else data
        else:
            data = entry
        if not isinstance(data, bytes):
            raise ValueError(f"an image must be encoded bytes or a path, got {type(entry).__name__}")
        images.append(data)
    return images


class RLHFDataset(torch.utils.data.Dataset):
    """The prompts of a data set, each checked when the set is opened.

    Args:
        locator: `path[@split]`, see load_rows.
        processor: of the model: tokenizer, chat template and image processor.
        prompt_key, answer_key, image_key: columns; `image_key` may be missing in a text-only set.
        max_prompt_length: P of the longest prompt that is kept; prompts are never cut.
        format_prompt: path of a Jinja file (variable `content`) or a text to put before the prompt.
        min_pixels, max_pixels: bounds of the image processor, None for its own.
        filter_overlong_prompts: drop longer prompts; False makes the first one an error.
        row_check: raises ValueError when the reward could not score a row (problem, ground truth).

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
        max_prompt_length: int = 6144,
        format_prompt: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        filter_overlong_prompts: bool = True,
        row_check: RowCheck | None = None,
    ):
        self.processor = processor
        self.prompt_key, self.answer_key, self.image_key = prompt_key, answer_key, image_key
        self.pixel_limits = pixel_limits(processor, min_pixels, max_pixels)
        self.template = self._read_template(format_prompt)
        self.row_check = row_check
        rows = load_rows(locator)
        for key, knob in ((prompt_key, "data.prompt_key"), (answer_key, "data.answer_key")):
            if key not in rows.column_names:
                raise DataError(
                    f"{locator} has no column {key!r} ({knob}); its columns: {', '.join(rows.column_names)}"
                )
        if image_key in rows.column_names and isinstance(rows.features[image_key], Image):
            rows = rows.cast(Features(rows.features | {image_key: Image(decode=False)}))
        self.prompts: list[Prompt] = []
        num_overlong = 0
        for index in tqdm(range(len(rows)), desc=f"Prompts of {locator}", disable=len(rows) < 1000):
            prompt = self._prepare(rows[index], index)
            if len(prompt.ids) > max_prompt_length:
                if not filter_overlong_prompts:
                    raise DataError(
                        f"row {prompt.row_id}: a prompt of {len(prompt.ids)} tokens is longer than "
                        f"data.max_prompt_length={max_prompt_length}; raise it, lower data.max_pixels, or set "
                        "data.filter_overlong_prompts=true (a prompt is never cut)"
                    )
                num_overlong += 1
                continue
            self.prompts.append(prompt)
        if num_overlong:
            print(f"{locator}: left out {num_overlong} of {len(rows)} prompts over {max_prompt_length} tokens")  # noqa: T201
        if not self.prompts:
            raise DataError(f"{locator}: no prompt is left of {len(rows)} rows; see data.max_prompt_length")

    @staticmethod
    def _read_template(format_prompt: str | None) -> Callable[[str], str]:
        if format_prompt is None:
            return lambda content: content
        if Path(format_prompt).is_file():
            template = Template(Path(format_prompt).read_text().strip())
            return lambda content: template.render(content=content)
        return lambda content: f"{format_prompt.strip()} {content}"

    def _prepare(self, row: dict[str, Any], index: int) -> Prompt:
        row_id = f"{index} (image_id {row['image_id']})" if "image_id" in row else str(index)
        try:
            images = _row_images(row.get(self.image_key))
            sizes = [upright_size(data) for data in images]
            problem = self.template(row[self.prompt_key])
            ground_truth = row[self.answer_key]
            if not isinstance(ground_truth, str):
                raise ValueError(f"column {self.answer_key!r} must hold text, got {ground_truth!r}")
            if self.row_check is not None:
                self.row_check(problem, ground_truth)
            raw_ids = self._tokenize(problem)
            image_processor = self.processor.image_processor
            if image_processor is None and images:
                raise ValueError(f"the row has {len(images)} images and the model reads none; set data.text_only=true")
            image_token, merge = self.processor.image_token_id, getattr(image_processor, "merge_size", 1)
            grids: list[Grid] = [image_grid(size, image_processor, **self.pixel_limits) for size in sizes]
            ids = expand_image_tokens(raw_ids, grids, image_token, merge)
            positions = mrope_positions(ids, grids, image_token, merge)
        except (ValueError, TypeError, KeyError, OSError, UnidentifiedImageError) as error:
            raise DataError(f"row {row_id}: {error}") from error
        return Prompt(raw_ids, torch.tensor(ids), positions, images, problem, ground_truth, row_id)

    def _tokenize(self, problem: str) -> list[int]:
        """The chat prompt's token ids with one image token per `<image>`."""
        content = []
        for part in re.split(f"({IMAGE_PLACE})", problem):
            if part == IMAGE_PLACE:
                content.append({"type": "image"})
            elif part:
                content.append({"type": "text", "text": part})
        messages = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]


def _objects(values: Sequence[Any]) -> np.ndarray:
    """A one-dimensional object array, also of equally long lists."""
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
            "problem": _objects([prompt.problem for prompt in prompts]),
            "ground_truth": _objects([prompt.ground_truth for prompt in prompts]),
            "uid": _objects([prompt.row_id for prompt in prompts]),
        },
    )


class BatchOrder:
    """Which rows make the batch of a step: a function of seed and step alone, so that a resumed run goes on exactly.

    Every epoch is a new permutation; a last part smaller than a batch is left out.

    Args:
        num_rows: of the data set.
        batch_size: prompts per step.
        shuffle: False keeps the data set's order.
        seed: of the permutations.
    """

    def __init__(self, num_rows: int, batch_size: int, shuffle: bool, seed: int):
        if num_rows < batch_size:
            raise DataError(
                f"{num_rows} prompts do not fill one batch of data.rollout_batch_size={batch_size}; lower it"
            )
        self.num_rows, self.batch_size, self.shuffle, self.seed = num_rows, batch_size, shuffle, seed
        self.batches_per_epoch = num_rows // batch_size

    def rows(self, batch: int) -> list[int]:
        """The rows of batch number `batch`, counted from 0 over all epochs."""
        epoch, place = divmod(batch, self.batches_per_epoch)
        order = np.arange(self.num_rows)
        if self.shuffle:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.num_rows)
        return order[place * self.batch_size : (place + 1) * self.batch_size].tolist()

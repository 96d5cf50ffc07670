"""The toy model's training rows: drawn, answered by two teachers, tokenised beforehand by worker processes."""

import multiprocessing
import os
import random
import re
import shutil
import tempfile
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from spatialthinker.prompts import IMAGE_MARK, render_prompt
from spatialthinker.schema import CATEGORIES, VqaRow
from spatialthinker.shapes import COLOURS, DEFAULT_CANVAS, KINDS, Shape, draw
from spatialthinker.synthetic import generate, gold_response
from toy import model as toy_model

CELLS = 16
MAX_TOKENS = 208
IGNORE = -100
CHUNK = 1000
ARRAYS = ("pixels", "gold", "careless", "cells")
SHORT_PROMPT_PERIOD = 4
"""One row in so many carries the evaluation prompt, the others the training prompt."""

# The careless teacher: how often the first option is ticked unread, in every second category and in the others.
HASTY_SHARE, CALM_SHARE = 0.75, 0.4
SKIPPED_THINK_SHARE = 0.08
BOX_JITTER_PX = 4

_worker: dict[str, Any] = {}  # set before the pool forks


def chat_text(processor: Any, problem: str) -> str:
    """The chat text of `problem` with one image, up to the start of the reply."""
    content = [{"type": "image"}, {"type": "text", "text": problem.removeprefix(IMAGE_MARK)}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def careless_reply(row: VqaRow, rng: random.Random) -> str:
    """A reply in the right spirit with a hasty teacher's faults; its reasoning, when present, is still right."""
    text = gold_response(row)
    if rng.random() < (HASTY_SHARE if CATEGORIES.index(row.category) % 2 else CALM_SHARE):
        text = re.sub(r"\([A-D]\) [^\n]*(?=\n</answer>)", f"(A) {row.options[0]}", text)
    if rng.random() < SKIPPED_THINK_SHARE:
        text = re.sub(r"<think>.*</think>\n", "", text, flags=re.DOTALL)

    def shake(match: re.Match) -> str:
        edges = (int(edge) + rng.randint(-BOX_JITTER_PX, BOX_JITTER_PX) for edge in match[1].split(", "))
        return f"[{', '.join(str(min(max(edge, 0), toy_model.IMAGE_PX)) for edge in edges)}]"

    return re.sub(r"\[(\d+, \d+, \d+, \d+)\]", shake, text)


def _cell_targets(shapes: tuple[Shape, ...]) -> np.ndarray:
    """Colour, kind, x1, y1, x2, y2 of the shape centred in each cell; colour is 'none' and the rest -100 elsewhere."""
    targets = np.full((CELLS, 6), IGNORE, dtype=np.int16)
    targets[:, 0] = len(COLOURS)
    for shape in shapes:
        x, y = (int(value // DEFAULT_CANVAS.cell) for value in shape.centre)
        targets[4 * y + x] = (list(COLOURS).index(shape.colour), KINDS.index(shape.kind), *shape.box)
    return targets


def _fill_chunk(job: tuple[str, int, int, int]) -> None:
    """Draw and tokenise rows `start` to `start + number` into the shared arrays of a folder."""
    folder, seed, start, number = job
    processor = _worker["processor"]
    pixels, gold, careless, cells = (np.load(f"{folder}/{name}.npy", mmap_mode="r+") for name in ARRAYS)
    image = processor.image_token
    rng = random.Random(f"careless {seed} {start}")
    for i, (puzzle, row) in enumerate(generate(number, seed, start=start), start):
        problem = row.problem
        if i // len(CATEGORIES) % SHORT_PROMPT_PERIOD == 0:
            problem = render_prompt("spatial_thinker", row.question_with_options, *2 * (toy_model.IMAGE_PX,))
        prompt = chat_text(processor, problem).replace(image, image * CELLS)
        replies = [f"{text}<|im_end|>" for text in (gold_response(row), careless_reply(row, rng))]
        prompt_ids, *reply_ids = processor.tokenizer([prompt, *replies]).input_ids
        for tokens, ids in zip((gold, careless), reply_ids, strict=True):
            whole = [*(-1 - token for token in prompt_ids), *ids]  # negative: prompt, no loss
            assert len(whole) <= MAX_TOKENS, f"{row.image_id} is longer than {MAX_TOKENS} tokens"
            tokens[i, : len(whole)] = whole
        pixels[i] = np.asarray(draw(DEFAULT_CANVAS, puzzle.shapes))
        cells[i] = _cell_targets(puzzle.shapes)


class Rows:
    """All training rows as tensors on one device."""

    def __init__(self, number: int, seed: int, processor: Any, workers: int) -> None:
        side = toy_model.IMAGE_PX
        shapes = ((number, side, side, 3), (number, MAX_TOKENS), (number, MAX_TOKENS), (number, CELLS, 6))
        needed = number * (3 * side * side + 4 * MAX_TOKENS + 12 * CELLS)
        is_roomy = os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free > 1.2 * needed
        with tempfile.TemporaryDirectory(dir="/dev/shm" if is_roomy else None) as folder:
            for name, shape in zip(ARRAYS, shapes, strict=True):
                dtype = np.uint8 if name == "pixels" else np.int16
                np.lib.format.open_memmap(f"{folder}/{name}.npy", "w+", dtype, shape)
            jobs = [(folder, seed, start, min(CHUNK, number - start)) for start in range(0, number, CHUNK)]
            _worker["processor"] = processor
            with multiprocessing.get_context("fork").Pool(min(workers, len(jobs))) as pool:
                for _ in tqdm(pool.imap_unordered(_fill_chunk, jobs), total=len(jobs), desc="thousand rows"):
                    pass
            pixels, gold, careless, cells = (torch.from_numpy(np.load(f"{folder}/{name}.npy")) for name in ARRAYS)
        used = int((gold != 0).any(0).sum())  # right padding is <|endoftext|>, id 0
        self.pixels, self.cells, self.tokens = pixels, cells, {"gold": gold[:, :used], "careless": careless[:, :used]}

    def to(self, device: torch.device) -> "Rows":
        self.pixels, self.cells = self.pixels.to(device), self.cells.to(device)
        self.tokens = {teacher: tokens.to(device) for teacher, tokens in self.tokens.items()}
        return self

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, index: Tensor, teacher: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pixels [B, H, W, 3], ids [B, L], labels [B, L] and cell targets [B, 16, 6] of some rows."""
        tokens = self.tokens[teacher][index].long()
        ids = torch.where(tokens < 0, -1 - tokens, tokens)
        return self.pixels[index], ids, tokens.masked_fill(tokens <= 0, IGNORE), self.cells[index].long()

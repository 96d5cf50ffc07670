"""Build the toy Qwen2.5-VL from nothing: tokenizer, processor, and weights trained on the gold replies.

    python scripts/build_toy_model.py --out configs/toy_model                  # minutes on one GPU
    python scripts/build_toy_model.py --out /tmp/toy --steps 5 --rows 512      # smoke test on a CPU

Supervised learning alone lets such a model write perfect replies about pictures it never looks at. Two things make it
look: a side task for the vision tower (what lies in each cell, and where its box is) while it starts, and more weight
on the tokens that depend on the image. The gap between the loss with the right images and with shuffled ones shows it.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import toy_model
from torch import Tensor, nn
from tqdm import tqdm

from spatialthinker.prompts import render_prompt
from spatialthinker.schema import VqaRow
from spatialthinker.shapes import COLOURS, DEFAULT_CANVAS, KINDS, Shape, draw
from spatialthinker.synthetic import generate, gold_response

# B images of a batch, L tokens of prompt and response, 64 patches and 16 cells (= image tokens) of an image.
CELLS = 16
MAX_TOKENS = 208
IGNORE = -100
CHUNK = 1000
SHORT_PROMPT_SHARE = 4
"""One row in so many carries the evaluation prompt, the others the training prompt."""


def chat_text(processor, problem: str) -> str:
    """The conversation that asks `problem` about one image, up to where the reply starts."""
    content = [{"type": "image"}, {"type": "text", "text": problem.removeprefix("<image>")}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


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
    processor = _fill_chunk.processor  # type: ignore[attr-defined]
    pixels, tokens, cells = (np.load(f"{folder}/{name}.npy", mmap_mode="r+") for name in ("pixels", "tokens", "cells"))
    image = processor.image_token
    for i, (puzzle, row) in enumerate(generate(number, seed, start=start), start):
        problem = row.problem
        if i // 9 % SHORT_PROMPT_SHARE == 0:
            problem = render_prompt("spatial_thinker", row.question_with_options, *2 * (toy_model.IMAGE_PX,))
        prompt = chat_text(processor, problem).replace(image, image * CELLS)
        prompt_ids, reply_ids = processor.tokenizer([prompt, gold_response(row) + "<|im_end|>"]).input_ids
        assert len(prompt_ids) + len(reply_ids) <= MAX_TOKENS, f"{row.image_id} is longer than {MAX_TOKENS} tokens"
        pixels[i] = np.asarray(draw(DEFAULT_CANVAS, puzzle.shapes))
        tokens[i, : len(prompt_ids)] = -1 - np.array(prompt_ids)  # negative = prompt, no loss
        tokens[i, len(prompt_ids) : len(prompt_ids) + len(reply_ids)] = reply_ids
        cells[i] = _cell_targets(puzzle.shapes)


def _start_worker(folder: str) -> None:
    from transformers import AutoProcessor

    torch.set_num_threads(1)
    _fill_chunk.processor = AutoProcessor.from_pretrained(folder)  # type: ignore[attr-defined]


class Rows:
    """All training rows as tensors: pixels uint8 [N, H, W, 3], ids and labels [N, L], cells [N, 16, 6]."""

    def __init__(self, number: int, seed: int, model_folder: Path, device: torch.device, workers: int) -> None:
        pad = len(range(0, number, CHUNK)) * CHUNK
        with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
            side = toy_model.IMAGE_PX
            shapes = {"pixels": (pad, side, side, 3), "tokens": (pad, MAX_TOKENS), "cells": (pad, CELLS, 6)}
            for name, shape in shapes.items():
                dtype = np.uint8 if name == "pixels" else np.int16
                array = np.lib.format.open_memmap(f"{folder}/{name}.npy", "w+", dtype, shape)
                if name == "tokens":
                    array[:] = -1  # <|endoftext|>, id 0, as part of no reply
            jobs = [(folder, seed, start, min(CHUNK, number - start)) for start in range(0, number, CHUNK)]
            context = multiprocessing.get_context("spawn")
            with context.Pool(min(workers, len(jobs)), _start_worker, (str(model_folder),)) as pool:
                for _ in tqdm(pool.imap_unordered(_fill_chunk, jobs), total=len(jobs), desc="thousand rows"):
                    pass
            pixels, tokens, cells = (torch.from_numpy(np.load(f"{folder}/{name}.npy")[:number]) for name in shapes)
        tokens = tokens.to(device).long()
        used = int((tokens != -1).any(0).sum())
        tokens = tokens[:, :used]
        self.pixels, self.cells = pixels.to(device), cells.to(device).long()
        self.ids = torch.where(tokens < 0, -1 - tokens, tokens)
        self.labels = torch.where(tokens < 0, IGNORE, tokens)


def patchify(pixels: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """The image processor's patches of uint8 images [B, H, W, 3]: [B, 64, 1176], in blocks of 2 x 2 patches."""
    images = pixels.permute(0, 3, 1, 2).float() / 255  # [B, 3, H, W]
    shift, scale = (torch.tensor(values, device=pixels.device).view(1, 3, 1, 1) for values in (mean, std))
    images = (images - shift) / scale
    batch, grid = len(images), images.shape[-1] // 28
    blocks = images.view(batch, 3, grid, 2, 14, grid, 2, 14).permute(0, 2, 5, 3, 6, 1, 4, 7)
    return blocks.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1).reshape(batch, 4 * grid * grid, 1176)


def see(visual: nn.Module, patches: Tensor) -> Tensor:
    """The tower's output for a batch of one-window images, [B, 64, 1176] -> [B, 16, hidden].

    Transformers' own forward loops over images; with one window per image a batch dimension does the same.
    """
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
    from transformers.vision_utils import get_vision_position_ids

    batch, count, _ = patches.shape
    side = int(count**0.5)
    grid = torch.tensor([[1, side, side]], device=patches.device)
    cos, sin = visual.rotary_pos_emb(patches, get_vision_position_ids(grid, visual.spatial_merge_size))
    hidden = visual.patch_embed(patches.reshape(batch * count, -1)).view(batch, count, -1)
    for block in visual.blocks:
        attention = block.attn
        qkv = attention.qkv(block.norm1(hidden)).view(batch, count, 3, attention.num_heads, -1)
        query, key, value = qkv.unbind(2)  # [B, 64, heads, 32]
        query, key = apply_rotary_pos_emb_vision(query, key, cos, sin)
        mixed = F.scaled_dot_product_attention(*(x.transpose(1, 2).to(value.dtype) for x in (query, key, value)))
        hidden = hidden + attention.proj(mixed.transpose(1, 2).reshape(batch, count, -1))
        hidden = hidden + block.mlp(block.norm2(hidden))
    return visual.merger(hidden).view(batch, CELLS, -1)


def read(model, cells: Tensor, ids: Tensor) -> Tensor:
    """The last hidden states [B, L, hidden] of right-padded rows that all hold their image at the same place."""
    start = int((ids[0] == model.config.image_token_id).nonzero()[0])
    embeds = model.get_input_embeddings()(ids)
    embeds = torch.cat([embeds[:, :start], cells.to(embeds.dtype), embeds[:, start + CELLS :]], dim=1)
    text, side = torch.arange(ids.shape[1], device=ids.device), int(CELLS**0.5)
    positions = torch.where(text < start, text, text - CELLS + side).expand(3, -1).clone()  # [3, L]
    cell = torch.arange(CELLS, device=ids.device)
    positions[:, start : start + CELLS] = start + torch.stack([0 * cell, cell // side, cell % side])
    return model.model.language_model(
        inputs_embeds=embeds,
        position_ids=positions[:, None].expand(-1, len(ids), -1),
        attention_mask={"full_attention": None},  # right padding needs no mask under a causal one
        use_cache=False,
    ).last_hidden_state


class CellHead(nn.Module):
    """The side task: colour, kind and the four box edges of what lies in a cell, from the cell's image token."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.sizes = [len(COLOURS) + 1, len(KINDS), *4 * [toy_model.IMAGE_PX + 1]]
        self.out = nn.Linear(hidden, sum(self.sizes))

    def forward(self, cells: Tensor, targets: Tensor) -> Tensor:
        parts = self.out(cells).float().split(self.sizes, dim=-1)
        losses = [
            F.cross_entropy(part.flatten(0, 1), targets[..., i].flatten(), ignore_index=IGNORE)
            for i, part in enumerate(parts)
        ]
        return torch.stack(losses).sum()


def token_weights(tokenizer, weight: float, device: torch.device) -> Tensor:
    """The loss weight of every token id: `weight` for what depends on the image, 1 for the rest."""
    words = [*COLOURS, *KINDS, *"ABCD", "left right up down above below top bottom center yes no larger smaller same"]
    words = {word for group in words for word in group.split()} | set("touching apart covering covered".split())
    ids = [i for text, i in tokenizer.get_vocab().items() if text.lstrip("Ġ") in words or text.isdigit()]
    weights = torch.ones(len(tokenizer), device=device)
    weights[ids] = weight
    return weights


def reply_loss(model, hidden: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Mean cross entropy of the reply tokens, weighted by token id."""
    wanted = labels[:, 1:] != IGNORE
    targets = labels[:, 1:][wanted]
    logits = model.lm_head(hidden[:, :-1][wanted]).float()
    weight = weights[targets]
    return (F.cross_entropy(logits, targets, reduction="none") * weight).sum() / weight.sum()


class Examiner:
    """Generates replies to held-out rows with the model's own `generate` and scores them."""

    def __init__(self, processor, number: int, device: torch.device) -> None:
        self.processor, self.device = processor, device
        pairs = list(generate(number, seed=0, split="examination"))
        self.rows: list[VqaRow] = [row for _, row in pairs]
        self.inputs = processor(
            text=[chat_text(processor, row.problem) for row in self.rows],
            images=[draw(DEFAULT_CANVAS, puzzle.shapes) for puzzle, _ in pairs],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(device)

    def replies(self, model, temperature: float) -> list[str]:
        sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        with torch.no_grad():
            ids = model.generate(
                **self.inputs, do_sample=bool(temperature), max_new_tokens=128, use_cache=True, **sampling
            )
        new_ids = ids[:, self.inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.batch_decode(new_ids, skip_special_tokens=True)

    def measure(self, model, temperature: float = 0.0) -> dict[str, float]:
        """Rates over the held-out rows: format, right answers, mean IoU of boxes paired by id, estimated reward.

        The estimate pairs boxes by id, where the reward also pairs by word vectors, which need spaCy.
        """
        from spatialthinker.geometry import ciou, iou
        from spatialthinker.response import section
        from spatialthinker.rewards import format_failure
        from spatialthinker.scene_graph import load_scene

        totals = np.zeros(4)
        for row, reply in zip(self.rows, self.replies(model, temperature), strict=True):
            if format_failure(reply) is not None:
                continue
            truth, scene = (load_scene(section(text, "scene")) for text in (row.answer_option_text, reply))
            is_right = (section(reply, "answer") or "").strip().lower() == row.answer_option_text_only.lower()
            boxes = dict(zip(scene.ids, scene.boxes, strict=True))
            pairs = [(box, boxes[name]) for name, box in zip(truth.ids, truth.boxes, strict=True) if name in boxes]
            overlap = sum(float(iou(a, b)) for a, b in pairs) / len(truth.ids)
            closeness = sum((float(ciou(a, b)) + 1) / 2 for a, b in pairs) / len(truth.ids)
            count = max(0.0, 1 - abs(len(scene.ids) - len(truth.ids)) / len(truth.ids))
            reward = 0.1 + 0.2 * count + is_right * (0.5 + 0.2 * closeness)
            totals += (1.0, is_right, overlap, reward)
        return dict(zip(("format", "accuracy", "iou", "reward"), totals / len(self.rows), strict=True))


def save_weights(model, folder: Path) -> None:
    """Write the model in bf16 (half the bytes; training in float32 goes on)."""
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state)
    for name in ("config.json",):
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(config | {"dtype": "bfloat16"}, indent=2) + "\n")


def train(model, rows: Rows, examiner: Examiner, folder: Path, options: argparse.Namespace) -> None:
    """Minimise the reply loss, and the cell loss for the first part; examine and save on the way."""
    device = rows.ids.device
    processor = examiner.processor.image_processor
    head = CellHead(model.config.text_config.hidden_size).to(device)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, options.lr, (0.9, 0.98), weight_decay=0.01, fused=device.type == "cuda")
    warm_up = max(1, min(200, options.steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.1 + 0.45 * (1 + np.cos(np.pi * min(step / options.steps, 1)))),
    )
    weights = token_weights(examiner.processor.tokenizer, options.image_weight, device)
    random = torch.Generator(device="cpu").manual_seed(options.seed)
    thresholds = [value for value in options.save_at]
    started, order = time.monotonic(), torch.randperm(len(rows.ids), generator=random)
    log = (folder / "build_log.jsonl").open("w")
    bar = tqdm(range(1, options.steps + 1), desc="steps", mininterval=5)
    for step in bar:
        at = (step - 1) * options.batch % max(1, len(order) - options.batch + 1)
        if at < options.batch:
            order = torch.randperm(len(rows.ids), generator=random)
        batch = order[at : at + options.batch].to(device)
        side_weight = options.cell_weight * max(0.0, 1 - step / (options.cell_share * options.steps))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            patches = patchify(rows.pixels[batch], processor.image_mean, processor.image_std)
            cells = see(model.model.visual, patches)
            loss = reply_loss(model, read(model, cells, rows.ids[batch]), rows.labels[batch], weights)
            cell_loss = head(cells, rows.cells[batch])
        optimizer.zero_grad()
        (loss + side_weight * cell_loss).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        is_last = step == options.steps or time.monotonic() - started > options.max_seconds
        if step % options.examine_every and not is_last:
            continue
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            shuffled = read(model, cells.roll(1, 0), rows.ids[batch])
            blind_loss = reply_loss(model, shuffled, rows.labels[batch], weights)
        report = {"step": step, "seconds": time.monotonic() - started, "loss": loss.item()}
        report |= {"loss_shuffled": blind_loss.item(), "cell_loss": cell_loss.item()}
        report |= examiner.measure(model)
        if thresholds and report["accuracy"] >= thresholds[0]:
            thresholds = [value for value in thresholds if value > report["accuracy"]]
            report |= {f"sampled_{key}": value for key, value in examiner.measure(model, 1.0).items()}
            save_weights(model, folder / f"step_{step}")
        report = {key: round(float(value), 4) for key, value in report.items()}
        tqdm.write(json.dumps(report))
        log.write(json.dumps(report) + "\n")
        log.flush()
        if is_last:
            break


def main() -> None:
    from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

    parser = argparse.ArgumentParser(
        description="Build the toy model's folder: tokenizer, processor, trained weights."
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--image_weight", type=float, default=3.0, help="loss weight of tokens that depend on the image"
    )
    parser.add_argument("--cell_weight", type=float, default=0.5, help="initial weight of the tower's side task")
    parser.add_argument(
        "--cell_share", type=float, default=0.5, help="share of the steps after which that weight is 0"
    )
    parser.add_argument("--examine_every", type=int, default=250)
    parser.add_argument("--examine_rows", type=int, default=512)
    parser.add_argument("--save_at", type=float, nargs="*", default=[0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8])
    parser.add_argument("--max_seconds", type=float, default=1e9, help="stop training after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    processor = toy_model.save_parts(options.out)
    model = Qwen2_5_VLForConditionalGeneration(toy_model.build_config(processor.tokenizer)).to(device)
    model.generation_config = GenerationConfig(
        eos_token_id=processor.tokenizer.eos_token_id, pad_token_id=processor.tokenizer.pad_token_id
    )
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(processor.tokenizer)} tokens, {device}")
    rows = Rows(options.rows, options.seed, options.out, device, options.workers)
    train(model, rows, Examiner(processor, options.examine_rows, device), options.out, options)
    save_weights(model, options.out)


if __name__ == "__main__":
    main()

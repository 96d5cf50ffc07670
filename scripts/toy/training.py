"""Training of the toy model from nothing: the losses, an examination on held-out rows, the loop over two teachers."""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from spatialthinker.geometry import ciou, iou
from spatialthinker.response import section
from spatialthinker.rewards import format_failure
from spatialthinker.rewards.accuracy import is_same_text
from spatialthinker.scene_graph import load_scene
from spatialthinker.schema import VqaRow
from spatialthinker.shapes import COLOURS, DEFAULT_CANVAS, KINDS, draw
from spatialthinker.synthetic import generate
from toy import model as toy_model
from toy.rows import CELLS, IGNORE, Rows, chat_text

# B images of a batch, L tokens of prompt and reply; an image is 64 patches and 16 cells (= image tokens).
WARM_UP_STEPS = 200
IMAGE_WORDS = (
    *"A B C D yes no left right up down above below top bottom center".split(),
    *"larger smaller same touching apart covering covered".split(),
)


def patchify(pixels: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """The image processor's patches of uint8 images [B, H, W, 3]: [B, 64, 1176], in blocks of 2 x 2 patches."""
    images = pixels.permute(0, 3, 1, 2).float() / 255  # [B, 3, H, W]
    shift, scale = (torch.tensor(values, device=pixels.device).view(1, 3, 1, 1) for values in (mean, std))
    images = (images - shift) / scale
    batch, grid = len(images), images.shape[-1] // 28
    blocks = images.view(batch, 3, grid, 2, 14, grid, 2, 14).permute(0, 2, 5, 3, 6, 1, 4, 7)
    return blocks.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1).reshape(batch, 4 * grid * grid, 1176)


def see(visual: Any, patches: Tensor) -> Tensor:
    """The tower's output for a batch of one-window images, [B, 64, 1176] -> [B, 16, hidden].

    Transformers' own forward loops over images; with one window per image a batch dimension does the same.
    """
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
    from transformers.vision_utils import get_vision_position_ids

    batch, count, _ = patches.shape
    side = int(count**0.5)
    grid = torch.tensor([[1, side, side]], device=patches.device)
    cos, sin = visual.rotary_pos_emb(patches, get_vision_position_ids(grid, visual.spatial_merge_size))
    hidden = F.linear(patches, visual.patch_embed.proj.weight.flatten(1))  # its kernel is one patch: no convolution
    for block in visual.blocks:
        attention = block.attn
        qkv = attention.qkv(block.norm1(hidden)).view(batch, count, 3, attention.num_heads, -1)
        query, key, value = qkv.unbind(2)  # [B, 64, heads, 32]
        query, key = apply_rotary_pos_emb_vision(query, key, cos, sin)
        query, key, value = (x.transpose(1, 2).to(value.dtype) for x in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value)
        hidden = hidden + attention.proj(mixed.transpose(1, 2).reshape(batch, count, -1))
        hidden = hidden + block.mlp(block.norm2(hidden))
    return visual.merger(hidden).view(batch, CELLS, -1)


def read(model: Any, cells: Tensor, ids: Tensor) -> Tensor:
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
        """The sum of six mean cross entropies; cells [B, 16, hidden], targets [B, 16, 6]."""
        parts = self.out(cells).float().split(self.sizes, dim=-1)
        losses = [
            F.cross_entropy(part.flatten(0, 1), targets[..., i].flatten(), ignore_index=IGNORE)
            for i, part in enumerate(parts)
        ]
        return torch.stack(losses).sum()


def token_weights(tokenizer: Any, weight: float, device: torch.device) -> Tensor:
    """The loss weight of every token id: `weight` for what depends on the image, 1 for the rest."""
    words = {*COLOURS, *KINDS, *IMAGE_WORDS}
    ids = [i for text, i in tokenizer.get_vocab().items() if text.lstrip("Ġ") in words or text.isdigit()]
    weights = torch.ones(len(tokenizer), device=device)
    weights[ids] = weight
    return weights


def reply_loss(model: Any, hidden: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Mean cross entropy of the reply tokens, weighted by token id."""
    wanted = labels[:, 1:] != IGNORE
    targets = labels[:, 1:][wanted]
    logits = model.lm_head(hidden[:, :-1][wanted]).float()[:, : len(weights)]
    weight = weights[targets]
    return (F.cross_entropy(logits, targets, reduction="none") * weight).sum() / weight.sum()


def score_reply(reply: str, row: VqaRow) -> dict[str, float]:
    """Format, right answer, mean IoU of the true boxes, and the dense reward up to one simplification.

    Boxes are paired by id, where the reward pairs them by word vectors too, for which a GPU host may lack spaCy.
    """
    if format_failure(reply) is not None:
        return dict.fromkeys(("format", "accuracy", "iou", "reward"), 0.0)
    truth, scene = (load_scene(section(text, "scene")) for text in (row.answer_option_text, reply))
    is_right = is_same_text(section(reply, "answer"), row.answer_option_text_only)
    boxes = dict(zip(scene.ids, scene.boxes, strict=True))
    pairs = [(box, boxes[name]) for name, box in zip(truth.ids, truth.boxes, strict=True) if name in boxes]
    overlap, closeness = (sum(float(f(a, b)) for a, b in pairs) / len(truth.ids) for f in (iou, ciou))
    count = max(0.0, 1 - abs(len(scene.ids) - len(truth.ids)) / len(truth.ids))
    reward = 0.1 + 0.2 * count + is_right * (0.5 + 0.2 * closeness)
    return {"format": 1.0, "accuracy": float(is_right), "iou": overlap, "reward": reward}


class Examiner:
    """Generates replies to held-out rows with the model's own `generate` and scores them."""

    def __init__(self, processor: Any, number: int, device: torch.device) -> None:
        self.processor = processor
        pairs = list(generate(number, seed=0, split="examination"))
        self.rows = [row for _, row in pairs]
        self.inputs = processor(
            text=[chat_text(processor, row.problem) for row in self.rows],
            images=[draw(DEFAULT_CANVAS, puzzle.shapes) for puzzle, _ in pairs],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(device)

    @torch.no_grad()
    def replies(self, model: Any, temperature: float) -> list[str]:
        """One reply per row; greedy at temperature 0."""
        sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        ids = model.generate(**self.inputs, do_sample=bool(temperature), max_new_tokens=128, **sampling)
        new_ids = ids[:, self.inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.batch_decode(new_ids, skip_special_tokens=True)

    def measure(self, model: Any, temperature: float = 0.0) -> dict[str, float]:
        """Mean scores over the held-out rows."""
        scores = [score_reply(*pair) for pair in zip(self.replies(model, temperature), self.rows, strict=True)]
        return {key: float(np.mean([score[key] for score in scores])) for key in scores[0]}


def save_weights(model: Any, folder: Path) -> None:
    """Write the model in bf16, half the bytes; the model itself stays in float32."""
    tensors = model.state_dict().items()
    state = {name: tensor.to(torch.bfloat16) for name, tensor in tensors if name != "lm_head.weight"}
    model.save_pretrained(folder, state_dict=state)
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    for part in ("text_config", "vision_config"):
        config[part].pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


class BuildLog:
    """Prints reports and keeps them in build_log.jsonl."""

    def __init__(self, folder: Path) -> None:
        self.path, self.started = folder / "build_log.jsonl", time.monotonic()
        self.path.unlink(missing_ok=True)

    def write(self, report: dict[str, Any]) -> None:
        report = {"seconds": time.monotonic() - self.started} | report
        line = json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in report.items()})
        tqdm.write(line)
        with self.path.open("a") as file:
            file.write(line + "\n")


def train(
    model: Any, rows: Rows, examiner: Examiner, log: BuildLog, options: argparse.Namespace, teacher: str
) -> None:
    """Minimise the reply loss on one teacher's replies, with the cell loss beside it while the gold phase starts."""
    device, is_gold = rows.pixels.device, teacher == "gold"
    steps = options.steps if is_gold else options.careless_steps
    seconds, lr = (options.seconds, options.lr) if is_gold else (np.inf, options.lr / 4)
    head = CellHead(model.config.text_config.hidden_size).to(device)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr, (0.9, 0.98), weight_decay=0.01, fused=device.type == "cuda")
    weights = token_weights(examiner.processor.tokenizer, options.image_weight, device)
    generator = torch.Generator().manual_seed(options.seed)
    thresholds = list(options.save_at) if is_gold else []
    warm_up, image = min(WARM_UP_STEPS, max(1, steps // 10)), examiner.processor.image_processor
    started = time.monotonic()
    for step in tqdm(range(1, steps + 1), desc=f"{teacher} steps", mininterval=10):
        done = max(step / steps, (time.monotonic() - started) / seconds)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(step / warm_up, max(0.02, 0.5 + 0.5 * np.cos(np.pi * min(done, 1.0))))
        side_weight = options.cell_weight * max(0.0, 1 - 2 * done) if is_gold else 0.0
        index = torch.randint(len(rows), (options.batch,), generator=generator)
        pixels, ids, labels, targets = rows.batch(index.to(device), teacher)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            cells = see(model.model.visual, patchify(pixels, image.image_mean, image.image_std))
            loss = reply_loss(model, read(model, cells, ids), labels, weights)
            cell_loss = head(cells, targets)
        optimizer.zero_grad()
        (loss + side_weight * cell_loss).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        is_last = done >= 1
        if step % options.examine_every and not is_last:
            continue
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            shuffled_loss = reply_loss(model, read(model, cells.roll(1, 0), ids), labels, weights)
        report = {"teacher": teacher, "step": step, "loss": loss.item(), "loss_shuffled": shuffled_loss.item()}
        report |= {"cell_loss": cell_loss.item()} | examiner.measure(model)
        if is_last or (thresholds and report["accuracy"] >= thresholds[0]):
            report |= {f"sampled_{key}": value for key, value in examiner.measure(model, 1.0).items()}
            save_weights(model, options.out / f"{teacher}_{step}")
            thresholds = [value for value in thresholds if value > report["accuracy"]]
        log.write(report)
        if is_last:
            break


def build(options: argparse.Namespace) -> None:
    """Write the toy model's folder; `options` are those of build_toy_model.py."""
    from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are forked
    torch.manual_seed(options.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    options.out.mkdir(parents=True, exist_ok=True)
    log = BuildLog(options.out)
    processor = toy_model.copy_parts(options.init, options.out) if options.init else toy_model.save_parts(options.out)
    rows = Rows(options.rows, options.seed, processor, options.workers)  # forks, so before CUDA starts
    log.write({"rows": len(rows), "tokens_per_row": rows.tokens["gold"].shape[1]})

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.init:
        model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(options.init, dtype=torch.float32)
    else:
        model = Qwen2_5_VLForConditionalGeneration(toy_model.build_config(processor.tokenizer))
    model.to(device).generation_config = GenerationConfig(
        eos_token_id=processor.tokenizer.eos_token_id, pad_token_id=processor.tokenizer.pad_token_id
    )
    rows, examiner = rows.to(device), Examiner(processor, options.examine_rows, device)
    log.write({"parameters": sum(p.numel() for p in model.parameters()), "device": str(device)})
    for teacher in ("gold", "careless"):
        train(model, rows, examiner, log, options, teacher)
    save_weights(model, options.out)

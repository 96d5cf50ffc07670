"""Rows of three groups for tests of packed passes: with one image, with two and with none."""

import torch

from tests.support.tiny_qwen import IMAGE_TOKEN, VISION_END, VISION_FAMILIES, VISION_START, patch_dim, tiny_model
from verl.model.packing import pack, plan_micro_batches
from verl.model.qwen_vl import ResponseLogProbs, attend_packed, expand_image_tokens, mrope_positions

MERGE = 2
GRIDS = [[(1, 4, 6)], [(1, 4, 4), (1, 6, 4)], []]  # one image, two images, text alone


def make_rows(family):
    """Three groups; in a vision family with one image, with two and with none, otherwise all without."""
    group_grids = GRIDS if family in VISION_FAMILIES else [[], [], []]
    generator = torch.Generator().manual_seed(7)

    def text(length):
        return torch.randint(0, 80, (length,), generator=generator).tolist()

    prompts, positions = [], []
    for grids in group_grids:
        ids = text(3)
        for _ in grids:
            ids += [VISION_START, IMAGE_TOKEN, VISION_END] + text(2)
        ids = expand_image_tokens(ids + text(4), grids, IMAGE_TOKEN, MERGE)
        prompts.append(torch.tensor(ids))
        positions.append(mrope_positions(ids, grids, IMAGE_TOKEN, MERGE))
    responses = [[torch.tensor(text(length)) for length in lengths] for lengths in [(5, 1, 8), (7, 3, 2), (4, 6, 1)]]
    grids = [grid for group in group_grids for grid in group]
    pixels = [torch.randn(t * h * w, patch_dim(family), generator=generator) for t, h, w in grids]
    images = [[0], [1, 2], []] if grids else [[], [], []]
    return prompts, positions, responses, images, grids, pixels


def packed_model(family):
    model = tiny_model(family=family).eval()
    attend_packed(model)
    return model


def packed_log_probs(model, rows, temperature, max_tokens, shared_prompt, device="cpu"):
    prompts, positions, responses, images, grids, pixels = rows
    scorer = ResponseLogProbs(model)
    plan = plan_micro_batches(
        [len(p) for p in prompts], [[len(r) for r in rs] for rs in responses], max_tokens, shared_prompt
    )
    out = []
    for pieces in plan:
        batch = pack(pieces, prompts, positions, responses, images)
        shown = list(dict.fromkeys(batch.image_ids)) or ([0] if pixels else [])
        pixel_values = torch.cat([pixels[i] for i in shown]).to(device) if shown else None
        shown_grids = [grids[i] for i in shown]
        out.append(scorer(batch.to(torch.device(device)), pixel_values, shown_grids, temperature)[0])
    return torch.cat(out), plan

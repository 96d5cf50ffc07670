"""Every family's packed forward pass is transformers' own forward over repeated prompts, in value and gradient."""

from types import SimpleNamespace

import pytest
import torch

from tests.support.packed_rows import GRIDS, MERGE, make_rows, packed_log_probs, packed_model
from tests.support.tiny_qwen import (
    FAMILIES,
    IMAGE_TOKEN,
    VISION_FAMILIES,
    tiny_model,
)
from verl.model.qwen_vl import (
    check_image_tokens,
    expand_image_tokens,
)


def plain_log_probs(model, rows, temperature):
    """Log-probs by transformers' own forward, one repeated prompt and response after the other."""
    prompts, _, responses, images, grids, pixels = rows
    out = []
    for group, prompt in enumerate(prompts):
        for response in responses[group]:
            ids = torch.cat([prompt, response]).unsqueeze(0)
            extra = {}
            if images[group]:
                extra = {
                    "pixel_values": torch.cat([pixels[i] for i in images[group]]),
                    "image_grid_thw": torch.tensor([grids[i] for i in images[group]]),
                    "mm_token_type_ids": (ids == IMAGE_TOKEN).int(),
                }
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).logits[0]
            log_probs = (logits / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
            out.append(log_probs.gather(1, response.unsqueeze(1)).squeeze(1))
    return torch.cat(out)


def padded_log_probs(model, rows, temperature):
    """The same by one forward over a padded batch: prompts padded on the left, responses on the right."""
    prompts, _, responses, images, grids, pixels = rows
    pairs = [(prompt, response) for prompt, group in zip(prompts, responses, strict=True) for response in group]
    width, tail = max(map(len, prompts)), max(len(response) for _, response in pairs)
    ids, mask = torch.zeros(len(pairs), width + tail, dtype=torch.long), torch.zeros(len(pairs), width + tail).long()
    for row, (prompt, response) in enumerate(pairs):
        where = slice(width - len(prompt), width + len(response))
        ids[row, where], mask[row, where] = torch.cat([prompt, response]), 1
    extra = {}
    if pixels:
        shown = [i for group, rows_ in zip(images, responses, strict=True) for _ in rows_ for i in group]
        extra = {
            "pixel_values": torch.cat([pixels[i] for i in shown]),
            "image_grid_thw": torch.tensor([grids[i] for i in shown]),
            "mm_token_type_ids": (ids == IMAGE_TOKEN).int(),
        }
    else:
        extra = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    log_probs = (model(input_ids=ids, attention_mask=mask, **extra).logits / temperature).log_softmax(-1)
    return torch.cat(
        [
            log_probs[row, width - 1 : width - 1 + len(response)].gather(1, response.unsqueeze(1)).squeeze(1)
            for row, (_, response) in enumerate(pairs)
        ]
    )


def gradients(model):
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return torch.cat([g.flatten() for g in grads])


@pytest.fixture(scope="module")
def expected():
    """Per family: rows, token weights, plain log-probs and the gradient of their weighted sum."""
    cache = {}

    def of(family):
        if family not in cache:
            rows, model = make_rows(family), tiny_model(family=family).eval()
            model.set_attn_implementation("sdpa")
            count = sum(len(response) for group in rows[2] for response in group)
            weights = torch.randn(count, generator=torch.Generator().manual_seed(1))
            log_probs = plain_log_probs(model, rows, temperature=0.7)
            (log_probs * weights).sum().backward()
            cache[family] = rows, weights, log_probs.detach(), gradients(model)
        return cache[family]

    return of


@pytest.mark.parametrize("shared_prompt", [True, False])
@pytest.mark.parametrize("max_tokens", [1, 60, 10_000])
@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_5_moe_text"])
def test_packed_groups_equal_plain_transformers_in_value_and_gradient(expected, family, max_tokens, shared_prompt):
    rows, weights, log_probs, gradient = expected(family)
    model = packed_model(family)
    actual, plan = packed_log_probs(model, rows, 0.7, max_tokens, shared_prompt)
    (actual * weights).sum().backward()
    actual_gradient = gradients(model)

    if shared_prompt and max_tokens == 10_000:
        assert len(plan) == 1 and len(plan[0]) == 3
    if max_tokens == 1:
        assert len(plan) == 9
    torch.testing.assert_close(actual, log_probs, rtol=1e-5, atol=1e-5)
    assert (actual_gradient - gradient).norm() / gradient.norm() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batches_of_transformers_give_the_same(expected, family):
    rows, weights, log_probs, gradient = expected(family)
    model = tiny_model(family=family).eval()
    model.set_attn_implementation("sdpa")
    padded = padded_log_probs(model, rows, 0.7)
    (padded * weights).sum().backward()
    padded_gradient = gradients(model)
    torch.testing.assert_close(padded, log_probs, rtol=1e-5, atol=1e-5)
    assert (padded_gradient - gradient).norm() / gradient.norm() < 1e-5


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_positions_equal_transformers_own(family):
    prompts, positions, *_ = make_rows(family)
    model = tiny_model(family=family)
    for prompt, position, grids in zip(prompts, positions, GRIDS, strict=True):
        if not grids:
            assert torch.equal(position, torch.arange(len(prompt)).expand(3, -1))
            continue
        expected, _ = model.model.get_rope_index(
            prompt.unsqueeze(0), (prompt == IMAGE_TOKEN).int().unsqueeze(0), image_grid_thw=torch.tensor(grids)
        )
        assert torch.equal(position, expected[:, 0])


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_the_image_moves_the_log_probs(family):
    """A silently dropped image leaves loss curves looking normal; here it must show."""
    rows = make_rows(family)
    model = packed_model(family)
    with torch.no_grad():
        before, _ = packed_log_probs(model, rows, 1.0, 10_000, True)
        other = (*rows[:5], [pixels.flip(0) for pixels in rows[5]])
        after, _ = packed_log_probs(model, other, 1.0, 10_000, True)
    moved = (before - after).abs()
    image_tokens, text_tokens = slice(0, 26), slice(26, None)
    assert moved[image_tokens].max() > 1e-3
    assert moved[text_tokens].max() < 1e-6


def test_features_of_middle_tower_layers_reach_the_decoder():
    model = packed_model("qwen3_vl")
    rows = make_rows("qwen3_vl")
    log_probs, _ = packed_log_probs(model, rows, 1.0, 10_000, True)
    log_probs.sum().backward()
    for merger in model.model.visual.deepstack_merger_list:
        assert merger.linear_fc2.weight.grad.norm() > 0


def test_prompt_without_a_place_for_its_image_is_refused():
    with pytest.raises(ValueError, match="1 image places but the row has 2 images"):
        expand_image_tokens([1, IMAGE_TOKEN, 2], [(1, 4, 4), (1, 4, 4)], IMAGE_TOKEN, MERGE)


def test_a_prompt_that_lost_its_pixels_is_named():
    """Images' tokens that arrive at a rank without their images would train as words, with metrics that look right."""
    processor = SimpleNamespace(image_token_id=9, video_token_id=8, image_processor=SimpleNamespace(merge_size=2))
    prompts, grids = [torch.tensor([1, 9, 9, 9, 9, 2]), torch.tensor([1, 2])], [(1, 4, 4)]
    check_image_tokens(prompts, [[0], []], grids, processor)
    with pytest.raises(ValueError, match="prompt 0 .* 4 image tokens, and its 0 images have 0 features"):
        check_image_tokens(prompts, [[], []], [], processor)
    with pytest.raises(ValueError, match="prompt 1 .* 0 image tokens, and its 1 images have 4 features"):
        check_image_tokens(prompts, [[0], [0]], grids, processor)
    check_image_tokens(prompts, [[], []], [], SimpleNamespace(image_token_id=None))

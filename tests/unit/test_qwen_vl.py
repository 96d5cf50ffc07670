import pytest
import torch

from tests.tiny_qwen import IMAGE_TOKEN, PATCH_DIM, VISION_END, VISION_START, tiny_model
from verl.attention import TEXT_ATTENTION, VISION_ATTENTION
from verl.batching import pack, plan_micro_batches
from verl.qwen_vl import ResponseLogProbs, expand_image_tokens, mrope_positions

MERGE = 2
GRIDS = [[(1, 4, 6)], [(1, 4, 4), (1, 6, 4)], []]  # one image, two images, text alone


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(7)

    def text(length):
        return torch.randint(0, 80, (length,), generator=generator).tolist()

    prompts, positions = [], []
    for grids in GRIDS:
        ids = text(3)
        for _ in grids:
            ids += [VISION_START, IMAGE_TOKEN, VISION_END] + text(2)
        ids = expand_image_tokens(ids + text(4), grids, IMAGE_TOKEN, MERGE)
        prompts.append(torch.tensor(ids))
        positions.append(mrope_positions(ids, grids, IMAGE_TOKEN, MERGE))
    responses = [[torch.tensor(text(length)) for length in lengths] for lengths in [(5, 1, 8), (7, 3, 2), (4, 6, 1)]]
    grids = [grid for group in GRIDS for grid in group]
    pixels = [torch.randn(t * h * w, PATCH_DIM, generator=generator) for t, h, w in grids]
    return prompts, positions, responses, [[0], [1, 2], []], grids, pixels


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


def packed_log_probs(model, rows, temperature, max_tokens, shared_prompt):
    prompts, positions, responses, images, grids, pixels = rows
    scorer = ResponseLogProbs(model)
    plan = plan_micro_batches(
        [len(p) for p in prompts], [[len(r) for r in rs] for rs in responses], max_tokens, shared_prompt
    )
    out = []
    for pieces in plan:
        batch = pack(pieces, prompts, positions, responses, images)
        wanted = list(dict.fromkeys(batch.image_ids)) or [0]
        pixel_values = torch.cat([pixels[i] for i in wanted])
        out.append(scorer(batch, pixel_values, torch.tensor([grids[i] for i in wanted]), temperature)[0])
    return torch.cat(out), plan


def gradients(model):
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize("shared_prompt", [True, False])
@pytest.mark.parametrize("max_tokens", [1, 60, 10_000])
def test_packed_groups_equal_plain_transformers_in_value_and_gradient(rows, max_tokens, shared_prompt):
    model = tiny_model().eval()
    weights = torch.randn(sum(len(r) for rs in rows[2] for r in rs), generator=torch.Generator().manual_seed(1))
    model.set_attn_implementation("sdpa")
    expected = plain_log_probs(model, rows, temperature=0.7)
    (expected * weights).sum().backward()
    expected_gradient = gradients(model)

    model.set_attn_implementation({"text_config": TEXT_ATTENTION, "vision_config": VISION_ATTENTION})
    actual, plan = packed_log_probs(model, rows, 0.7, max_tokens, shared_prompt)
    (actual * weights).sum().backward()
    actual_gradient = gradients(model)

    if shared_prompt and max_tokens == 10_000:
        assert len(plan) == 1 and len(plan[0]) == 3
    if max_tokens == 1:
        assert len(plan) == 9
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert (actual_gradient - expected_gradient).norm() / expected_gradient.norm() < 1e-5


def test_positions_equal_transformers_own(rows):
    prompts, positions, _, _, _, _ = rows
    model = tiny_model()
    for prompt, position, grids in zip(prompts, positions, GRIDS, strict=True):
        if not grids:
            assert torch.equal(position, torch.arange(len(prompt)).expand(3, -1))
            continue
        expected, _ = model.model.get_rope_index(
            prompt.unsqueeze(0), (prompt == IMAGE_TOKEN).int().unsqueeze(0), image_grid_thw=torch.tensor(grids)
        )
        assert torch.equal(position, expected[:, 0])


def test_the_image_moves_the_log_probs(rows):
    """A silently dropped image leaves loss curves looking normal; here it must show."""
    model = tiny_model().eval()
    model.set_attn_implementation({"text_config": TEXT_ATTENTION, "vision_config": VISION_ATTENTION})
    before, _ = packed_log_probs(model, rows, 1.0, 10_000, True)
    other = (*rows[:5], [pixels.flip(0) for pixels in rows[5]])
    after, _ = packed_log_probs(model, other, 1.0, 10_000, True)
    moved = (before - after).abs()
    image_tokens, text_tokens = slice(0, 26), slice(26, None)
    assert moved[image_tokens].max() > 1e-3
    assert moved[text_tokens].max() < 1e-6


def test_prompt_without_a_place_for_its_image_is_refused():
    with pytest.raises(ValueError, match="1 image places but the row has 2 images"):
        expand_image_tokens([1, IMAGE_TOKEN, 2], [(1, 4, 4), (1, 4, 4)], IMAGE_TOKEN, MERGE)

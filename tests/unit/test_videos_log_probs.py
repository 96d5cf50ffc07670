"""Packed groups with videos or many images are transformers' own forward over repeated prompts, with gradients."""

import pytest
import torch

from tests.support.tiny_model_folder import build_config, build_tokenizer
from tests.support.tiny_qwen import VISION_FAMILIES
from tests.support.videos import frame_list, open_rows, tiny_processor
from verl.data.dataset import collate_prompts
from verl.model.qwen_vl import ResponseLogProbs, attend_packed, image_patches
from verl.model.videos import in_order
from verl.workers.actor import Actor, Groups

TEMPERATURE = 0.7
ROWS = [
    {"prompt": "<video>a?", "answer": "a", "images": None, "videos": [frame_list(8)]},
    {"prompt": "<image>b<video>?", "answer": "a", "images": frame_list(1, seed=1), "videos": [frame_list(3, seed=2)]},
    {"prompt": "<image>" * 8 + "c?", "answer": "a", "images": frame_list(8, (56, 56), seed=3), "videos": None},
    {"prompt": "d?", "answer": "a", "images": None, "videos": None},
]


def build_model(family):
    import transformers

    torch.manual_seed(0)
    config = build_config(build_tokenizer(), family)
    config.vision_config.tokens_per_second = 2
    model = getattr(transformers, config.architectures[0])(config).eval()
    for parameter in model.parameters():  # large enough for attention and logits to be far from uniform
        parameter.data.mul_(4.0 if parameter.dim() > 1 else 1.0)
    return model


def make_groups(folder, family):
    """Prompts with videos and images, each with two responses, as a rank has them."""
    processor = tiny_processor(family)
    bounds = {"min_pixels": 56 * 56, "max_pixels": 84 * 84}
    settings = bounds | {"tokens_per_second": 2.0 if family == "qwen2_5_vl" else 1.0}
    data = open_rows(folder, ROWS, processor, videos=settings, **bounds)
    prompts = list(data)
    batch = collate_prompts(prompts, 0)
    generator = torch.Generator().manual_seed(1)
    batch.batch["responses"] = torch.randint(0, 256, (len(prompts), 2, 5), generator=generator)
    mask = torch.ones(len(prompts), 2, 5, dtype=torch.bool)
    mask[0, 1, 3:] = False
    batch.batch["response_mask"] = mask
    media = [each for prompt in prompts for each in in_order(prompt.images, prompt.videos)]
    patches = image_patches(
        media, processor.image_processor, video_processor=processor.video_processor, **data.pixel_limits
    )
    return Groups.from_proto(batch, *patches), prompts, media


def plain_log_probs(model, groups, prompts, media, positions_given):
    """Log-probs by transformers' own forward, one repeated prompt and response after the other."""
    out = []
    for number, prompt in enumerate(prompts):
        for response in groups.responses[number]:
            ids = torch.cat([prompt.ids, response]).unsqueeze(0)
            kinds = (ids == 261).int() + 2 * (ids == 262).int()
            extra = {"mm_token_type_ids": kinds}
            for kind, (pixels, grid) in {
                bytes: ("pixel_values", "image_grid_thw"),
                object: ("pixel_values_videos", "video_grid_thw"),
            }.items():
                shown = [i for i in groups.images[number] if isinstance(media[i], bytes) == (kind is bytes)]
                if shown:
                    extra[pixels] = torch.cat([groups.pixels[i] for i in shown])
                    extra[grid] = torch.tensor([groups.grids[i] for i in shown])
            if "video_grid_thw" in extra and model.config.model_type == "qwen2_5_vl":
                extra["second_per_grid_ts"] = torch.ones(len(extra["video_grid_thw"]))
            if positions_given:
                tail = torch.arange(len(response)) + int(prompt.positions.max()) + 1
                extra["position_ids"] = torch.cat([prompt.positions, tail.expand(3, -1)], 1).unsqueeze(1)
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).logits[0]
            log_probs = (logits / TEMPERATURE).log_softmax(-1)[len(prompt.ids) - 1 : -1]
            out.append(log_probs.gather(1, response.unsqueeze(1)).squeeze(1))
    return torch.cat(out)


def gradient(model):
    grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return grads


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_shared_prompts_with_videos_equal_repeated_ones_in_value_and_gradient(tmp_path, family):
    groups, prompts, media = make_groups(tmp_path, family)
    assert [len(row) for row in groups.images] == [1, 2, 8, 0]
    model = build_model(family)
    model.set_attn_implementation("sdpa")
    # transformers lets text continue inside a Qwen2-VL or Qwen2.5-VL video that is longer than wide, vLLM behind it
    split_by_time = family.startswith("qwen3_vl")
    expected = plain_log_probs(model, groups, prompts, media, positions_given=not split_by_time)
    weights = torch.randn(len(expected), generator=torch.Generator().manual_seed(2))
    (expected * weights).sum().backward()
    expected_gradient = gradient(model)

    attend_packed(model)
    actor = Actor(ResponseLogProbs(model), torch.device("cpu"))
    for shared in (True, False):
        for max_tokens in (10_000, 1):
            parts = [actor.forward(groups, pieces, TEMPERATURE)[0] for pieces in groups.plan(max_tokens, shared)]
            actual = torch.cat(parts)
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
            (actual * weights).sum().backward()
            difference = (gradient(model) - expected_gradient).norm() / expected_gradient.norm()
            print(f"{family} {shared} {max_tokens}: {(actual - expected).abs().max():.1e}, gradient {difference:.1e}")
            assert difference < 1e-5


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_positions_of_a_short_video_are_those_that_transformers_makes_itself(tmp_path, family):
    groups, prompts, media = make_groups(tmp_path, family)
    model = build_model(family)
    model.set_attn_implementation("sdpa")
    rows = slice(5 + 3, 5 + 3 + 10)  # of the second prompt: its video is no longer than wide
    with torch.no_grad():
        own, given = (plain_log_probs(model, groups, prompts, media, given)[rows] for given in (False, True))
    assert torch.equal(own, given)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_every_frame_moves_the_log_probs(tmp_path, family):
    groups, *_ = make_groups(tmp_path, family)
    model = build_model(family)
    attend_packed(model)
    actor = Actor(ResponseLogProbs(model), torch.device("cpu"))
    before, _ = actor.compute_log_probs(groups, 10_000, True, 1.0)
    frames, rows, columns = groups.grids[0]
    assert frames == 4
    for frame in range(frames):
        kept = groups.pixels[0].clone()
        part = slice(frame * rows * columns, (frame + 1) * rows * columns)
        groups.pixels[0][part] = groups.pixels[0][part].flip(0)
        after, _ = actor.compute_log_probs(groups, 10_000, True, 1.0)
        groups.pixels[0] = kept
        moved = (after - before).abs().amax((1, 2))
        assert moved[0] > 1e-3 and moved[1:].max() < 1e-5

"""On a GPU: flash-linear-attention's kernels in bf16 against the forms in torch, in layers and in whole models."""

import time

import pytest
import torch

from tests.support.gpus import relative
from tests.support.packed_rows import make_rows, packed_log_probs
from tests.support.tiny_qwen import tiny_model

pytestmark = pytest.mark.gpu
HEADS, VALUE_HEADS, SIZE, TAPS = 4, 8, 128, 4
PROMPTS, RESPONSES = [300, 2, 77], [[40, 3, 1], [9, 70], [128, 64]]


def draw(layout_tokens, seed=0):
    """Queries, keys, values, decays and strengths [1, T, ...] in float32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(1, layout_tokens, *shape, generator=generator).cuda()

    q, k, v = normal(HEADS, SIZE), normal(HEADS, SIZE), normal(VALUE_HEADS, SIZE)
    return [q, k, v, -normal(VALUE_HEADS).exp() / 4, normal(VALUE_HEADS).sigmoid()]


def in_type(parts, dtype):
    """Decays stay in float32, as in a layer."""
    return [part.to(torch.float32 if i == 3 else dtype).requires_grad_() for i, part in enumerate(parts)]


def test_kernels_equal_the_forms_in_torch_in_value_and_gradient():
    from verl.model.linear_attention import convolve_packed, delta_rule_packed, kernels_for
    from verl.model.packing import build_layout

    layout = build_layout(PROMPTS, RESPONSES).to(torch.device("cuda"))
    num_tokens = sum(PROMPTS) + sum(map(sum, RESPONSES))
    fast = kernels_for(torch.device("cuda"), torch.bfloat16)
    slow = kernels_for(torch.device("cuda"), torch.float32)
    assert fast[0] is not slow[0] and fast[1] is not slow[1], "flash-linear-attention or tilelang is not installed"
    rounded = [part.to(torch.bfloat16).float() if i != 3 else part for i, part in enumerate(draw(num_tokens))]
    upstream = torch.randn(1, num_tokens, VALUE_HEADS, SIZE, generator=torch.Generator().manual_seed(1)).cuda()
    found = []
    for dtype, (rule, _) in ((torch.float32, slow), (torch.bfloat16, fast)):
        parts = in_type(rounded, dtype)
        out = delta_rule_packed(*parts, layout, rule)
        found.append([out.detach(), *torch.autograd.grad(out, parts, upstream.to(dtype))])
    errors = [relative(got, wanted) for wanted, got in zip(*found, strict=True)]
    print(f"delta rule: output and gradients of q, k, v, g, beta: {[f'{error:.1e}' for error in errors]}")
    assert max(errors) < 2e-2

    channels = 512
    x = torch.randn(1, num_tokens, channels, generator=torch.Generator().manual_seed(2)).cuda().bfloat16()
    weight = torch.randn(channels, TAPS, generator=torch.Generator().manual_seed(3)).cuda().bfloat16()
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(4)).cuda()
    found = []
    for dtype, (_, convolve) in ((torch.float32, slow), (torch.bfloat16, fast)):
        parts = [part.to(dtype).requires_grad_() for part in (x, weight)]
        out = convolve_packed(*parts, layout, convolve)
        found.append([out.detach(), *torch.autograd.grad(out, parts, upstream.to(dtype))])
    errors = [relative(got, wanted) for wanted, got in zip(*found, strict=True)]
    print(f"convolution: output and gradients of input and weight: {[f'{error:.1e}' for error in errors]}")
    assert max(errors) < 1e-2


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_a_model_in_bf16_is_close_to_itself_in_float32(family, is_fused):
    from verl.model.fused_layers import fuse_layers
    from verl.model.qwen_vl import attend_packed

    rows, found = make_rows(family), []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model(family=family).to("cuda", torch.bfloat16).to(dtype)
        if is_fused and dtype == torch.bfloat16:
            assert fuse_layers(model)
        attend_packed(model)
        log_probs, _ = packed_log_probs(model, rows, 1.0, 10_000, True, "cuda")
        log_probs.sum().backward()
        grads = torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])
        found.append((log_probs.detach(), grads))
    gap, error = (found[0][0] - found[1][0]).abs().mean(), relative(found[1][1], found[0][1])
    print(f"{family}, fused {is_fused}: mean gap of log-probs {gap:.1e}, relative error of the gradient {error:.1e}")
    assert gap < 0.1 and error < 0.3


def test_kernels_are_faster_than_the_forms_in_torch():
    from verl.model.linear_attention import delta_rule_packed, kernels_for
    from verl.model.packing import build_layout

    layout = build_layout([1500] * 4, [[400] * 8] * 4).to(torch.device("cuda"))
    parts, took = draw(4 * (1500 + 8 * 400)), []
    for dtype in (torch.bfloat16, torch.float32):
        rule = kernels_for(torch.device("cuda"), dtype)[0]
        own = in_type([part.detach() for part in parts], dtype)
        for _ in range(2):  # the first compiles
            torch.cuda.synchronize()
            start = time.perf_counter()
            delta_rule_packed(*own, layout, rule).sum().backward()
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        took.append(seconds)
    print(f"18,800 tokens, forward and backward: kernels {1e3 * took[0]:.1f} ms, in torch {1e3 * took[1]:.1f} ms")
    assert took[0] < took[1]


def test_an_engine_and_the_actor_agree_in_bf16(tmp_path):
    from tests.support.engines import check_cycles, workers
    from tests.support.gpus import BF16, ON_GPU, SHORT
    from tests.support.tiny_model_folder import save_tiny_model
    from tests.support.training import make_data

    make_data(tmp_path / "rows", num_train=16, num_val=16)
    folder = save_tiny_model(tmp_path / "model", family="qwen3_5")
    chosen = [f"worker.actor.model.model_path={folder}", "data.max_prompt_length=2048", *SHORT]
    chosen += ["worker.rollout.max_num_batched_tokens=4096", "worker.rollout.enforce_eager=true"]
    chosen += ["worker.rollout.enable_chunked_prefill=true"]
    with workers(tmp_path / "rows", *ON_GPU, *BF16, *chosen) as parts:
        check_cycles(*parts, num_cycles=2)

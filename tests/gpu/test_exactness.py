"""On a GPU: the kernels in bf16 against float32 references, and sharing against repeating in float32."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.gpus import relative

pytestmark = pytest.mark.gpu
ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
EQUAL = [512] * 3, [[256] * 4] * 3
SHORT = [300, 1, 77], [[40, 3, 1], [9], [128, 64]]
FAR_APART = [2000, 1, 300, 129], [[1, 1, 1], [700, 1], [5, 400], [1]]


def run_attention(attend, tensors, upstream, layout):
    inputs = [t.detach().clone().requires_grad_() for t in tensors]
    out = attend(*inputs, layout, tensors[0].shape[-1] ** -0.5)
    out.backward(upstream.to(out.dtype))
    return [out.detach(), *(t.grad for t in inputs)]


@pytest.mark.parametrize("lengths", [EQUAL, SHORT, FAR_APART], ids=["equal", "short", "far apart"])
@pytest.mark.parametrize(
    ("heads", "key_heads", "size"),
    [
        (16, 2, 128),
        (28, 4, 128),
        (8, 8, 128),
        (4, 1, 128),
        (12, 4, 64),
        (6, 6, 96),
        (6, 2, 32),
        (8, 2, 80),
        (16, 4, 256),
    ],
)
def test_flash_attention_equals_padded_float32(heads, key_heads, size, lengths, monkeypatch):
    """Torch's kernels are tried too where Hopper's are in use, and are as far from float32."""
    from verl.model import attention
    from verl.model.packing import build_layout

    prompts, responses = lengths
    layout = build_layout(prompts, responses).to(torch.device("cuda"))
    generator = torch.Generator("cuda").manual_seed(0)
    num_tokens = sum(prompts) + sum(map(sum, responses))
    *tensors, upstream = (
        torch.randn(num_tokens, number, size, device="cuda", generator=generator)
        for number in (heads, key_heads, key_heads, heads)
    )
    rounded = [t.bfloat16() for t in tensors]
    exact = run_attention(attention._padded_shared, [t.float() for t in rounded], upstream.bfloat16(), layout)
    fast = run_attention(attention._flash_shared, rounded, upstream, layout)
    without_gradient = attention._flash_shared(*rounded, layout, size**-0.5)
    assert relative(without_gradient, exact[0]) < 1e-2
    has_own = attention.backward_kernels("cuda", torch.bfloat16, heads, key_heads, size) is not None
    assert has_own == (ON_HOPPER and size in (64, 96, 128)) or key_heads == 1
    monkeypatch.setattr(attention, "hopper_kernels", lambda _: None)
    monkeypatch.setattr(attention, "backward_kernels", lambda *_: None)
    plain = run_attention(attention._flash_shared, rounded, upstream, layout)
    for got, by_torch, wanted in zip(fast, plain, exact, strict=True):
        assert relative(got, wanted) < 1e-2
        assert relative(got, wanted) < 1.5 * relative(by_torch, wanted) + 1e-3


@pytest.mark.skipif(not ON_HOPPER, reason="FlashAttention 4's backward pass is used on Hopper GPUs alone")
def test_compiled_kernels_serve_other_processes(tmp_path):
    """Two processes compile at once, and a third takes what they leave; each compares gradients with torch's."""
    program = (
        "import torch; from verl.model.attention import backward_kernels; "
        "assert backward_kernels('cuda', torch.bfloat16, 16, 2, 128) is not None"
    )
    settings = {"FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": str(tmp_path)}

    def start():
        command = [sys.executable, "-c", program]
        return subprocess.Popen(command, env=os.environ | settings, cwd=Path(__file__).parents[2])

    both = [start(), start()]
    assert [each.wait() for each in both] == [0, 0]
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.o")}
    assert kept
    assert start().wait() == 0
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.o")} == kept


def test_vision_attention_stays_inside_its_windows():
    from verl.model.attention import vision_attention

    ends = torch.tensor([0, 64, 80, 300], device="cuda", dtype=torch.int32)
    q, k, v = torch.randn(3, 1, 16, 300, 80, device="cuda").unbind(0)
    arguments = {"scaling": 80**-0.5, "cu_seq_lens_q": ends, "max_length_q": 300}
    exact, _ = vision_attention(None, q, k, v, None, **arguments)
    fast, _ = vision_attention(None, q.bfloat16(), k.bfloat16(), v.bfloat16(), None, **arguments)
    assert relative(fast, exact) < 1e-2


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_log_probs_equal_float64(dtype, tolerance):
    from verl.model.log_probs import response_log_probs

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    hidden, weight = torch.randn(5000, 64, device="cuda"), torch.randn(151_936, 64, device="cuda") / 8
    targets, upstream = torch.randint(0, 151_936, (5000,), device="cuda"), torch.randn(5000, device="cuda")
    inputs = [t.to(dtype).requires_grad_() for t in (hidden, weight)]
    values, entropies = response_log_probs(*inputs, targets, 0.9)
    (values * upstream).sum().backward()
    exact = [t.detach().double().requires_grad_() for t in inputs]
    part = slice(0, 1000)
    logits = (exact[0][part] @ exact[1].T / 0.9).log_softmax(-1)
    wanted = logits.gather(1, targets[part].unsqueeze(1)).squeeze(1)
    (wanted * upstream[part]).sum().backward()
    assert relative(values[part], wanted) < tolerance
    assert relative(entropies[part], -(logits.exp() * logits).sum(-1)) < tolerance
    assert relative(inputs[0].grad[part], exact[0].grad[part]) < tolerance


def test_rope_of_another_length_compiles_nothing():
    """Liger's choice among its kernels would take 2.3 s for the forward and backward pass of every length."""
    from verl.model.fused_layers import apply_rope

    compiled = []
    for length in (9001, 9002):
        q, k = (torch.randn(1, heads, length, 128, device="cuda", dtype=torch.bfloat16) for heads in (16, 2))
        cos, sin = torch.randn(2, 1, length, 64, device="cuda").repeat(1, 1, 1, 2)
        inputs = [states.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for states in (q, k)]
        upstream = [torch.randn_like(states) for states in inputs]
        rotated = apply_rope(*(2 * states for states in inputs), cos, sin)
        torch.autograd.backward(rotated, upstream)
        for states, got in zip((q, k), rotated, strict=True):
            halves = torch.cat([-states[..., 64:], states[..., :64]], dim=-1)
            assert relative(got, 2 * (states.float() * cos + halves.float() * sin)) < 1e-2
        module = sys.modules.get("liger_kernel.ops.cutedsl.ops.rope")
        compiled.append(len(module._COMPILE_CACHE) if module else 0)
    assert compiled == [0, 0]


def toy_gradient(
    dtype: torch.dtype, shared: bool, fused: bool = False, checkpointing: bool = False, waits: str = "default"
) -> torch.Tensor:
    """The gradient of a weighted sum of the toy model's log-probs over two groups of three responses.

    `waits` is torch's mode for operations of the backward pass that wait for the GPU.
    """
    from verl.model.checkpointing import CHECKPOINTING
    from verl.model.fused_layers import fuse_layers
    from verl.model.packing import pack, plan_micro_batches
    from verl.model.qwen_vl import ResponseLogProbs, expand_image_tokens, load_model, mrope_positions

    model = load_model("configs/toy_model", dtype).cuda().train()
    if fused:
        assert fuse_layers(model)
    if checkpointing:
        model.gradient_checkpointing_enable(CHECKPOINTING)
    image, merge, grid = model.config.image_token_id, 2, (1, 8, 8)
    generator = torch.Generator().manual_seed(0)

    def text(length):
        return torch.randint(20, 600, (length,), generator=generator)

    ids = [expand_image_tokens([3, image, 4, *text(30 + g).tolist()], [grid], image, merge) for g in range(2)]
    responses = [[text(length) for length in lengths] for lengths in ((40, 7, 64), (33, 50, 1))]
    positions = [mrope_positions(row, [grid], image, merge) for row in ids]
    prompts = [torch.tensor(row) for row in ids]
    pixels = torch.randn(128, 1176, generator=generator)
    scorer = ResponseLogProbs(model)
    lengths = [[len(r) for r in rows] for rows in responses]
    (pieces,) = plan_micro_batches([len(p) for p in prompts], lengths, 10_000, shared)
    batch = pack(pieces, prompts, positions, responses, [[0], [1]]).to(torch.device("cuda"))
    values, _ = scorer(batch, pixels.cuda().to(dtype), [grid, grid], 1.0)
    upstream = torch.randn(len(values), generator=generator).cuda()
    loss = (values * upstream).sum()
    torch.cuda.set_sync_debug_mode(waits)
    try:
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])


def test_shared_and_repeated_gradients_agree():
    torch.backends.cuda.matmul.allow_tf32 = False
    exact = toy_gradient(torch.float32, shared=False)
    assert relative(toy_gradient(torch.float32, shared=True), exact) < 1e-5
    unfused = toy_gradient(torch.bfloat16, shared=True)
    repeated = relative(toy_gradient(torch.bfloat16, shared=False), exact)
    assert relative(unfused, exact) < 1.5 * repeated + 1e-3  # bf16's own error, sharing adds none
    assert relative(toy_gradient(torch.bfloat16, shared=True, fused=True), exact) < 1.5 * repeated + 1e-3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_backward_pass_never_waits_for_the_gpu(checkpointing):
    toy_gradient(torch.bfloat16, True, True, checkpointing)  # kernels are compiled, which may wait
    free = toy_gradient(torch.bfloat16, True, True, checkpointing)
    watched = toy_gradient(torch.bfloat16, True, True, checkpointing, "error")
    assert relative(watched, free) < 1e-3


@pytest.mark.parametrize("tails", ["gauss", "cauchy"])
def test_the_fused_update_moves_as_float32_and_as_the_update_without_it(tails):
    """3,000 steps at the defaults; on a CPU the same step rounds by the same thresholds."""
    from tests.unit.test_optim import apart, gradients, train
    from verl.distributed.optim import KahanAdamW

    given = list(gradients(tails, size=(20_000,)))
    settings = {"lr": 1e-6, "weight_decay": 1e-2}
    exact, _ = train(torch.optim.AdamW, torch.float32, given, device="cuda", **settings)
    fused, _ = train(KahanAdamW, torch.bfloat16, given, device="cuda", **settings)
    assert apart(fused, exact) < 0.02
    few = given[:50]
    fused, plain = (train(KahanAdamW, torch.bfloat16, few, device=d, **settings)[0] for d in ("cuda", "cpu"))
    assert apart(fused, plain) < 2e-3

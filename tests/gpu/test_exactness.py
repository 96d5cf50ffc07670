"""On a GPU: the kernels in bf16 against float32 references, and sharing against repeating in float32."""

import pytest
import torch

from tests.support.gpus import relative

pytestmark = pytest.mark.gpu
HEADS, KEY_HEADS, SIZE = 16, 2, 128


def run_attention(attend, tensors, upstream, layout):
    inputs = [t.detach().clone().requires_grad_() for t in tensors]
    out = attend(*inputs, layout, SIZE**-0.5)
    out.backward(upstream.to(out.dtype))
    return [out.detach(), *(t.grad for t in inputs)]


def test_flash_attention_equals_padded_float32():
    from verl.model.attention import _flash_shared, _padded_shared
    from verl.model.packing import build_layout

    layout = build_layout([300, 1, 77], [[40, 3, 1], [9], [128, 64]]).to(torch.device("cuda"))
    generator = torch.Generator("cuda").manual_seed(0)
    num_tokens = 378 + 245

    def draw(heads):
        return torch.randn(num_tokens, heads, SIZE, device="cuda", generator=generator)

    tensors, upstream = (draw(HEADS), draw(KEY_HEADS), draw(KEY_HEADS)), draw(HEADS)
    exact = run_attention(_padded_shared, tensors, upstream, layout)
    fast = run_attention(_flash_shared, [t.bfloat16() for t in tensors], upstream, layout)
    for got, wanted in zip(fast, exact, strict=True):
        assert relative(got, wanted) < 1e-2
    without_gradient = _flash_shared(*(t.bfloat16() for t in tensors), layout, SIZE**-0.5)
    assert relative(without_gradient, exact[0]) < 1e-2


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

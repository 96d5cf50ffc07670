import torch

from verl.optim import KahanAdamW


def run(optimizer_class, dtype, lr, num_steps, **kwargs):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(64, 8).to(dtype))
    optimizer = optimizer_class([weight], lr=lr, weight_decay=0.01, **kwargs)
    generator = torch.Generator().manual_seed(1)
    drift = torch.randn(64, 8, generator=generator)
    for _ in range(num_steps):
        weight.grad = (drift + 0.1 * torch.randn(64, 8, generator=generator)).to(dtype)
        optimizer.step()
    return weight.detach().float()


def test_in_float32_it_is_adamw():
    expected = run(torch.optim.AdamW, torch.float32, 1e-3, 20)
    torch.testing.assert_close(run(KahanAdamW, torch.float32, 1e-3, 20), expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_keeps_updates_that_rounding_would_lose():
    """300 updates of 1e-6 move weights near 1 by far less than bfloat16's spacing of 0.008: only the sum counts."""
    start = run(KahanAdamW, torch.bfloat16, 0.0, 1)
    plain = run(torch.optim.AdamW, torch.bfloat16, 1e-5, 1000)
    kahan = run(KahanAdamW, torch.bfloat16, 1e-5, 1000)
    exact = run(torch.optim.AdamW, torch.float32, 1e-5, 1000)
    large = start.abs() > 0.5
    assert (plain[large] == start[large]).float().mean() > 0.9
    moved, wanted = (kahan - start)[large], (exact - start)[large]
    assert torch.nn.functional.cosine_similarity(moved, wanted, dim=0) > 0.95
    assert 0.5 < moved.norm() / wanted.norm() < 2  # the moments are rounded too, so not exactly as far

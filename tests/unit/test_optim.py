import pytest
import torch

from verl.distributed.optim import OPTIMIZERS, KahanAdamW, allocate_states


def run(optimizer_class, dtype, lr, num_steps, **kwargs):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(64, 8).to(dtype))
    optimizer = optimizer_class([weight], lr=lr, weight_decay=0.01, **kwargs)
    generator = torch.Generator().manual_seed(1)
    drift = torch.randn(64, 8, generator=generator)
    for _ in range(num_steps):
        weight.grad = (drift + 0.1 * torch.randn(64, 8, generator=generator)).to(dtype)
        optimizer.step()
    carried = optimizer.state[weight].get("compensation", torch.zeros(1))
    return weight.detach().float(), carried.float()


def test_in_float32_it_is_adamw():
    expected, _ = run(torch.optim.AdamW, torch.float32, 1e-3, 20)
    actual, _ = run(KahanAdamW, torch.float32, 1e-3, 20)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_keeps_updates_that_rounding_would_lose():
    """1,000 updates of 1e-5 to weights over 0.5, where bfloat16's spacing is 0.004: plain AdamW never moves them."""
    start, _ = run(KahanAdamW, torch.bfloat16, 0.0, 1)
    plain, _ = run(torch.optim.AdamW, torch.bfloat16, 1e-5, 1000)
    kahan, carried = run(KahanAdamW, torch.bfloat16, 1e-5, 1000)
    exact, _ = run(torch.optim.AdamW, torch.float32, 1e-5, 1000)
    large = start.abs() > 0.5
    assert torch.equal(plain[large], start[large])
    moved, wanted = (kahan + carried - start)[large], (exact - start)[large]
    assert torch.nn.functional.cosine_similarity(moved, wanted, dim=0) > 0.9
    assert 0.5 < moved.norm() / wanted.norm() < 2  # the moments are rounded too, so not exactly as far
    assert (kahan[large] != start[large]).float().mean() > 0.5


@pytest.mark.parametrize("kind", OPTIMIZERS.values())
def test_states_made_beforehand_change_no_step(kind):
    def train(is_beforehand):
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 3)
        optimizer = kind(layer.parameters(), lr=0.1, weight_decay=0.1)
        if is_beforehand:
            start = [p.detach().clone() for p in layer.parameters()]
            allocate_states(optimizer)
            assert all(map(torch.equal, layer.parameters(), start))
            assert all(p.grad is None and len(optimizer.state[p]) > 1 for p in layer.parameters())
        for _ in range(3):
            layer(torch.randn(5, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in layer.parameters()]

    assert all(map(torch.equal, train(True), train(False)))

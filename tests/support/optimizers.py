"""Gradients with tails of several kinds, and a small layer in bfloat16 with its optimizer."""

import torch

from verl.distributed.optim import KahanAdamW, allocate_states, join_bits


def gradients(tails, num_steps=3000, size=(512,)):
    """Gradients of 1e-4 in bfloat16: Gaussian, Gaussian around a drift, Student's t with 2 degrees, Cauchy."""
    generator = torch.Generator().manual_seed(1)

    def normal():
        return torch.randn(size, generator=generator)

    drift = normal() / 3
    tailed = {
        "gauss": normal,
        "drift": lambda: drift + normal(),
        "student": lambda: normal() / ((normal().square() + normal().square()) / 2).sqrt(),
        "cauchy": lambda: normal() / normal().abs().clamp(min=1e-3),
    }[tails]
    for _ in range(num_steps):
        yield (1e-4 * tailed()).bfloat16()


def weights_of(optimizer, weight):
    state = optimizer.state[weight]
    return join_bits(weight.data, state["low_bits"]) if "low_bits" in state else weight.data


def layer_and_optimizer(seed=0):
    torch.manual_seed(seed)
    layer = torch.nn.Linear(8, 16, dtype=torch.bfloat16)
    optimizer = KahanAdamW(layer.parameters(), lr=1e-4)
    allocate_states(optimizer)
    return layer, optimizer
